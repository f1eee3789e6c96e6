"""Imports Megatron-Core without its remarks on parts that this backend does not use."""

from __future__ import annotations

import logging
import warnings

from tinker_core.errors import ConfigurationError

_REMARKS = (
    # It has optimizers, gradient scaling and inference of its own, which it imports all and always.
    (UserWarning, "Transformer Engine and Apex are not installed"),
    (UserWarning, "absl.logging is not installed"),
    (DeprecationWarning, "The following imports from `dynamic_context.py` will be removed"),
    # Of what torch.compile imports when Megatron-Core decorates its fused kernels.
    (DeprecationWarning, "`torch.jit.script"),
)
_TALKATIVE = "megatron.core.distributed.fsdp"
"""Logs at INFO that its own kind of FSDP, which nothing here uses, has been imported."""


def import_megatron_core() -> None:
    """Import Megatron-Core, before any module here that uses it; raises `ConfigurationError` if it is not there."""
    logging.getLogger(_TALKATIVE).setLevel(logging.WARNING)
    with warnings.catch_warnings():
        for category, message in _REMARKS:
            warnings.filterwarnings("ignore", message=message, category=category)
        try:
            import megatron.core  # noqa: F401
        except ImportError as error:
            raise ConfigurationError(
                f"the trainer megatron needs Megatron-Core, which cannot be imported: {error}; "
                "install it with: pip install 'megatron-core>=0.16,<0.20' (0.17 and newer need Python 3.12)"
            ) from error
