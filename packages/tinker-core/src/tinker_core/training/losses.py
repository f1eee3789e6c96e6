"""The losses of the Tinker API. Every one is a plain sum over target cells; there is no normalisation anywhere.

Symbols: p is the model's probability of the target, q the sampler's (input ``logprobs`` is log q), A the advantage,
r = p / q.
"""

from __future__ import annotations

import torch

from tinker_core.errors import InvalidRequestError
from tinker_core.interfaces import LossContext, LossPlugin

_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")
_CLIP_LOW, _CLIP_HIGH = "clip_low_threshold", "clip_high_threshold"
_CLIPS = (_CLIP_LOW, _CLIP_HIGH)


def _cross_entropy(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    if not context.has_input("weights"):
        return -logprobs.sum()
    return -(context.input("weights") * logprobs).sum()


def _ratio(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    return torch.exp(logprobs - context.input("logprobs"))


def _importance_sampling(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    return -(_ratio(logprobs, context) * context.input("advantages")).sum()


def _threshold(name: str, like: torch.Tensor, context: LossContext) -> torch.Tensor:
    """A clip threshold per token: the tensor input if there is one, else the configured number."""
    if context.has_input(name):
        return context.input(name)
    return torch.full_like(like, float(context.config[name]), requires_grad=False)


def _clamp(ratio: torch.Tensor, context: LossContext) -> torch.Tensor:
    return torch.clamp(ratio, _threshold(_CLIP_LOW, ratio, context), _threshold(_CLIP_HIGH, ratio, context))


def _pessimistic(ratio: torch.Tensor, context: LossContext) -> torch.Tensor:
    advantages = context.input("advantages")
    return -torch.minimum(ratio * advantages, _clamp(ratio, context) * advantages).sum()


def _ppo(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    return _pessimistic(_ratio(logprobs, context), context)


def _cispo(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    weight = _clamp(_ratio(logprobs, context), context).detach()
    return -(weight * logprobs * context.input("advantages")).sum()


def _dro(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    beta = float(context.config["beta"])
    distance = logprobs - context.input("logprobs")
    return -(logprobs * context.input("advantages") - 0.5 * beta * distance.square()).sum()


def _gspo(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    counted = context.input("sequence_ratio_mask") != 0
    if not bool(counted.any()):
        raise InvalidRequestError("sequence_ratio_mask is 0 everywhere; gspo needs at least one counted token")
    sequence_ratio = (logprobs - context.input("logprobs"))[counted].mean().exp().detach()
    return _pessimistic(sequence_ratio * torch.exp(logprobs - logprobs.detach()), context)


CROSS_ENTROPY = LossPlugin(
    name="cross_entropy", compute=_cross_entropy, optional_inputs=("weights",), soft_targets=True
)
"""``-sum w log p``; absent weights are 1."""

IMPORTANCE_SAMPLING = LossPlugin(
    name="importance_sampling", compute=_importance_sampling, required_inputs=_POLICY_INPUTS
)
"""``-sum r A``."""

PPO = LossPlugin(
    name="ppo",
    compute=_ppo,
    required_inputs=_POLICY_INPUTS,
    optional_inputs=_CLIPS,
    default_config={_CLIP_LOW: 0.8, _CLIP_HIGH: 1.2},
)
"""``-sum min(r A, clamp(r) A)``; thresholds bound the ratio itself."""

CISPO = LossPlugin(
    name="cispo",
    compute=_cispo,
    required_inputs=_POLICY_INPUTS,
    optional_inputs=_CLIPS,
    default_config={_CLIP_LOW: 0.0, _CLIP_HIGH: 4.0},
)
"""``-sum clamp(r) log p A``, with no gradient through the clamped ratio."""

DRO = LossPlugin(name="dro", compute=_dro, required_inputs=_POLICY_INPUTS, required_config=("beta",))
"""``-sum (log p A - beta / 2 (log p - log q)^2)``."""

GSPO = LossPlugin(
    name="gspo",
    compute=_gspo,
    required_inputs=(*_POLICY_INPUTS, "sequence_ratio_mask"),
    optional_inputs=_CLIPS,
    required_config=_CLIPS,
    per_token=False,
)
"""As ppo with one ratio per sequence: the exponential of the mean log-ratio where ``sequence_ratio_mask`` is not 0."""

BUILT_IN_LOSSES = (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO)
"""All losses that tinker-core brings."""
