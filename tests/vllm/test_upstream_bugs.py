"""What vLLM 0.32 gets wrong and we mend, in numbers of transformers and PEFT.

`test_stock_vllm` shows what happens without our fixes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import numpy as np
import pytest

from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE
from tests.vllm.reference import (
    CONTEXT,
    LONG_PROMPT,
    RANKS,
    LoneSampler,
    lone_sampler,
    prompt_logprobs,
    reference_table,
    rename_tensors,
    write_adapter,
    write_models,
)
from tinker_core.errors import CheckpointMismatchError, StorageError
from tinker_core.types import SampleOutput, TensorData

TOLERANCE = 1e-5
STEP_TOKENS = 2048
"""vLLM computes no more of all prompts at once."""
LORA_SLOTS = 4
_RANDOM = np.random.default_rng(12)


@attrs.frozen
class Lab:
    """One engine, its model, and an adapter for each of its slots."""

    lone: LoneSampler
    directory: Path
    model: Path
    other_model: Path
    adapters: dict[str | None, Path | None]
    """By revision; None is the base model."""

    def check(
        self, revision: str | None, prompt: list[int], output: SampleOutput, tolerance: float = TOLERANCE
    ) -> None:
        """Compare everything that an output says with Hugging Face."""
        model, adapter = (self.other_model, None) if revision == "full" else (self.model, self.adapters[revision])
        for sequence in output.sequences:
            tokens = [*prompt, *sequence.tokens]
            table = reference_table(model, adapter, tokens)
            own = table[np.arange(len(tokens) - 1), tokens[1:]]
            start = len(prompt) - 1
            np.testing.assert_allclose(sequence.logprobs, own[start:], atol=tolerance, rtol=0)
            if output.prompt_logprobs is not None:
                np.testing.assert_allclose(prompt_logprobs(output), own[:start], atol=tolerance, rtol=0)
            for rows, found in (
                (table[:start], output.topk_prompt_logprobs),
                (table[start:-1], sequence.topk_logprobs),
            ):
                if found is not None:
                    k = found.logprobs.shape[1]
                    values = found.logprobs.data.reshape(-1, k)[-len(rows) :]
                    np.testing.assert_allclose(values, -np.sort(-rows, axis=1)[:, :k], atol=tolerance, rtol=0)

    def still_serves(self) -> None:
        """Base and adapters, from the engine that was there all the time."""
        for revision in (None, "rank-2", "rank-16"):
            self.check(revision, LONG_PROMPT[:20], self.lone.sample(revision, LONG_PROMPT[:20]))
        assert [keeper.num_losses for keeper in self.lone.sampler._keepers] == [0]


@pytest.fixture(
    scope="module", params=[pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.slow)]
)
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    directory = tmp_path_factory.mktemp("upstream")
    model, other, adapters = write_models(directory, tie=request.param)
    with lone_sampler(model, max_context=CONTEXT, options={"vllm-lora-slots": LORA_SLOTS}) as lone:
        for adapter in adapters:
            lone.publish(adapter.name, adapter)
        yield Lab(lone, directory, model, other, {None: None} | {adapter.name: adapter for adapter in adapters})


# --- rows of a batch (bugs 1 and 5) -----------------------------------------------------------------------------------


def test_base_and_four_adapters_in_mixed_batches_equal_hugging_face_with_every_slot_filled(lab):
    revisions = [None, *(f"rank-{rank}" for rank in RANKS)]
    for turn in range(len(revisions)):
        order = [*revisions[turn:], *revisions[:turn]] * 2
        prompts = [LONG_PROMPT[place : place + 6 + 5 * place] for place in range(len(order))]
        started = [
            lab.lone.start(revision, prompt, max_tokens=12, topk_sample_logprobs=3)
            for revision, prompt in zip(order, prompts, strict=True)
        ]
        for revision, prompt, future in zip(order, prompts, started, strict=True):
            lab.check(revision, prompt, future.result(timeout=120))


def test_questions_about_prompts_in_mixed_batches_use_each_ones_own_head(lab):
    order = [None, "rank-16", "rank-2", None, "rank-8", "rank-4", "rank-16"]
    prompts = [LONG_PROMPT[place : place + 40 - 5 * place] for place in range(len(order))]
    wanted = [np.asarray(prompt[:0:-1], np.int64)[:, None] for prompt in prompts]
    started = [
        lab.lone.start(
            revision,
            prompt,
            num_samples=2,
            prompt_logprobs=True,
            topk_prompt_logprobs=4,
            target_prompt_logprobs=TensorData.from_numpy(targets),
        )
        for revision, prompt, targets in zip(order, prompts, wanted, strict=True)
    ]
    for revision, prompt, targets, future in zip(order, prompts, wanted, started, strict=True):
        output = future.result(timeout=120)
        lab.check(revision, prompt, output)
        table = reference_table(lab.model, lab.adapters[revision], prompt)
        expected = table[np.arange(len(prompt) - 1), targets[:, 0]]
        found = output.target_prompt_logprobs.data.reshape(-1)
        np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)


def test_more_revisions_than_slots_take_turns(lab):
    extra = {}
    for number, targets in enumerate((("q_proj", "o_proj"), ("gate_proj", "lm_head"))):
        name = f"extra-{number}"
        extra[name] = write_adapter(lab.model, lab.directory / name, rank=3, seed=50 + number, targets=targets)
        lab.lone.publish(name, extra[name])
    try:
        more = attrs.evolve(lab, adapters=lab.adapters | extra)
        order = list(more.adapters) * 3
        started = [lab.lone.start(revision, LONG_PROMPT[:30], max_tokens=6) for revision in order]
        for revision, future in zip(order, started, strict=True):
            more.check(revision, LONG_PROMPT[:30], future.result(timeout=120))
    finally:
        for name in extra:
            lab.lone.retire(name)


# --- the prefix cache (bug 2) -----------------------------------------------------------------------------------------


def test_no_revision_is_served_what_the_cache_holds_of_another(lab):
    first, second = (
        write_adapter(lab.model, lab.directory / f"cached-{seed}", rank=4, seed=seed, targets=["k_proj", "v_proj"])
        for seed in (70, 71)
    )
    served = attrs.evolve(lab, adapters=lab.adapters | {"cached": first, "newer": second})
    lab.lone.publish("cached", first)
    assert lab.lone.sample("cached", LONG_PROMPT).prompt_cache_hit_tokens == 0
    repeated = lab.lone.sample("cached", LONG_PROMPT)
    assert repeated.prompt_cache_hit_tokens >= 256
    served.check("cached", LONG_PROMPT, repeated)

    lab.lone.publish("newer", second)
    newer = lab.lone.sample("newer", LONG_PROMPT)
    assert newer.prompt_cache_hit_tokens == 0
    served.check("newer", LONG_PROMPT, newer)

    lab.lone.retire("cached")
    lab.lone.publish("cached", second)  # a name may come again when it was forgotten
    again = lab.lone.sample("cached", LONG_PROMPT)
    assert again.prompt_cache_hit_tokens == 0
    served.check("newer", LONG_PROMPT, again)
    for revision in ("cached", "newer"):
        lab.lone.retire(revision)


# --- weights that cannot be served (bug 3) ----------------------------------------------------------------------------


def altered(lab: Lab, name: str, alter) -> Path:
    """A copy of an adapter with other contents."""
    directory = lab.directory / name
    shutil.copytree(lab.adapters["rank-4"], directory, dirs_exist_ok=True)
    alter(directory)
    return directory


def _truncate(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _claim_rank(directory: Path, rank: int) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": rank}))


@pytest.mark.parametrize(
    ("name", "alter", "message"),
    [
        (
            "deeper",
            lambda d: rename_tensors(d, "layers.1.mlp.up_proj", "layers.7.mlp.up_proj"),
            r"layers\.7\.mlp\.up_proj",
        ),
        ("normed", lambda d: rename_tensors(d, "layers.1.mlp.up_proj", "layers.1.input_layernorm"), "input_layernorm"),
        ("half", lambda d: rename_tensors(d, "q_proj.lora_B", "q_proj.lora_C"), "do not fit together"),
        ("truncated", _truncate, "cannot be read"),
        ("empty", lambda d: (d / "adapter_model.safetensors").unlink(), "cannot be read"),
        ("claims", lambda d: _claim_rank(d, 64), "rank 64"),
        ("garbled", lambda d: (d / "adapter_config.json").write_text("{"), "JSON"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused_by_name_and_the_engine_lives_on(lab, name, alter, message):
    with pytest.raises(CheckpointMismatchError, match=message):
        lab.lone.publish(name, altered(lab, name, alter))
    lab.still_serves()


def test_adapters_of_too_high_rank_or_of_another_model_are_refused_and_the_engine_lives_on(lab):
    high = write_adapter(lab.model, lab.directory / "high", rank=32, seed=1)
    small = write_tiny_model(lab.directory / "small", tie=True)
    narrow = write_adapter(small, lab.directory / "narrow", rank=4, seed=1)
    for directory, message in ((high, "rank 32"), (narrow, "for another model")):
        with pytest.raises(CheckpointMismatchError, match=message):
            lab.lone.publish(directory.name, directory)
    with pytest.raises(StorageError, match="nowhere"):
        lab.lone.publish("nowhere", lab.directory / "nowhere")
    lab.still_serves()


# --- full weights (bug 4) ---------------------------------------------------------------------------------------------


def test_full_weights_and_what_was_there_before_equal_hugging_face(lab):
    lab.lone.publish("full", lab.other_model)
    try:
        for _ in range(2):
            output = lab.lone.sample("full", LONG_PROMPT, prompt_logprobs=True)
            lab.check("full", LONG_PROMPT, output)
            for revision in lab.adapters:
                lab.check(revision, LONG_PROMPT, lab.lone.sample(revision, LONG_PROMPT, prompt_logprobs=True))
    finally:
        lab.lone.retire("full")
    lab.still_serves()


# --- drawing ----------------------------------------------------------------------------------------------------------


def drawn_tokens(lab: Lab, prompt: list[int], temperature: float, number: int) -> np.ndarray:
    """First tokens of many sequences."""
    output = lab.lone.sample(None, prompt, temperature=temperature, max_tokens=1, num_samples=number)
    return np.array([sequence.tokens[0] for sequence in output.sequences])


def test_a_high_temperature_is_honoured(lab):
    number = 800
    table = reference_table(lab.model, None, LONG_PROMPT[:12])[-1].astype(np.float64)
    found = table[drawn_tokens(lab, LONG_PROMPT[:12], 3.0, number)].mean()

    def expected(temperature: float) -> tuple[float, float]:
        """Mean of the drawn tokens' logprobs, and the error of a mean of so many."""
        weights = np.exp(table / temperature)
        weights /= weights.sum()
        mean = weights @ table
        return mean, np.sqrt(weights @ (table - mean) ** 2 / number)

    mean, error = expected(3.0)
    assert abs(found - mean) < 4 * error
    assert abs(found - expected(2.0)[0]) > 4 * error  # vLLM takes none above 2


