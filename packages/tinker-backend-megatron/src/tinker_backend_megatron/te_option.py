"""The option to run attention and norms by Transformer Engine. Needs no torch."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

from tinker_backend_megatron.topology import CONTEXT
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option

if TYPE_CHECKING:
    from tinker_core.interfaces import RankContext

TRANSFORMER_ENGINE = Option(
    name="transformer-engine",
    type=bool,
    default=False,
    help="attention and norms by Transformer Engine, on CUDA devices, in bfloat16, where it is installed",
)


def uses_transformer_engine(context: RankContext) -> bool:
    """Whether it was asked for; raises `ConfigurationError` where it cannot run as asked."""
    flag = f"--{TRANSFORMER_ENGINE.name}"
    if not context.options.get(TRANSFORMER_ENGINE.name, TRANSFORMER_ENGINE.default):
        return False
    if context.device != "cuda":
        raise ConfigurationError(f"{flag} needs --device cuda; leave it out on {context.device}")
    if context.dtype != "bfloat16":
        raise ConfigurationError(f"{flag} needs --dtype bfloat16: its kernels do not take {context.dtype}")
    if int(context.options.get(CONTEXT, 1)) > 1:
        raise ConfigurationError(
            f"{flag} cannot be used with --{CONTEXT}, which is this backend's own and brings its attention along; "
            "leave one of them out"
        )
    if importlib.util.find_spec("transformer_engine") is None:
        raise ConfigurationError(
            f"{flag} needs Transformer Engine, which is not installed; install it with: "
            "pip install --no-build-isolation 'transformer-engine[pytorch]', or leave the option out"
        )
    if context.deterministic:
        os.environ["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] = "0"
    return True
