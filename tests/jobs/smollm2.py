"""A small chat model that has learned something, for the tests that need one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

PREPARED = Path(__file__).parents[2] / ".cache" / "models" / "smollm2-135m-instruct"
"""Where ``scripts/prepare_smollm2.py`` puts it."""


def find_smollm2() -> str:
    """The directory of SmolLM2-135M-Instruct; skips the test without one."""
    named = os.environ.get("TINKER_TEST_MODEL")
    if named is None and not PREPARED.exists():
        pytest.skip("no SmolLM2: run scripts/prepare_smollm2.py, or name its directory in TINKER_TEST_MODEL")
    return named or str(PREPARED)
