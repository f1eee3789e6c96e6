"""The questions of `test_upstream_bugs` to a bare engine: where one fails, vLLM is mended and our fix may go."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.vllm.reference import LONG_PROMPT, reference_logprobs, rename_tensors, write_adapter, write_models

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `stock_engine` was told and what it answered."""
    from tinker_sampler_vllm.engine.environment import engine_environment
    from tinker_sampler_vllm.engine.in_vllm import ENGINE_VARIABLE

    pytest.importorskip("vllm", reason="vLLM is not installed")
    directory = tmp_path_factory.mktemp("stock")
    model, other, adapters = write_models(directory, tie=True)
    deeper = write_adapter(model, directory / "deeper", rank=4, seed=3)
    rename_tensors(deeper, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj")
    names = [None, *map(str, adapters)]
    reading, writing = os.pipe()
    told = {
        "model": str(model),
        "other": str(other),
        "adapters": names[1:],
        "deeper": str(deeper),
        "copy": str(directory / "copy"),
        "mixed": [(LONG_PROMPT[place : place + 20], name) for place, name in enumerate(names * 2)],
        "long": LONG_PROMPT,
        "answer_fd": writing,
    }
    environment = engine_environment("cpu", os.environ)
    del environment[ENGINE_VARIABLE]  # then our plugin leaves vLLM alone
    try:
        done = subprocess.run(
            [sys.executable, "-m", "tests.vllm.stock_engine"],
            input=json.dumps(told), text=True, env=environment, pass_fds=(writing,), timeout=280, check=False,
        )  # fmt: skip
    finally:
        os.close(writing)
    with os.fdopen(reading) as pipe:
        answers = pipe.read()
    assert answers, f"the bare engine ended with exit code {done.returncode}"
    return told, json.loads(answers)


def error(answer: dict[str, Any], prompt: list[int], model: str, adapter: str | None = None) -> float:
    """Greatest difference of its logprobs from Hugging Face."""
    own = reference_logprobs(Path(model), None if adapter is None else Path(adapter), [*prompt, *answer["tokens"]])
    return float(np.abs(own[-len(answer["logprobs"]) :] - answer["logprobs"]).max())


def test_rows_without_adapter_get_one(stock):
    told, answers = stock
    errors = [
        (adapter, error(answer, prompt, told["model"], adapter))
        for (prompt, adapter), answer in zip(told["mixed"], answers["mixed"], strict=True)
    ]
    assert min(error for adapter, error in errors if adapter is None) > 100 * TOLERANCE
    assert max(error for adapter, error in errors if adapter is not None) < TOLERANCE


def test_prompt_logprobs_with_adapters_on_the_head_end_the_engine(stock):
    assert stock[1]["dies_of_prompts"]


def test_weights_loaded_in_place_are_served_the_old_cache(stock):
    told, answers = stock
    assert error(answers["in_place"][0], told["long"], told["model"], told["adapters"][1]) > 100 * TOLERANCE


def test_a_tied_head_stays_what_it_was_when_weights_are_reloaded(stock):
    told, answers = stock
    assert error(answers["reloaded"][0], told["long"], told["other"]) > 100 * TOLERANCE


def test_an_adapter_that_is_not_there_ends_the_engine(stock):
    assert stock[1]["dies_of_missing"]


def test_seeded_prompts_that_are_computed_in_parts_end_the_engine(stock):
    assert stock[1]["dies_of_parts"]


def test_modules_that_are_not_there_are_passed_over(stock):
    assert stock[1]["unknown_module"]


def test_temperatures_are_lifted_or_refused(stock):
    assert stock[1]["temperatures"] == [0.01, None]
