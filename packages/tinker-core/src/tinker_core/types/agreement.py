"""How closely the trainer and the sampler of a base model agree about the same tokens."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import attrs


@attrs.frozen(kw_only=True)
class AgreementFigures:
    """Differences between two log-probabilities of the same tokens, in nats; infinite where one was not finite."""

    max: float
    """The greatest, without its sign."""
    mean: float
    """The mean, without signs."""
    kl: float
    """The mean of ``exp(d) - 1 - d`` with ``d`` = trainer's - sampler's: of tokens that the sampler drew, an unbiased
    estimate of KL(sampler || trainer); of given tokens, about half the mean square of ``d``."""


@attrs.frozen(kw_only=True)
class AgreementReport:
    """The outcome of one comparison."""

    base_model: str
    dtype: str
    figures: Mapping[str, AgreementFigures] = MappingProxyType({})
    """By what was compared: ``base`` (given tokens, bare base model), ``adapter`` (given tokens, a trained adapter),
    ``decode`` (sampled tokens) and, when the adapter does not agree, its parts alone: ``attention``, ``mlp`` and
    ``unembed``."""
    tolerance: AgreementFigures
    """The most that each may be."""
    suspect: str = ""
    """What is beyond the tolerance and where to look for the reason; empty when trainer and sampler agree."""
    notes: tuple[str, ...] = ()
    """What could not be compared, and why."""

    @property
    def agrees(self) -> bool:
        """Whether everything that was compared lies within the tolerance."""
        return not self.suspect
