"""The losses of the Tinker API. Every one is a plain sum over target cells; there is no normalisation anywhere.

Symbols: p is the model's probability of the target, q the sampler's (input ``logprobs`` is log q), A the advantage,
r = p / q.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tinker_core.errors import InvalidLossConfigError, InvalidRequestError
from tinker_core.interfaces import LossContext, LossPlugin
from tinker_core.training.provenance import SAMPLED

_POLICY_INPUTS = ("target_tokens", "logprobs", "advantages")
_CLIP_LOW, _CLIP_HIGH = "clip_low_threshold", "clip_high_threshold"
_CLIPS = (_CLIP_LOW, _CLIP_HIGH)
_KL_COEFF = "kl_coeff"


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


def _stable_reinforce(logprobs: torch.Tensor, context: LossContext) -> torch.Tensor:
    distance = logprobs - context.input("logprobs")
    weight = torch.minimum(torch.exp(distance), _threshold(_CLIP_HIGH, distance, context)).detach()
    loss = -(weight * logprobs * context.input("advantages")).sum()
    kl_coeff = float(context.config[_KL_COEFF])
    if kl_coeff == 0:
        return loss
    if not context.has_input(SAMPLED):
        raise InvalidRequestError(
            "kl_coeff needs provenance on every datum, to know which targets were sampled; "
            "attach it with Datum.with_provenance, or leave kl_coeff at 0"
        )
    return loss + 0.5 * kl_coeff * (context.input(SAMPLED) * weight * distance.square()).sum()


def _check_stable_reinforce(config: Mapping[str, float | str]) -> None:
    for name, low in ((_KL_COEFF, 0.0), (_CLIP_HIGH, 0.0)):
        if not float(config[name]) >= low:
            raise InvalidLossConfigError(f"loss_fn_config[{name!r}] must be at least {low:g}, got {config[name]}")


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

STABLE_REINFORCE = LossPlugin(
    name="stable_reinforce",
    compute=_stable_reinforce,
    required_inputs=_POLICY_INPUTS,
    optional_inputs=(_CLIP_HIGH,),
    default_config={_CLIP_HIGH: 2.0, _KL_COEFF: 0.0},
    uses_provenance=True,
    check_config=_check_stable_reinforce,
)
"""``-sum w (log p A - kl_coeff / 2 m (log p - log q)^2)``, where ``w = min(r, clip_high_threshold)`` has no gradient,
and m is 1 where the datum's provenance names a sampled target and 0 elsewhere.

**This objective is ours. It is not that of the hosted service, which is not public**; the two do not compare number for
number. The server says so in its log, once for each training run that uses it. It is token-level REINFORCE on the
sampler's tokens, with importance ratios that are truncated from above.

- The gradient is ``-sum w (A - kl_coeff m (log p - log q)) grad log p``. With ``kl_coeff`` 0 that is REINFORCE with
  truncated importance ratios. The other part is, as far as nothing is truncated, the gradient of KL(p || q) estimated
  on samples of q: 0 where trainer and sampler agree, and larger the further they are apart. Its value, half a squared
  log-ratio, is never negative.
- ``clip_high_threshold`` bounds w: however stale, no token counts for more than twice what it would on policy, while
  the small differences between a sampler's and a trainer's arithmetic stay far below 2 and are corrected exactly. There
  is no bound from below: a token that the policy has left behind counts for little. The threshold is a number of at
  least 0, or a loss input with a value per token.
- ``kl_coeff``, at least 0, is off by default: on fresh data the truncation is enough, on stale data it is worth
  trying. Above 0 every datum needs provenance (``Datum.with_provenance``), because the logprobs of prompts are
  placeholders that must not count.
- It needs nothing of a sampler but the logprobs that every sample returns. ``record_stability_info`` is accepted, and
  adds nothing.
"""

BUILT_IN_LOSSES = (CROSS_ENTROPY, IMPORTANCE_SAMPLING, PPO, CISPO, DRO, GSPO, STABLE_REINFORCE)
"""All losses that tinker-core brings."""
