"""The example trainer: installed by pip like anybody's package, found by its entry point, held to the same contract."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tinker
import torch
from transformers import AutoModelForCausalLM

from tests.e2e.conftest import API_KEY, forward_logprobs, run_server, sampler_logprobs, tokens, train
from tests.models import write_tiny_model
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.testing import BlockingGroup, start_group
from tinker_core.testing.faults import FAULTS_PLUGIN
from tinker_core.testing.trainer_contract import TrainerContract
from tinker_core.testing.trainer_lab import TrainerLab, logprobs_of, make_datum
from tinker_core.types import BaseModelSpec

EXAMPLE = Path(__file__).parents[2] / "examples" / "plugins" / "tinker-backend-nano"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pip has put the package: nothing of its source tree is needed afterwards."""
    target = tmp_path_factory.mktemp("site")
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--target", str(target))
    subprocess.run([sys.executable, "-m", "pip", "install", *options, str(EXAMPLE)], check=True)
    return target


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "llama", tie=True)


@pytest.fixture(scope="module", params=[1, pytest.param(2, marks=pytest.mark.slow)])
def group(request: pytest.FixtureRequest, installed: Path, llama: Path) -> Iterator[BlockingGroup]:
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(llama)),
        trainer="nano",
        sampler=None,
        plugins=("core", "nano", FAULTS_PLUGIN),
        num_ranks=request.param,
        device="cpu",
        dtype="float32",
        micro_batch_tokens=24,
        max_models=5,
        environment={"OMP_NUM_THREADS": "1", "PYTHONPATH": str(installed)},
    )
    with start_group(spec) as group:
        yield group


class TestNanoTrainer(TrainerContract):
    pass


def test_log_probabilities_are_those_of_hugging_face(group: BlockingGroup, llama: Path, tmp_path: Path) -> None:
    lab = TrainerLab(group, tmp_path)
    sequences = [np.array(tokens(length, seed=length)) for length in (30, 7, 18)]
    try:
        request = lab.request(lab.create(), [make_datum(row[:-1], row[1:]) for row in sequences], forward_only=True)
        found = logprobs_of(lab.run_one(request))
    finally:
        lab.close()
    reference = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    for row, logprobs in zip(sequences, found, strict=True):
        with torch.no_grad():
            logits = reference(torch.from_numpy(row[None, :-1])).logits[0]
        expected = torch.log_softmax(logits, -1)[torch.arange(len(row) - 1), torch.from_numpy(row[1:])]
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=1e-5)


def test_the_command_lists_it_and_its_server_trains_and_samples_for_the_sdk(
    installed: Path, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(installed))
    monkeypatch.setenv("TINKER_PLUGINS", "nano")
    listed = subprocess.run(
        [str(Path(sys.executable).parent / "tinker-server"), "plugins"],
        capture_output=True, text=True, check=True, env=dict(os.environ),
    )  # fmt: skip
    assert {
        "name": "nano",
        "distribution": "tinker-backend-nano",
        "version": "0.1.0",
        "hooks": ["tinker_register_trainer"],
    } in json.loads(listed.stdout)
    flags = (
        "--backend",
        "nano",
        "--sampler",
        "colocated",
        "--base-model",
        f"tiny={llama}",
        "--data-dir",
        str(tmp_path),
    )
    sequence = tokens(12, seed=3)
    with run_server(*flags) as url, tinker.ServiceClient(base_url=url, api_key=API_KEY) as service:
        model = service.create_lora_training_client(base_model="tiny", rank=4, seed=1).result()
        before = forward_logprobs(model, sequence)
        train(model, 4, seed=3)
        trained = forward_logprobs(model, sequence)
        assert trained.sum() > 0.8 * before.sum()
        saved = model.save_state("after").result().path
        again = service.create_training_client_from_state_with_optimizer(saved).result()
        sampler = again.save_weights_and_get_sampling_client().result()
        np.testing.assert_array_equal(forward_logprobs(again, sequence), trained)
        np.testing.assert_allclose(sampler_logprobs(sampler, sequence), trained, atol=1e-5)


def test_other_architectures_are_refused_by_name(
    installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(installed))
    from tinker_backend_nano.loading import load_llama

    qwen = write_tiny_model(tmp_path / "qwen", "qwen2")
    with pytest.raises(ConfigurationError, match="model_type 'qwen2'; the backend nano runs 'llama' only"):
        load_llama(str(qwen), torch.float32, torch.device("cpu"))
