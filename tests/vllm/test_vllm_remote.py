"""An engine that ``tinker-sampler-vllm serve`` keeps running, used over the network with a secret."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.tree import wait_gone
from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE, LORA_SLOTS, vllm_bench
from tests.vllm.load import PATIENCE, Load, descendants_of, engines_of, process_of, tokens_of
from tests.vllm_links.engines import free_address
from tinker_sampler_vllm.security import create_secret

pytestmark = pytest.mark.slow


def serve(directory: Path, address: str, secret: Path) -> subprocess.Popen[str]:
    """The command, in a process group of its own, with the model of `vllm_bench` in a place of its own."""
    path = write_tiny_model(directory, "llama", tie=True, hidden_size=HIDDEN_SIZE)
    command = [sys.executable, "-m", "tinker_sampler_vllm.cli", "serve", "--base-model", f"tiny={path}"]
    command += ["--listen", address, "--secret-file", str(secret), "--device", "cpu", "--kv-cache-mib", "64"]
    command += ["--max-revisions", "8", "--max-lora-rank", "8", "--max-context-length", "64"]
    command += ["--lora-slots", str(LORA_SLOTS)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def wait_ready(server: subprocess.Popen[str], address: str) -> None:
    assert server.stdout is not None
    assert server.stdout.readline() == f"ready: 'tiny' in float32 on cpu at {address}\n"


def test_a_served_engine_is_as_good_as_a_local_one_and_its_death_loses_nothing(tmp_path):
    address, secret = free_address(), tmp_path / "secret"
    create_secret(secret)
    options = {"vllm-engines": 0, "vllm-workers": address, "vllm-secret-file": str(secret)}
    with serve(tmp_path / "remote", address, secret) as server:
        try:
            wait_ready(server, address)
            with vllm_bench(tmp_path, **options) as (bench, sampler, group):
                load = Load(bench, sampler, group)
                load.publish_adapter()
                prompt = [5, 9, 14, 22]
                trained = bench.forward_logprobs("m1", prompt)
                assert abs(load.lab.prompt_logprobs("r1", prompt) - trained).max() < 1e-5
                assert abs(load.lab.prompt_logprobs(None, prompt) - trained).max() > 1e-3
                undisturbed = load.run()

                [engine] = engines_of(server.pid)
                family = descendants_of(engine)
                futures = load.begin()
                os.kill(process_of(engine, "VLLM::Worker"), signal.SIGSTOP)
                assert any(not future.done() for future in futures)
                os.kill(engine, signal.SIGKILL)
                assert tokens_of([future.result(timeout=150) for future in futures]) == undisturbed
                wait_ready(server, address)
                assert wait_gone(family, PATIENCE) == []

            with vllm_bench(tmp_path, **options) as (bench, sampler, group):  # another server, after the first one
                load = Load(bench, sampler, group)
                load.publish_adapter()
                assert load.run() == undisturbed
                family = descendants_of(server.pid)[1:]
                server.send_signal(signal.SIGTERM)
                assert server.wait(timeout=60) == 0
                assert wait_gone(family, PATIENCE) == []
        finally:
            server.kill()
