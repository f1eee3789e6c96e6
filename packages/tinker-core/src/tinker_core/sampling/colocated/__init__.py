"""Sampler ``colocated``: decodes through a trainer's own live base weights, one token of every sequence a step.

It works with any trainer whose handle (`tinker_core.interfaces.ModelHandle`) has a model like
`tinker_core.sampling.colocated.root.Root`. Ranks compute the same; what they share of a model is the model's affair.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_core.interfaces import ModelHandle, RankContext, RankSampler


def build_sampler(context: RankContext, handle: ModelHandle) -> RankSampler:
    """The sampler of one trainer rank; every rank builds one and gets the same calls."""
    from tinker_core.sampling.colocated.sampler import ColocatedSampler

    return ColocatedSampler(context, handle)
