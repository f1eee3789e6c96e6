"""Full weights in a real engine, which holds one set at a time, beside samples of the base model and of adapters."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path

import attrs
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE
from tests.vllm.reference import LoneSampler, lone_sampler, prompt_logprobs, reference_logprobs, write_adapter
from tinker_core.errors import CapacityError, CheckpointMismatchError, UnknownCheckpointError
from tinker_core.types import SampleOutput

pytestmark = pytest.mark.slow

CONTEXT = 512
MAX_REVISIONS = 6
PROMPT = np.random.default_rng(4).integers(4, 100, 300).tolist()
WEIGHTS = "model.safetensors"
TOLERANCE = 5e-5
"""Rounding of so long a context; other weights are thousands of times further away."""


@attrs.frozen
class Lab:
    """One engine and what is published to it: by revision, model and adapter."""

    lone: LoneSampler
    directory: Path
    sources: dict[str | None, tuple[Path, Path | None]]

    def check(self, revision: str | None, output: SampleOutput, prompt: list[int] = PROMPT) -> None:
        """Compare with Hugging Face."""
        for sequence in output.sequences:
            expected = reference_logprobs(*self.sources[revision], [*prompt, *sequence.tokens])
            start = len(prompt) - 1
            np.testing.assert_allclose(sequence.logprobs, expected[start:], atol=TOLERANCE, rtol=0)
            if output.prompt_logprobs is not None:
                np.testing.assert_allclose(prompt_logprobs(output), expected[:start], atol=TOLERANCE, rtol=0)

    def check_all(self) -> None:
        """One sample of everything that is published."""
        for revision in self.sources:
            self.check(revision, self.lone.sample(revision, PROMPT, prompt_logprobs=True))

    def model(self, seed: int) -> Path:
        """A model of the same architecture with other weights."""
        name = self.directory / f"model-{seed}"
        return write_tiny_model(name, tie=True, hidden_size=HIDDEN_SIZE, max_context=CONTEXT, seed=seed)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    directory = tmp_path_factory.mktemp("full")
    sources: dict[str | None, tuple[Path, Path | None]] = {}
    made = Lab(None, directory, sources)  # type: ignore[arg-type]
    base = made.model(0)
    adapter = write_adapter(base, directory / "adapter", rank=4, seed=1)
    with lone_sampler(base, max_context=CONTEXT, max_revisions=MAX_REVISIONS) as lone:
        sources[None], sources["adapter"] = (base, None), (base, adapter)
        lone.publish("adapter", adapter)
        for revision, seed in (("first", 5), ("second", 6)):
            sources[revision] = made.model(seed), None
            lone.publish(revision, sources[revision][0])
        yield attrs.evolve(made, lone=lone)


def test_samples_of_all_weights_at_once_get_each_their_own(lab):
    order = [*lab.sources] * 5
    started = [
        lab.lone.start(revision, PROMPT[place : place + 30], seed=place, num_samples=2, prompt_logprobs=place % 2 == 0)
        for place, revision in enumerate(order)
    ]
    for place, (revision, future) in enumerate(zip(order, started, strict=True)):
        lab.check(revision, future.result(timeout=120), PROMPT[place : place + 30])


def test_a_stream_of_samples_of_other_weights_starves_nobody(lab):
    ended, served = threading.Event(), []

    def stream(revision: str | None) -> None:
        while not ended.is_set():
            served.append(lab.lone.sample(revision, PROMPT[:20]))

    threads = [threading.Thread(target=stream, args=(revision,)) for revision in (None, None, "adapter", "adapter")]
    for thread in threads:
        thread.start()
    try:
        for revision in ("first", "second", "first"):
            lab.check(revision, lab.lone.sample(revision, PROMPT[:20]), PROMPT[:20])
    finally:
        ended.set()
        for thread in threads:
            thread.join(timeout=120)
    assert served


def test_the_cache_of_other_weights_is_never_used(lab):
    for revision in (None, "first", None, "second"):
        lab.lone.sample("adapter" if revision else "first", PROMPT)  # others are in
        fresh = lab.lone.sample(revision, PROMPT)
        assert fresh.prompt_cache_hit_tokens == 0
        repeated = lab.lone.sample(revision, PROMPT)
        assert repeated.prompt_cache_hit_tokens >= 256
        lab.check(revision, fresh)
        lab.check(revision, repeated)


def wait_until_waiting(lab: Lab, request_id: str, running: Future[SampleOutput]) -> None:
    """Return when the engine knows a sample that cannot begin as long as another runs."""
    while not lab.lone.is_waiting(request_id):
        assert not running.done()


def test_a_sample_waits_for_its_weights_and_says_so_and_can_be_given_up(lab):
    running = lab.lone.start("first", PROMPT[:8], max_tokens=400)
    waiting = lab.lone.request("second", PROMPT[:8])
    given_up = lab.lone.begin(waiting)
    behind = lab.lone.start("adapter", PROMPT[:8])
    wait_until_waiting(lab, waiting.request_id, running)
    given_up.cancel()
    with pytest.raises(CancelledError):
        given_up.result(timeout=60)
    lab.check("adapter", behind.result(timeout=120), PROMPT[:8])
    assert len(running.result(timeout=120).sequences[0].tokens) == 400
    lab.check_all()


def test_retired_weights_serve_who_waits_for_them_and_nobody_after(lab):
    sources = lab.sources | {"short-lived": (lab.model(7), None)}
    here = attrs.evolve(lab, sources=sources)
    lab.lone.publish("short-lived", sources["short-lived"][0])
    running = lab.lone.start("first", PROMPT[:8], max_tokens=400)
    request = lab.lone.request("short-lived", PROMPT)
    waiting = lab.lone.begin(request)
    wait_until_waiting(lab, request.request_id, running)
    lab.lone.retire("short-lived")  # its files are removed
    here.check("short-lived", waiting.result(timeout=120))
    running.result(timeout=120)
    with pytest.raises(UnknownCheckpointError):
        lab.lone.sample("short-lived", PROMPT)
    lab.check_all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_files_in_another_precision_and_in_shards_are_converted(lab, dtype):
    import torch
    from transformers import AutoModelForCausalLM

    directory = lab.directory / dtype
    model = AutoModelForCausalLM.from_pretrained(lab.model(8), dtype=getattr(torch, dtype))
    model.save_pretrained(directory, max_shard_size="300KB")
    assert len(list(directory.glob("*.safetensors"))) > 1
    lab.lone.publish(dtype, directory)
    try:
        here = attrs.evolve(lab, sources=lab.sources | {dtype: (directory, None)})
        here.check(dtype, lab.lone.sample(dtype, PROMPT, prompt_logprobs=True))
    finally:
        lab.lone.retire(dtype)


def altered(lab: Lab, name: str, alter) -> Path:
    directory = lab.model(9)
    target = lab.directory / name
    target.mkdir()
    contents = load_file(directory / WEIGHTS)
    alter(contents)
    save_file(contents, target / WEIGHTS)
    return target


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        ("less", lambda tensors: tensors.pop("model.norm.weight"), r"lack model\.norm\.weight"),
        ("more", lambda tensors: tensors.update(extra=np.zeros(3, np.float32)), "have extra besides"),
        ("flat", lambda tensors: tensors.update({"model.norm.weight": np.zeros(3, np.float32)}), r"has shape \[3\]"),
        (
            "untied",
            lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}),
            "is not the embedding",
        ),
    ],
)
def test_weights_of_another_model_are_refused_and_change_nothing(lab, name, alter, message):
    lab.lone.sample("first", PROMPT[:8])
    with pytest.raises(CheckpointMismatchError, match=message):
        lab.lone.publish(name, altered(lab, name, alter))
    with pytest.raises(UnknownCheckpointError):
        lab.lone.sample(name, PROMPT[:8])
    lab.check_all()
    assert [keeper.num_losses for keeper in lab.lone.sampler._keepers] == [0]


def test_an_empty_directory_is_refused(lab):
    (lab.directory / "empty").mkdir()
    with pytest.raises(CheckpointMismatchError, match="holds no"):
        lab.lone.publish("empty", lab.directory / "empty")


def test_full_revisions_count_among_all(lab):
    adapter = lab.sources["adapter"][1]
    extra = [f"extra-{number}" for number in range(MAX_REVISIONS - len(lab.sources) + 1)]
    try:
        for revision in extra:
            lab.lone.publish(revision, adapter)
        with pytest.raises(CapacityError, match=f"holds {MAX_REVISIONS} revisions"):
            lab.lone.publish("too-many", lab.model(10))
    finally:
        for revision in extra:
            lab.lone.retire(revision)


def test_a_change_that_fails_half_way_is_served_to_nobody(lab):
    lab.lone.publish("broken", lab.model(11))
    file = lab.lone.sampler._weights.directory("broken") / WEIGHTS
    os.truncate(file, file.stat().st_size // 2)  # the worker dies as it reads on
    doomed = lab.lone.start("broken", PROMPT)
    others = {revision: lab.lone.start(revision, PROMPT, seed=3) for revision in lab.sources}
    with pytest.raises(CheckpointMismatchError, match="cannot be read"):
        doomed.result(timeout=180)
    for revision, future in others.items():
        lab.check(revision, future.result(timeout=180))
    assert [keeper.num_losses for keeper in lab.lone.sampler._keepers] == [1]
    lab.lone.retire("broken")
    lab.check_all()