def test_a_low_temperature_is_honoured(lab):
    number = 400
    prompt, gap = close_call(lab)
    likely = np.argsort(-reference_table(lab.model, None, prompt)[-1])[:2]
    tokens = drawn_tokens(lab, prompt, 0.005, number)
    assert set(tokens) == set(likely)
    share = (tokens == likely[1]).mean()
    expected, lifted = (1 / (1 + np.exp(gap / temperature)) for temperature in (0.005, 0.01))
    error = np.sqrt(expected * (1 - expected) / number)
    assert abs(share - expected) < 3 * error
    assert abs(share - lifted) > 3 * error  # vLLM lifts those below 0.01 to it


def close_call(lab: Lab) -> tuple[list[int], float]:
    """A prompt after which two tokens are nearly equally likely, and how far apart they are."""
    random = np.random.default_rng(3)
    for _ in range(100):
        prompt = random.integers(4, 100, 200).tolist()
        best = -np.sort(-reference_table(lab.model, None, prompt), axis=1)[:, :3].astype(np.float64)
        gaps = best[:, 0] - best[:, 1]
        close = np.flatnonzero((gaps > 0.006) & (gaps < 0.009) & (best[:, 1] - best[:, 2] > 0.1))
        if close.size:
            return prompt[: close[0] + 1], float(gaps[close[0]])
    raise AssertionError("no such prompt")


