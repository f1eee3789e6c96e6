"""``tinker-server --sampler vllm`` and the unmodified SDK: what is trained is what is sampled, whoever else samples."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

from tests.e2e.conftest import API_KEY, forward_logprobs, sampler_logprobs, tokens, train
from tests.e2e.test_examples import run_example
from tests.server.test_billing import quantities
from tests.vllm.serving import VllmServer, run_vllm_server

EXACT = 1e-5
"""Most that a logprob may differ between trainer and sampler, in float32."""
SEQUENCE = tokens(20)
PROMPT = types.ModelInput.from_ints(SEQUENCE)
MAX_REVISIONS = 4
LONG = types.SamplingParams(max_tokens=200, stop=[])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmServer]:
    small = ["--max-revisions", str(MAX_REVISIONS), "--vllm-lora-slots", "2", "--max-resident-models", "3"]
    with run_vllm_server(tmp_path_factory.mktemp("served"), *small, "--max-decode-batch", "8") as server:
        yield server


@pytest.fixture
def service(server: VllmServer) -> Iterator[tinker.ServiceClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        yield service


def new_model(service: tinker.ServiceClient, server: VllmServer, **settings: Any) -> tinker.TrainingClient:
    return service.create_lora_training_client(server.base_model, **{"rank": 4, "seed": 1, **settings}).result()


def base_client(service: tinker.ServiceClient, server: VllmServer) -> tinker.SamplingClient:
    return service.create_sampling_client(base_model=server.base_model).result()


def step(model: tinker.TrainingClient, num_steps: int = 2, seed: int = 0) -> None:
    train(model, num_steps, seed=seed, learning_rate=5e-3)


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=EXACT)


def sampled(client: tinker.SamplingClient, num: int = 1, **params: Any) -> types.SampleResponse:
    return client.sample(PROMPT, num, types.SamplingParams(**{"max_tokens": 8, "stop": [], **params})).result()


def token_lists(response: types.SampleResponse) -> list[list[int]]:
    return [list(sequence.tokens) for sequence in response.sequences]


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_snapshot_is_what_the_trainer_has_and_stays_what_it_was(
    server: VllmServer, service: tinker.ServiceClient
) -> None:
    model = new_model(service, server, rank=8)
    save = model.save_weights_and_get_sampling_client
    untrained = save().result()
    before = forward_logprobs(model, SEQUENCE)
    step(model)
    trained = save().result()
    after = forward_logprobs(model, SEQUENCE)
    assert np.abs(after - before).max() > 0.1
    assert_same(sampler_logprobs(trained, SEQUENCE), after)
    assert_same(sampler_logprobs(untrained, SEQUENCE), before)
    assert_same(sampler_logprobs(trained, SEQUENCE), after)  # other weights saw the same prompt meanwhile
    sequence = sampled(trained).sequences[0]
    whole = [*SEQUENCE, *sequence.tokens]
    assert_same(np.array(sequence.logprobs), forward_logprobs(model, whole)[len(SEQUENCE) - 1 :])


def test_the_hand_off_is_where_its_flag_says(server: VllmServer, service: tinker.ServiceClient) -> None:
    model = new_model(service, server)
    sampled(model.save_weights_and_get_sampling_client().result())
    names = server.held()
    assert 1 <= len(names) <= MAX_REVISIONS
    assert server.metric("tinker_revisions_resident") == len(names)


def test_an_inflight_target_moves_with_its_next_inflight_save_only(
    server: VllmServer, service: tinker.ServiceClient
) -> None:
    model = new_model(service, server)
    save = model.save_weights_and_get_sampling_client
    moving, frozen = save(kind="inflight").result(), save(kind="snapshot").result()
    before = forward_logprobs(model, SEQUENCE)
    running = [moving.sample(PROMPT, 2, LONG) for _ in range(4)]  # these may span the update
    step(model)
    save(kind="snapshot").result()
    assert_same(sampler_logprobs(moving, SEQUENCE), before)
    again = save(kind="inflight").result()
    after = forward_logprobs(model, SEQUENCE)
    assert np.abs(after - before).max() > 0.1
    assert_same(sampler_logprobs(moving, SEQUENCE), after)
    assert_same(sampler_logprobs(again, SEQUENCE), after)
    assert_same(sampler_logprobs(frozen, SEQUENCE), before)
    for future in running:
        assert [len(sequence.tokens) for sequence in future.result().sequences] == [200, 200]


def test_weights_saved_under_a_name_are_sampled_from_by_their_path(
    server: VllmServer, service: tinker.ServiceClient
) -> None:
    model = new_model(service, server)
    step(model)
    path = model.save_weights_for_sampler("named").result().path
    expected = forward_logprobs(model, SEQUENCE)
    step(model, seed=9)
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as other:
        assert_same(sampler_logprobs(other.create_sampling_client(path).result(), SEQUENCE), expected)
    assert np.abs(forward_logprobs(model, SEQUENCE) - expected).max() > 0.1


def test_more_weights_than_slots_and_room_are_all_served_and_come_back_when_they_were_spilled(
    server: VllmServer, service: tinker.ServiceClient
) -> None:
    models = [new_model(service, server, seed=seed, rank=1 + seed) for seed in range(4)]  # one more than stay in memory
    clients: list[tinker.SamplingClient] = [base_client(service, server)]
    expected = [forward_logprobs(new_model(service, server), SEQUENCE)]
    for number in range(2):
        for seed, model in enumerate(models):
            step(model, seed=10 * number + seed)
            clients.append(model.save_weights_and_get_sampling_client().result())
            expected.append(forward_logprobs(model, SEQUENCE))
    assert len(clients) > 2 * MAX_REVISIONS
    for order in (clients, clients[::-1]):  # the least recently used one is always the next
        asked = [client.compute_logprobs(PROMPT) for client in order]
        answers = [np.array(future.result()[1:], np.float64) for future in asked]
        for found, wanted in zip(answers if order is clients else answers[::-1], expected, strict=True):
            assert_same(found, wanted)
    assert len(server.held()) <= MAX_REVISIONS
    assert server.metric("tinker_revisions_stored") >= len(clients) - 1 - MAX_REVISIONS
    some = types.SamplingParams(max_tokens=12, stop=[])
    mixed = [(client, client.sample(PROMPT, 2, some)) for client in clients]  # all at once, two of each
    for client, future in mixed:
        for sequence in future.result().sequences:
            whole = [*SEQUENCE, *sequence.tokens]
            assert_same(np.array(sequence.logprobs), sampler_logprobs(client, whole)[len(SEQUENCE) - 1 :])


def test_the_bare_base_model_is_sampled_from_beside_adapters(server: VllmServer, service: tinker.ServiceClient) -> None:
    base = base_client(service, server)
    untrained = new_model(service, server)
    assert_same(sampler_logprobs(base, SEQUENCE), forward_logprobs(untrained, SEQUENCE))


def test_weights_of_a_parked_model_go_on_being_served(server: VllmServer, service: tinker.ServiceClient) -> None:
    model = new_model(service, server)
    step(model)
    client = model.save_weights_and_get_sampling_client().result()
    expected = forward_logprobs(model, SEQUENCE)
    for seed in range(3):
        step(new_model(service, server, seed=20 + seed), 1)
    assert server.metric("tinker_models_parked") >= 1
    assert_same(sampler_logprobs(client, SEQUENCE), expected)
    again = model.save_weights_and_get_sampling_client().result()
    assert_same(sampler_logprobs(again, SEQUENCE), expected)


# --- samples ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def client(server: VllmServer) -> Iterator[tinker.SamplingClient]:
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        model = new_model(service, server)
        step(model)
        yield model.save_weights_and_get_sampling_client().result()


def test_a_seed_repeats_and_gives_each_sample_tokens_of_its_own(client: tinker.SamplingClient) -> None:
    first, again, other = (token_lists(sampled(client, 4, seed=seed)) for seed in (7, 7, 8))
    assert first == again != other
    assert len({tuple(each) for each in first}) == 4
    assert token_lists(sampled(client, 1, seed=7)) == first[:1]


def test_stop_may_be_a_text_several_texts_tokens_or_nothing(client: tinker.SamplingClient) -> None:
    params = {"seed": 3, "max_tokens": 40}
    [free] = token_lists(sampled(client, **params))
    assert len(free) == 40
    wanted = free[2]
    until = free[: free.index(wanted) + 1]
    text, absent = client.get_tokenizer().decode([wanted]), next(token for token in range(4, 99) if token not in free)
    for stop in (text, [text], [text, "no such text"], [wanted], [wanted, absent]):
        [sequence] = sampled(client, **{**params, "stop": stop}).sequences
        assert (list(sequence.tokens), sequence.stop_reason) == (until, "stop")


def test_questions_about_the_prompt_and_the_likeliest_tokens_agree_with_each_other(
    client: tinker.SamplingClient,
) -> None:
    params = types.SamplingParams(max_tokens=4, temperature=0.0, stop=[])
    response = client.sample(
        PROMPT, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=5, topk_sample_logprobs=3
    ).result()
    logprobs = sampler_logprobs(client, SEQUENCE)
    assert response.prompt_logprobs is not None
    assert_same(np.array(response.prompt_logprobs[1:], np.float64), logprobs)
    assert response.topk_prompt_logprobs is not None
    for place, row in enumerate(response.topk_prompt_logprobs[1:]):
        assert row is not None
        assert len(row) == 5
        found = dict(row)
        if SEQUENCE[place + 1] in found:
            assert abs(found[SEQUENCE[place + 1]] - logprobs[place]) < EXACT
    first, second = response.sequences
    assert list(first.tokens) == list(second.tokens)  # greedy
    assert first.topk_logprobs is not None
    assert [row[0][0] for row in first.topk_logprobs] == list(first.tokens)
    assert_same(np.array([row[0][1] for row in first.topk_logprobs]), np.array(first.logprobs))


def test_a_client_goes_on_after_it_gave_samples_up(server: VllmServer, client: tinker.SamplingClient) -> None:
    wanted = types.SamplingParams(max_tokens=8, stop=[], seed=3)
    expected = client.sample(PROMPT, 2, wanted).result()
    given_up = [client.sample(PROMPT, 16, LONG) for _ in range(4)]  # eight times as many as run at a time
    while server.metric("tinker_open_polls") < 4:  # the SDK takes back only what it asks for already
        assert not any(future.future().done() for future in given_up)
    kept = client.sample(PROMPT, 2, wanted)
    for future in given_up:
        future.future().cancel()
    assert token_lists(kept.result()) == token_lists(expected)
    while server.metric("tinker_samples_in_progress"):
        pass  # they end, or the test does not


@pytest.mark.parametrize(
    ("prompt", "params", "questions", "reason"),
    [
        ([4, 5000], {}, {}, "token id 5000 is outside the vocabulary"),
        ([], {}, {}, "at least one token"),
        ([5] * 256, {}, {}, "leave no room to generate"),
        ([5], {"top_p": 0.0}, {}, "top_p"),
        ([5], {"temperature": -1.0}, {}, "temperature"),
        ([5], {"top_k": 0}, {}, "top_k"),
        ([5], {"max_tokens": 0}, {}, "max_tokens"),
        ([5], {"stop": [112]}, {}, "stop"),
        ([5], {"stop": [""]}, {}, "stop"),
        ([5, 6], {}, {"topk_prompt_logprobs": 65}, "topk_prompt_logprobs"),
        ([5, 6], {}, {"include_prompt_logprobs": True, "prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n"),
    ],
)
def test_a_bad_request_fails_alone_and_names_its_field(
    client: tinker.SamplingClient, prompt: list[int], params: Any, questions: Any, reason: str
) -> None:
    good = client.sample(PROMPT, 1, types.SamplingParams(max_tokens=4))
    settings = types.SamplingParams(**{"max_tokens": 4, **params})
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match=reason):
        client.sample(types.ModelInput.from_ints(prompt), 1, settings, **questions).result()
    assert good.result().sequences


# --- models that cannot be served -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"rank": 9}, "rank"),
        ({"user_metadata": {"tinker_server.target_modules": "q_proj,embed_tokens"}}, "embed_tokens"),
    ],
)
def test_a_model_that_could_not_be_served_is_refused_when_it_is_created(
    server: VllmServer, service: tinker.ServiceClient, settings: Any, reason: str
) -> None:
    with pytest.raises((tinker.RequestFailedError, tinker.BadRequestError), match=reason):
        new_model(service, server, **settings)


# --- around it --------------------------------------------------------------------------------------------------------


def test_capabilities_name_the_model_and_its_context(server: VllmServer) -> None:
    rest = tinker.RestClient(base_url=server.url, api_key=API_KEY)
    [model] = rest.get_server_capabilities().result().supported_models
    assert (model.model_name, model.max_context_length) == (server.base_model, 256)


def usage(server: VllmServer) -> types.BillingUsageResponse:
    admin = tinker.AdminClient(base_url=server.url, api_key=API_KEY)
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    return admin.get_billing_usage(hour - timedelta(hours=2), hour + timedelta(hours=2)).result()


def test_prompts_found_in_the_cache_are_told_and_metered(server: VllmServer, service: tinker.ServiceClient) -> None:
    model = new_model(service, server)
    client = model.save_weights_and_get_sampling_client().result()
    prompt = types.ModelInput.from_ints(tokens(200, seed=77))
    before = quantities(usage(server))
    short = types.SamplingParams(max_tokens=1)
    first = client.sample(prompt, 1, short).result()
    second = client.sample(prompt, 1, short).result()
    assert first.prompt_cache_hit_tokens == 0
    assert 0 < second.prompt_cache_hit_tokens < 200
    cached = second.prompt_cache_hit_tokens
    counted = quantities(usage(server)) - before
    assert counted == {"sampling_prefill": 400 - cached, "sampling_prefill cached": cached, "sampling_sample": 2}


def test_the_rl_example_runs_unchanged(server: VllmServer) -> None:
    output = run_example(server.url, "rl.py", "--steps", "3", "--prompts", "2", "--group-size", "3", "--rank", "8")
    assert output.count("mean reward") == 3
