"""The names of the linears that an adapter may change. Needs no torch: the server checks configurations with it."""

from __future__ import annotations

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
