"""The option that turns a server into one for all parameters. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping

from tinker_backend_megatron.bridges import WEIGHTS_BRIDGE
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option, OptionValue

FULL_PARAMETER = Option(
    name="full-parameter",
    type=bool,
    default=False,
    help="train all parameters of the base model, for one model of rank 0 at a time, instead of LoRA adapters",
)


def wants_full_parameter(options: Mapping[str, OptionValue]) -> bool:
    """Whether the option is set; raises `ConfigurationError` where it does not go with another."""
    wanted = bool(options.get(FULL_PARAMETER.name, FULL_PARAMETER.default))
    if wanted and options.get(WEIGHTS_BRIDGE.name, WEIGHTS_BRIDGE.default) != WEIGHTS_BRIDGE.default:
        raise ConfigurationError(
            f"--{FULL_PARAMETER.name} reads the base model's weights again for every tenant, in float32, which bridges "
            f"do not; leave --{WEIGHTS_BRIDGE.name} out"
        )
    return wanted
