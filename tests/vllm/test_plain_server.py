"""A stock vLLM server behind the sampler: its answers against the Hugging Face model, and what it is not asked for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tinker

from tests.e2e.conftest import API_KEY, forward_logprobs, run_server, sampler_logprobs, train
from tests.models import EOS_ID, write_tiny_model
from tests.vllm.plain_server import KEY, MAX_CONTEXT, MAX_LOGPROBS, PlainVllm
from tests.vllm.reference import LoneSampler, lone_sampler, prompt_logprobs, reference_logprobs, reference_table
from tinker_core.errors import ConfigurationError, InvalidRequestError, UnsupportedFeatureError
from tinker_core.sampling.stopping import load_decoder
from tinker_core.types import BaseModelSpec, SampleOutput, StopCondition, StopReason, TensorData
from tinker_sampler_vllm.links.plain_server import PlainServer

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
PROMPT = [5, 9, 14, 22, 31, 7, 40, 12]
NEVER = StopCondition(at_eos=False)
GREEDY_EOS = 4
"""Place of the greedy token of `PROMPT` that the model's generation_config.json calls an end of sequence."""


def greedy_tokens(model: Path, count: int) -> list[int]:
    """What follows `PROMPT` when the likeliest token always does."""
    tokens = list(PROMPT)
    for _ in range(count):
        tokens.append(int(reference_table(model, None, tokens)[-1].argmax()))
    return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose files recommend much that nobody asked for."""
    path = write_tiny_model(tmp_path_factory.mktemp("plain") / "model", hidden_size=128)
    ends = [EOS_ID, greedy_tokens(path, 8)[GREEDY_EOS]]
    wishes = {"eos_token_id": ends, "do_sample": True, "temperature": 0.3, "top_k": 2, "repetition_penalty": 1.8}
    (path / "generation_config.json").write_text(json.dumps(wishes))
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[PlainVllm]:
    server = PlainVllm(model)
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def alone(model: Path, server: PlainVllm) -> Iterator[LoneSampler]:
    options = {"vllm-engines": 0, "vllm-urls": f"other=http://127.0.0.1:1,tiny={server.url}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_API_KEY", KEY)
        with lone_sampler(model, options=options) as alone:
            yield alone


# --- answers ----------------------------------------------------------------------------------------------------------


def test_logprobs_of_prompt_and_samples_are_those_of_hugging_face(alone: LoneSampler, model: Path) -> None:
    output = alone.sample(
        None, PROMPT, num_samples=3, max_tokens=12, temperature=1.4, top_p=0.9, top_k=40, prompt_logprobs=True
    )
    assert np.isnan(output.prompt_logprobs.data[0])
    assert len({sequence.tokens for sequence in output.sequences}) == 3
    for sequence in output.sequences:
        tokens = [*PROMPT, *sequence.tokens]
        expected = reference_logprobs(model, None, tokens)
        start = len(PROMPT) - 1
        assert (sequence.stop_reason, len(sequence.tokens)) == (StopReason.LENGTH, 12)
        np.testing.assert_allclose(prompt_logprobs(output), expected[:start], atol=TOLERANCE)
        np.testing.assert_allclose(sequence.logprobs, expected[start:], atol=TOLERANCE)


def test_the_likeliest_tokens_are_those_of_hugging_face(alone: LoneSampler, model: Path) -> None:
    output = alone.sample(None, PROMPT, seed=5, topk_prompt_logprobs=MAX_LOGPROBS, topk_sample_logprobs=3)
    (sequence,) = output.sequences
    assert sequence.topk_logprobs is not None
    assert output.topk_prompt_logprobs is not None
    assert output.prompt_logprobs is None
    expected = reference_table(model, None, [*PROMPT, *sequence.tokens])
    cases = (
        (output.topk_prompt_logprobs, 1, expected[: len(PROMPT) - 1], MAX_LOGPROBS),
        (sequence.topk_logprobs, 0, expected[len(PROMPT) - 1 : -1], 3),
    )
    for table, first, rows, k in cases:
        ids, logprobs = table.token_ids.to_numpy(), table.logprobs.to_numpy()
        assert ids.shape == (first + len(rows), k)
        order = np.argsort(-rows, axis=-1)[:, :k]
        np.testing.assert_array_equal(ids[first:], order)
        np.testing.assert_allclose(logprobs[first:], np.take_along_axis(rows, order, -1), atol=TOLERANCE)
    assert output.topk_prompt_logprobs.token_ids.to_numpy()[0].tolist() == [0] * MAX_LOGPROBS
    assert (output.topk_prompt_logprobs.logprobs.to_numpy()[0] == -99999.0).all()


def test_only_the_last_prompt_logprobs_are_there_when_only_they_are_asked_for(alone: LoneSampler) -> None:
    whole = alone.sample(None, PROMPT, prompt_logprobs=True, topk_prompt_logprobs=2)
    last = alone.sample(None, PROMPT, prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last_n=3)
    assert last.prompt_logprobs is not None
    assert whole.prompt_logprobs is not None
    assert np.isnan(last.prompt_logprobs.data[:-3]).all()
    np.testing.assert_allclose(last.prompt_logprobs.data[-3:], whole.prompt_logprobs.data[-3:], atol=TOLERANCE)
    assert last.topk_prompt_logprobs is not None
    assert whole.topk_prompt_logprobs is not None
    ids, all_ids = last.topk_prompt_logprobs.token_ids.to_numpy(), whole.topk_prompt_logprobs.token_ids.to_numpy()
    np.testing.assert_array_equal(ids[-3:], all_ids[-3:])
    assert not ids[:-3].any()


def test_recommendations_in_the_files_of_the_model_change_nothing(alone: LoneSampler, model: Path) -> None:
    (greedy,) = alone.sample(None, PROMPT, temperature=0.0, max_tokens=20).sequences
    assert list(greedy.tokens) == greedy_tokens(model, 20)
    firsts = {alone.sample(None, PROMPT, seed=seed, max_tokens=1).sequences[0].tokens for seed in range(30)}
    assert len(firsts) > 2  # a top_k of 2 would leave two


def test_a_sample_may_fill_the_context(alone: LoneSampler) -> None:
    (sequence,) = alone.sample(None, PROMPT, max_tokens=None).sequences
    assert len(sequence.tokens) == MAX_CONTEXT - len(PROMPT)


def test_seeds_decide_and_each_sequence_has_its_own(alone: LoneSampler) -> None:
    first, again, fewer = (alone.sample(None, PROMPT, seed=9, num_samples=n) for n in (4, 4, 2))
    tokens = [sequence.tokens for sequence in first.sequences]
    assert len(set(tokens)) == 4
    assert [sequence.tokens for sequence in again.sequences] == tokens
    assert [sequence.tokens for sequence in fewer.sequences] == tokens[:2]
    assert alone.sample(None, PROMPT, seed=10).sequences[0].tokens not in tokens


# --- ends of sequences ------------------------------------------------------------------------------------------------


def test_end_of_sequence_tokens_are_those_of_the_generation_config(alone: LoneSampler, model: Path) -> None:
    greedy = greedy_tokens(model, 8)
    (ended,) = alone.sample(None, PROMPT, temperature=0.0, stop=StopCondition(at_eos=True)).sequences
    end = greedy.index(greedy[GREEDY_EOS])
    assert (list(ended.tokens), ended.stop_reason) == (greedy[: end + 1], StopReason.STOP)
    (not_ended,) = alone.sample(None, PROMPT, temperature=0.0, stop=NEVER).sequences
    assert (list(not_ended.tokens), not_ended.stop_reason) == (greedy, StopReason.LENGTH)


def test_a_stop_token_is_the_last_of_its_sequence(alone: LoneSampler, model: Path) -> None:
    greedy = greedy_tokens(model, 8)
    (sequence,) = alone.sample(
        None, PROMPT, temperature=0.0, stop=StopCondition(tokens=(greedy[2], EOS_ID), at_eos=False)
    ).sequences
    assert sequence.stop_reason is StopReason.STOP
    assert list(sequence.tokens) == greedy[: greedy.index(greedy[2]) + 1]


def test_a_stop_text_ends_a_sequence_wherever_it_begins(alone: LoneSampler, model: Path) -> None:
    decode = load_decoder(str(model))
    greedy = greedy_tokens(model, 40)
    text = decode(greedy[10:13])
    end = next(count for count in range(len(greedy)) if text in decode(greedy[:count]))
    output = alone.sample(
        None,
        PROMPT,
        temperature=0.0,
        max_tokens=40,
        stop=StopCondition(texts=(text,), at_eos=False),
        prompt_logprobs=True,
        topk_sample_logprobs=1,
    )
    (sequence,) = output.sequences
    assert (list(sequence.tokens), sequence.stop_reason) == (greedy[:end], StopReason.STOP)
    np.testing.assert_allclose(prompt_logprobs(output), reference_logprobs(model, None, PROMPT), atol=TOLERANCE)
    expected = reference_table(model, None, [*PROMPT, *sequence.tokens])
    np.testing.assert_allclose(sequence.logprobs, expected[len(PROMPT) - 1 : -1].max(-1), atol=TOLERANCE)
    assert sequence.topk_logprobs is not None
    assert sequence.topk_logprobs.token_ids.data.tolist() == list(sequence.tokens)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("revision", "fields", "words"),
    [
        ("model/1", {}, "bare base models"),
        (None, {"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        (
            None,
            {"target_prompt_logprobs": TensorData.from_numpy(np.ones((len(PROMPT) - 1, 1), dtype=np.int64))},
            "target_prompt_logprobs",
        ),
        (None, {"temperature": 0.005}, "temperature"),
        (None, {"temperature": 2.5}, "temperature"),
        (None, {"topk_prompt_logprobs": MAX_LOGPROBS + 1}, "topk_prompt_logprobs.*--max-logprobs"),
        (None, {"topk_sample_logprobs": MAX_LOGPROBS + 1}, "topk_sample_logprobs.*--max-logprobs"),
    ],
)
def test_what_the_server_cannot_do_is_refused_by_name(
    alone: LoneSampler, revision: str | None, fields: dict[str, object], words: str
) -> None:
    with pytest.raises(UnsupportedFeatureError, match=rf"{words}.*--vllm-engines"):
        alone.sample(revision, PROMPT, **fields)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"prompt": [1, 4000]}, "4000"), ({"prompt": [5] * MAX_CONTEXT}, "no room"), ({"top_p": 0.0}, "top_p")],
)
def test_bad_requests_are_refused_as_by_all_samplers(alone: LoneSampler, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        alone.sample(None, **{"prompt": PROMPT, **fields})


def test_weights_are_refused_and_the_capabilities_say_so(alone: LoneSampler, tmp_path: Path) -> None:
    capabilities = alone.sampler.capabilities()
    assert capabilities.transports == ()
    assert (capabilities.max_lora_rank, capabilities.lora_targets) == (None, None)  # models may be trained
    assert (capabilities.max_context_length, capabilities.max_topk) == (MAX_CONTEXT, MAX_LOGPROBS)
    with pytest.raises(UnsupportedFeatureError, match="bare base models"):
        alone.publish("model/1", tmp_path)


def test_a_server_of_another_model_or_key_is_refused_at_start(model: Path, server: PlainVllm, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other", hidden_size=128)
    wrong_model = PlainServer(server.url, BaseModelSpec(name="other", path=str(other)), api_key=KEY)
    with pytest.raises(ConfigurationError, match=r"serves 'tiny', not base model 'other'.*--served-model-name other"):
        asyncio.run(wrong_model.connect())
    wrong_key = PlainServer(server.url, BaseModelSpec(name="tiny", path=str(model)), api_key="wrong")
    with pytest.raises(ConfigurationError, match="VLLM_API_KEY"):
        asyncio.run(wrong_key.connect())


# --- the whole server -------------------------------------------------------------------------------------------------


def test_behind_the_server_models_are_trained_and_the_base_model_is_sampled_from(
    model: Path, server: PlainVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    flags = ["--backend", "fsdp", "--sampler", "vllm", "--vllm-engines", "0", "--vllm-urls", server.url]
    expected = reference_logprobs(model, None, PROMPT)
    with (
        run_server("--base-model", f"tiny={model}", "--data-dir", str(tmp_path), *flags) as url,
        tinker.ServiceClient(base_url=url, api_key=API_KEY) as service,
    ):
        base = service.create_sampling_client(base_model="tiny").result()
        np.testing.assert_allclose(sampler_logprobs(base, PROMPT), expected, atol=TOLERANCE)
        client = service.create_lora_training_client("tiny", rank=4).result()
        np.testing.assert_allclose(forward_logprobs(client, PROMPT), expected, atol=TOLERANCE)
        train(client, 1)
        assert client.save_state("trained").result().path
        with pytest.raises(tinker.RequestFailedError, match="bare base models only"):
            client.save_weights_and_get_sampling_client().result()
        named = client.save_weights_for_sampler("named").result().path
        saved = service.create_sampling_client(model_path=named).result()
        with pytest.raises(tinker.RequestFailedError, match="bare base models only"):
            sampler_logprobs(saved, PROMPT)


# --- life -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [NEVER, StopCondition(texts=("never this",), at_eos=False)], ids=["whole", "streamed"])
def test_a_cancelled_sample_ends_at_the_server(alone: LoneSampler, server: PlainVllm, stop: StopCondition) -> None:
    finished = 'vllm:request_success_total{engine="0",finished_reason="length"'
    before = server.metric(finished)
    with server.generating():
        future = alone.start(None, PROMPT, num_samples=200, max_tokens=200, stop=stop)
    future.cancel()
    deadline = time.monotonic() + 60
    while server.metric("vllm:num_requests_running") or server.metric("vllm:num_requests_waiting{"):
        assert time.monotonic() < deadline
    assert server.metric(finished) < before + 200


def test_a_killed_server_costs_only_time(alone: LoneSampler, server: PlainVllm) -> None:
    def start_all() -> list[Future[SampleOutput]]:
        return [alone.start(None, PROMPT, num_samples=32, max_tokens=200, seed=seed) for seed in range(8)]

    before = [future.result(timeout=120) for future in start_all()]
    with server.generating():
        futures = start_all()
    server.kill()
    assert not all(future.done() for future in futures)
    server.start()
    after = [future.result(timeout=120) for future in futures]
    assert [output.sequences for output in after] == [output.sequences for output in before]


@pytest.mark.parametrize("mode", ["processed_logprobs", "raw_logits", "processed_logits"])
def test_a_server_that_reports_other_logprobs_is_refused_at_start(model: Path, mode: str) -> None:
    server = PlainVllm(model, "--logprobs-mode", mode)
    try:
        plain = PlainServer(server.url, BaseModelSpec(name="tiny", path=str(model)), api_key=KEY)
        with pytest.raises(ConfigurationError, match="--logprobs-mode raw_logprobs"):
            asyncio.run(plain.connect())
    finally:
        server.kill()
