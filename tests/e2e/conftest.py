"""A real ``tinker-server`` process with real FSDP2 workers, and the real SDK."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import tinker
from tinker import types

from tests.chaos.command import READY
from tests.models import write_tiny_model

API_KEY = "tml-local"
CANNOT_START = "cannot start: "
"""What is said of a base model for which nobody need wait."""


@attrs.frozen
class Server:
    url: str
    llama: str
    """Base model name; also the directory, so that the SDK finds the tokenizer."""
    qwen3: str
    data_dir: Path


def _ready_url(lines: Iterable[str], log: list[str]) -> str:
    for line in lines:
        log.append(line)
        if found := READY.search(line):
            return found.group(1)
        if CANNOT_START in line:
            break
    return pytest.fail("the server did not start, see its log")


@contextmanager
def run_server(*flags: str) -> Iterator[str]:
    """Run the command with its own defaults otherwise; yields the URL once it is ready."""
    command = [str(Path(sys.executable).parent / "tinker-server"), "--port", "0", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    log: list[str] = []
    try:
        try:
            url = _ready_url(process.stderr, log)
        except BaseException:  # also the one of a test that takes too long
            sys.stderr.writelines(log)
            raise
        drain = threading.Thread(target=process.stderr.read, daemon=True)
        drain.start()
        yield url
    finally:
        process.terminate()
        code = process.wait(timeout=120)
        process.stderr.close()
    assert code == 0, f"the server ended with {code}"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("e2e")
    llama = write_tiny_model(root / "llama", "llama", tie=True)
    qwen3 = write_tiny_model(root / "qwen3", "qwen3")
    flags = ["--base-model", str(llama), "--base-model", str(qwen3), "--data-dir", str(root / "data")]
    with run_server(*flags, "--backend", "fsdp", "--sampler", "colocated", "--max-context-length", "64") as url:
        yield Server(url, str(llama), str(qwen3), root / "data")


@pytest.fixture
def service(server: Server) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as client:
        yield client


@pytest.fixture
def other_service(server: Server) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as client:
        yield client


NewModel = Callable[..., tinker.TrainingClient]


@pytest.fixture
def new_model(service: tinker.ServiceClient, server: Server) -> NewModel:
    def make(*, rank: int = 4, seed: int = 1, base_model: str = server.llama, **kwargs: Any) -> tinker.TrainingClient:
        return service.create_lora_training_client(base_model=base_model, rank=rank, seed=seed, **kwargs).result()

    return make


def tokens(length: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(4, 100, size=length)]


def datum(sequence: list[int], **extra: Any) -> types.Datum:
    """Predict each next token; ``extra`` replaces or adds loss inputs."""
    inputs: dict[str, Any] = {
        "target_tokens": np.array(sequence[1:], np.int64),
        "weights": np.ones(len(sequence) - 1, np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(sequence[:-1]), loss_fn_inputs={**inputs, **extra})


def train(model: tinker.TrainingClient, num_steps: int, *, seed: int = 0, learning_rate: float = 0.02) -> list[float]:
    """Steps on fixed data; the gradient norm of each step."""
    norms = []
    data = [datum(tokens(12 + i, seed + i)) for i in range(3)]
    adam = types.AdamParams(learning_rate=learning_rate, eps=1e-8)
    for _ in range(num_steps):
        passed = model.forward_backward(data, "cross_entropy")
        stepped = model.optim_step(adam)
        passed.result()
        norms.append((stepped.result().metrics or {})["grad_norm"])
    return norms


def forward_logprobs(model: tinker.TrainingClient, sequence: list[int]) -> np.ndarray:
    output = model.forward([datum(sequence)], "cross_entropy").result()
    return np.array(output.loss_fn_outputs[0]["logprobs"].tolist())


def sampler_logprobs(client: tinker.SamplingClient, sequence: list[int]) -> np.ndarray:
    values = client.compute_logprobs(types.ModelInput.from_ints(sequence)).result()
    assert values[0] is None
    return np.array(values[1:], dtype=np.float64)
