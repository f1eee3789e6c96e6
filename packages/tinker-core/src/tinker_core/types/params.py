"""Parameters of optimizers, adapters and sampling, with the SDK's own names and defaults."""

from __future__ import annotations

import attrs

DEFAULT_LORA_ALPHA = 32.0
"""LoRA alpha when the client does not choose one; the value of the public study "LoRA Without Regret"."""


SettingValue = float | int | str | bool


@attrs.frozen(kw_only=True)
class AdamParams:
    """One AdamW step (SDK ``types.AdamParams``)."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    """Decoupled, as in ``torch.optim.AdamW``."""
    grad_clip_norm: float = 0.0
    """Bound on the global gradient norm; 0 means none."""


@attrs.frozen(kw_only=True)
class OptimizerConfig:
    """The optimizer family of a model, fixed when it is created."""

    type: str = "adamw"
    settings: dict[str, SettingValue] = attrs.field(factory=dict)
    """What the client said of the family besides its type; the family's plugin reads them."""


@attrs.frozen(kw_only=True)
class LoraConfig:
    """Shape of a LoRA adapter (SDK ``types.LoraConfig`` plus the server's own alpha and target modules)."""

    rank: int
    seed: int | None = None
    """Seed of the initial A matrices; drawn by the engine when the client leaves it out."""
    train_attn: bool = True
    train_mlp: bool = True
    train_unembed: bool = True
    alpha: float = DEFAULT_LORA_ALPHA
    """The update is ``alpha / rank * B @ A``."""
    target_modules: tuple[str, ...] | None = None
    """Last name segments of the linears to adapt; None means what the train_* flags choose."""


@attrs.frozen(kw_only=True)
class StopCondition:
    """Where a sequence ends; the four forms of the SDK's ``stop`` in one record.

    ``stop`` absent is the default record. Any explicit ``stop`` replaces the end-of-sequence rule: ``[]`` is
    ``StopCondition(at_eos=False)`` and never stops. The token, or the tokens that complete a text, stay in the result.
    """

    at_eos: bool = True
    """Stop at the base model's end-of-sequence tokens."""
    texts: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()


@attrs.frozen(kw_only=True)
class SamplingParams:
    """How tokens are drawn (SDK ``types.SamplingParams``)."""

    max_tokens: int | None = None
    """New tokens per sequence; None means up to the context length."""
    seed: int | None = None
    """Any 64-bit integer; drawn by the engine when the client leaves it out."""
    stop: StopCondition = StopCondition()
    """Where to stop besides ``max_tokens``."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = -1
    """-1 means off."""
    top_p: float = 1.0
