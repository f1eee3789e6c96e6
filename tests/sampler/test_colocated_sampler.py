"""What is special to the colocated sampler: text stops, shared prompts, and references outside our own code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.models import EOS_ID, write_tiny_model
from tinker_core.errors import InvalidRequestError
from tinker_core.executors.build import build_rank, rank_context
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.sampling.colocated.revisions import Revisions
from tinker_core.sampling.colocated.sampler import ColocatedSampler
from tinker_core.training.adapters import AdapterLayout, AdapterWeights, LinearSpec
from tinker_core.types import (
    BaseModelSpec,
    LoraConfig,
    ModelInput,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplingParams,
    StopCondition,
    StopReason,
)

NEVER = StopCondition(at_eos=False)
PROMPT = [5, 9, 14, 22, 31, 7, 40, 12]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


class Rank:
    """One rank in this process, with every forward's number of tokens written down."""

    def __init__(self, path: Path, **settings: Any) -> None:
        spec = WorkerGroupSpec(
            base_model=BaseModelSpec(name="tiny", path=str(path)),
            trainer="fsdp",
            sampler="colocated",
            plugins=("core", "fsdp"),
            num_ranks=1,
            device="cpu",
            dtype="float32",
            **settings,
        )
        trainer, sampler = build_rank(spec, rank_context(spec, 0, ""))
        assert isinstance(sampler, ColocatedSampler)
        self.sampler = sampler
        self.forwards: list[int] = []
        handle = trainer.model_handle()
        assert handle is not None
        self.handle = handle
        handle.model.register_forward_pre_hook(lambda module, args: self.forwards.append(args[0].shape[1]))

    def submit(
        self,
        request_id: str,
        prompt: list[int] = PROMPT,
        num_samples: int = 1,
        revision: str | None = None,
        **params: Any,
    ) -> None:
        params = {"max_tokens": 8, "seed": 1, "stop": NEVER, **params}
        request = SampleInput(
            sampling_session_id="s",
            seq_id=0,
            prompt=ModelInput.from_ints(prompt),
            num_samples=num_samples,
            sampling_params=SamplingParams(**params),
        )
        self.sampler.submit(PreparedSample(request_id=request_id, revision=revision, request=request))

    def run(self) -> dict[str, SampleOutput]:
        outputs = {}
        while self.sampler.has_work:
            for result in self.sampler.step():
                assert result.output is not None, result.error
                outputs[result.request_id] = result.output
        return outputs


@pytest.fixture
def rank(model_path: Path) -> Rank:
    return Rank(model_path)


def test_greedy_decoding_equals_generate(model_path: Path, rank: Rank) -> None:
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval()
    prompts = [PROMPT, PROMPT[:3], [60, 61, 62, 63, 64], [50]]
    for index, prompt in enumerate(prompts):
        rank.submit(str(index), prompt, temperature=0.0, max_tokens=12)
    outputs = rank.run()
    for index, prompt in enumerate(prompts):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
        assert list(outputs[str(index)].sequences[0].tokens) == expected[0, len(prompt) :].tolist()


def test_a_prompt_shared_by_several_samples_is_computed_once(rank: Rank) -> None:
    rank.submit("a", num_samples=5, max_tokens=4)
    rank.run()
    # The prompt, then three more tokens of each sequence; the fourth token needs no forward.
    assert rank.forwards == [len(PROMPT), 5, 5, 5]


def test_a_long_prompt_is_computed_in_chunks_beside_running_sequences(model_path: Path) -> None:
    rank = Rank(model_path, micro_batch_tokens=16)
    rank.submit("short", PROMPT[:2], max_tokens=20)
    rank.sampler.step()
    rank.submit("long", list(range(4, 68)), max_tokens=2)
    outputs = rank.run()
    assert max(rank.forwards) <= 16
    assert len(outputs["short"].sequences[0].tokens) == 20
    alone = Rank(model_path)
    alone.submit("long", list(range(4, 68)), max_tokens=2)
    expected = alone.run()["long"].sequences[0]
    assert expected.tokens == outputs["long"].sequences[0].tokens
    np.testing.assert_allclose(expected.logprobs, outputs["long"].sequences[0].logprobs, atol=1e-5)


def test_requests_are_admitted_and_complete_one_by_one(model_path: Path) -> None:
    rank = Rank(model_path, max_decode_batch=2)
    for name, length in (("a", 6), ("b", 2), ("c", 3)):
        rank.submit(name, max_tokens=length, seed=length)
    order = []
    while rank.sampler.has_work:
        order += [result.request_id for result in rank.sampler.step()]
    assert order[0] == "b"
    assert sorted(order) == ["a", "b", "c"]
    assert max(rank.forwards[2:]) <= 2 + len(PROMPT)