@pytest.mark.parametrize("seed", [-1, 0, 2**63 - 1, -(2**63)])
def test_every_seed_works_and_repeats(lab, seed):
    first, second = (lab.lone.sample("rank-4", LONG_PROMPT[:9], seed=seed, num_samples=3) for _ in range(2))
    assert [sequence.tokens for sequence in first.sequences] == [sequence.tokens for sequence in second.sequences]
    assert len({sequence.tokens for sequence in first.sequences}) == 3
    lab.check("rank-4", LONG_PROMPT[:9], first)


def test_prompts_that_are_computed_in_parts_get_the_same_answers_and_draws(lab):
    prompts = [_RANDOM.integers(4, 100, 490).tolist() for _ in range(2)] * 8
    assert sum(map(len, prompts)) > 3 * STEP_TOKENS
    alone = [lab.lone.sample("rank-4", prompt, seed=5, prompt_logprobs=True) for prompt in prompts[:2]] * 8
    started = [lab.lone.start("rank-4", prompt, seed=5, prompt_logprobs=True) for prompt in prompts]
    for prompt, expected, future in zip(prompts, alone, started, strict=True):
        output = future.result(timeout=120)
        lab.check("rank-4", prompt, output, 3 * TOLERANCE)  # so long a context adds up more rounding
        assert output.sequences[0].tokens == expected.sequences[0].tokens
    lab.still_serves()


def test_neighbouring_and_extreme_seeds_differ(lab):
    drawn = [
        lab.lone.sample(None, LONG_PROMPT[:9], seed=seed, num_samples=2).sequences
        for seed in (-1, 0, 1, 2**63 - 1, -(2**63))
    ]
    assert len({sequence.tokens for sequences in drawn for sequence in sequences}) == 10


@pytest.mark.slow
def test_the_head_of_a_model_that_does_not_offer_it_is_adapted(tmp_path):
    model = write_tiny_model(tmp_path / "model", "qwen2", tie=True, hidden_size=HIDDEN_SIZE)
    adapter = write_adapter(model, tmp_path / "adapter", rank=4, seed=1)
    with lone_sampler(model, max_context=128) as lone:
        assert "lm_head" in lone.sampler.capabilities().lora_targets
        lone.publish("adapter", adapter)
        lab = Lab(lone, tmp_path, model, model, {None: None, "adapter": adapter})
        for revision in lab.adapters:
            lab.check(revision, LONG_PROMPT[:20], lone.sample(revision, LONG_PROMPT[:20], prompt_logprobs=True))
