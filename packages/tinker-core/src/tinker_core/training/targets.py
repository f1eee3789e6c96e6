"""Which linears of a base model an adapter changes, as its `LoraConfig` asks."""

from __future__ import annotations

import math

from tinker_core.errors import InvalidLoraConfigError
from tinker_core.training.adapters import LinearSpec
from tinker_core.types import LoraConfig

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What ``train_attn`` adapts."""
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""What ``train_mlp`` adapts."""
UNEMBED_TARGETS = ("lm_head",)
"""What ``train_unembed`` adapts."""
ALL_TARGETS = frozenset(ATTENTION_TARGETS + MLP_TARGETS + UNEMBED_TARGETS)
"""Every linear that an adapter may change, by the last segment of its name."""


def target_names(config: LoraConfig) -> tuple[str, ...]:
    """Last name segments that a configuration adapts: ``target_modules`` if given, else what the flags choose."""
    if config.target_modules is not None:
        return config.target_modules
    names: tuple[str, ...] = ()
    if config.train_attn:
        names += ATTENTION_TARGETS
    if config.train_mlp:
        names += MLP_TARGETS
    if config.train_unembed:
        names += UNEMBED_TARGETS
    return names


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
