"""A server that only samples from engines elsewhere needs neither torch nor vLLM; and loading them takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

_BLOCKED = "import sys; sys.modules.update(dict.fromkeys(('torch', 'vllm', 'transformers', 'safetensors')));"


@pytest.mark.parametrize(
    "module", ["hooks", "build", "sampler", "cli", "links.local", "links.remote", "engine.serving", "engine.in_vllm"]
)
def test_modules_on_the_side_of_the_server_load_without_torch_and_vllm(module):
    program = f"{_BLOCKED} import tinker_sampler_vllm.{module}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
