"""Which linears of a base model an adapter changes, as its `LoraConfig` asks."""

from __future__ import annotations

import math

from tinker_core.errors import InvalidLoraConfigError
from tinker_core.lora_targets import target_names
from tinker_core.training.adapters import LinearSpec
from tinker_core.types import LoraConfig


def select_linears(linears: tuple[LinearSpec, ...], config: LoraConfig, *, max_rank: int) -> tuple[LinearSpec, ...]:
    """The linears that an adapter of this configuration changes, in model order.

    Raises `InvalidLoraConfigError` for a rank, alpha, seed or choice of modules that cannot be built.
    """
    if not 1 <= config.rank <= max_rank:
        raise InvalidLoraConfigError(f"lora_config.rank must be 1 to {max_rank}, got {config.rank}")
    if not (math.isfinite(config.alpha) and config.alpha > 0):
        raise InvalidLoraConfigError(f"lora_config.alpha must be a positive number, got {config.alpha}")
    if config.seed is None:
        raise InvalidLoraConfigError("lora_config.seed must be drawn before the model is created")
    names = target_names(config)
    if not names:
        raise InvalidLoraConfigError(
            "lora_config adapts nothing: set train_attn, train_mlp or train_unembed, or name target_modules"
        )
    known = {linear.name.rsplit(".", 1)[-1] for linear in linears}
    unknown = sorted(set(names) - known)
    if unknown:
        raise InvalidLoraConfigError(
            f"lora_config.target_modules names {', '.join(unknown)}; this model has {', '.join(sorted(known))}"
        )
    return tuple(linear for linear in linears if linear.name.rsplit(".", 1)[-1] in names)
