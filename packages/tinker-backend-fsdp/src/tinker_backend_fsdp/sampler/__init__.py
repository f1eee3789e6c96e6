"""Sampler ``colocated``: decodes through the trainer's own live base weights, one token of every sequence a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinker_core.interfaces import ModelHandle, RankContext, RankSampler


def build_sampler(context: RankContext, handle: ModelHandle) -> RankSampler:
    """The sampler of one trainer rank; every rank builds one and gets the same calls."""
    from tinker_backend_fsdp.sampler.sampler import ColocatedSampler

    return ColocatedSampler(context, handle)
