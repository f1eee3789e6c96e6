"""For plugin authors: fakes, one contract suite for trainers and one for samplers."""

from __future__ import annotations

from tinker_core.testing.group import BlockingGroup, start_group

__all__ = ["BlockingGroup", "start_group"]
