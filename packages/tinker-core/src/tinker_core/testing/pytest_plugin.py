"""Loaded by pytest through its entry point: makes contract suites show full assertions."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite(
    "tinker_core.testing.trainer_contract",
    "tinker_core.testing.snapshot_contract",
    "tinker_core.testing.sampler_contract",
    "tinker_core.testing.determinism_contract",
)