def test_a_text_stop_is_found_across_token_borders_and_kept(model_path: Path, rank: Rank) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    rank.submit("free", max_tokens=24)
    free = rank.run()["free"].sequences[0]
    text = tokenizer.decode(free.tokens)
    stop = text[6:9]  # three tokens of one character each
    end = text.index(stop) + len(stop)
    rank.submit("stopped", max_tokens=24, stop=StopCondition(at_eos=False, texts=("never seen", stop)))
    stopped = rank.run()["stopped"].sequences[0]
    assert stopped.stop_reason is StopReason.STOP
    assert stopped.tokens == free.tokens[: len(stopped.tokens)]
    assert tokenizer.decode(stopped.tokens) == text[:end]


def test_an_explicit_stop_replaces_the_end_of_sequence_rule(rank: Rank) -> None:
    conditions = {"default": StopCondition(), "text": StopCondition(at_eos=False, texts=("never seen",)), "none": NEVER}
    for name, stop in conditions.items():
        rank.submit(name, num_samples=64, max_tokens=24, temperature=4.0, stop=stop)
    outputs = rank.run()
    ended = [s for s in outputs["default"].sequences if s.stop_reason is StopReason.STOP]
    assert ended
    assert all(s.tokens[-1] == EOS_ID for s in ended)
    for name in ("text", "none"):
        assert any(EOS_ID in s.tokens[:-1] for s in outputs[name].sequences)


def test_a_text_stop_without_a_tokenizer_is_refused_with_the_alternative(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "bare", "llama")
    for file in path.glob("*token*"):
        file.unlink()
    rank = Rank(path)
    rank.submit("a", stop=StopCondition(at_eos=False, texts=("x",)))
    (result,) = rank.sampler.step()
    assert result.error is not None
    assert result.error.code == InvalidRequestError.__name__ or result.error.category == "user"
    assert "token" in result.error.message


def test_cancelled_and_finished_sequences_leave_nothing_behind(rank: Rank) -> None:
    for index in range(4):
        rank.submit(str(index), num_samples=4, max_tokens=50, seed=index)
    for _ in range(3):
        rank.sampler.step()
    for index in range(4):
        rank.sampler.cancel(str(index))
    rank.sampler.cancel("unknown")
    assert not rank.sampler.has_work
    assert rank.sampler.step() == ()


def test_sequences_that_outgrow_their_cache_agree_with_a_forward_over_the_whole_text(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "long", "llama", max_context=700)
    rank = Rank(path)
    prompts = [PROMPT, list(range(4, 100)) * 3, PROMPT[:2]]
    for index, prompt in enumerate(prompts):
        rank.submit(str(index), prompt, max_tokens=None if index == 0 else 300, seed=index)
    outputs = rank.run()
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    for index, prompt in enumerate(prompts):
        sequence = outputs[str(index)].sequences[0]
        text = torch.tensor([[*prompt, *sequence.tokens]])
        with torch.no_grad():
            logprobs = model(text).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        expected = logprobs.gather(1, torch.tensor(sequence.tokens)[:, None])[:, 0]
        np.testing.assert_allclose(sequence.logprobs, expected.numpy(), atol=1e-5)
    assert len(PROMPT) + len(outputs["0"].sequences[0].tokens) == 700


def test_weights_that_have_diverged_fail_their_own_samples_only(model_path: Path, rank: Rank) -> None:
    class BrokenAdapter(Revisions):
        def weights(self, revision: str | None) -> AdapterWeights | None:
            if revision is None:
                return None
            row = torch.full((layout.size,), float("nan"))
            return AdapterWeights(layout, row)

    layout = AdapterLayout(
        (LinearSpec(name="model.layers.0.self_attn.v_proj", in_features=32, out_features=16),), LoraConfig(rank=2)
    )
    rank.submit("alone", max_tokens=10)
    expected = rank.run()["alone"].sequences[0]
    rank.sampler._revisions = BrokenAdapter(rank.handle, 1)
    rank.submit("healthy", max_tokens=10)
    rank.submit("broken", revision="nan")
    results = {}
    while rank.sampler.has_work:
        results.update({result.request_id: result for result in rank.sampler.step()})
    assert results["broken"].error is not None
    assert results["broken"].error.code == "NonFiniteError"
    healthy = results["healthy"].output
    assert healthy is not None
    assert healthy.sequences[0].tokens == expected.tokens


def test_a_cancelled_sample_leaves_its_slot_to_the_next(model_path: Path) -> None:
    rank = Rank(model_path, max_decode_batch=1)
    rank.submit("alone")
    expected = rank.run()["alone"].sequences
    for name in ("first", "second", "third"):
        rank.submit(name, seed=1 if name == "third" else 5)
    rank.sampler.step()
    sampler = rank.sampler
    assert [sampler.is_waiting(name) for name in ("first", "second", "third", "unknown")] == [False, True, True, False]
    sampler.cancel("second")  # in the queue: it never begins
    sampler.cancel("first")  # running: its slot is free in the very next step
    sampler.step()
    assert not sampler.is_waiting("third")
    outputs = rank.run()
    assert outputs.keys() == {"third"}
    assert outputs["third"].sequences == expected  # nothing of its predecessor is left in the slot
