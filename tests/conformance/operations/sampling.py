"""Sampling clients, samples and log-probabilities."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
from operations.bridge import (
    BASE_MODEL,
    SEQUENCE,
    VOCABULARY,
    AbsentError,
    Client,
    close,
    differs,
    done,
    needs,
    operation,
    prompt,
    refused,
    sampler_logprobs,
    step,
)
from tinker import types


def draw(client: Client, num_samples: int = 1, **params: Any) -> list[Any]:
    """Sequences of the trained sampler, checked for what all of them must have."""
    params = {"max_tokens": 8, **params}
    result = done(client.sampler.sample(prompt(), num_samples, types.SamplingParams(**params)))
    assert len(result.sequences) == num_samples
    for sequence in result.sequences:
        assert 0 < len(sequence.tokens) <= params["max_tokens"]
        assert all(0 <= token < VOCABULARY for token in sequence.tokens)
        assert len(sequence.logprobs) == len(sequence.tokens)
        assert max(sequence.logprobs) <= 0
        assert sequence.stop_reason in ("stop", "length")
        assert sequence.stop_reason == "stop" or len(sequence.tokens) == params["max_tokens"]
    return list(result.sequences)


def one_token(client: Client, prompt_tokens: list[int] = SEQUENCE, **options: Any) -> Any:
    """A request about the prompt, which draws one token besides."""
    params = types.SamplingParams(max_tokens=1)
    return done(client.sampler.sample(prompt(prompt_tokens), 1, params, True, **options))


@operation("create_sampling_client(model_path)")
def from_path(client: Client) -> None:
    client.sampler = done(client.service.create_sampling_client(model_path=client.sampler_path))
    close(sampler_logprobs(client.sampler), client.saved)


@operation("TrainingClient.create_sampling_client")
def from_training_client(client: Client) -> None:
    sampler = done(client.model.create_sampling_client(client.sampler_path))
    close(sampler_logprobs(sampler), client.saved)


@operation("create_sampling_client(base_model)")
def from_base_model(client: Client) -> None:
    sampler = done(client.service.create_sampling_client(base_model=BASE_MODEL))
    close(sampler_logprobs(sampler), client.untrained)


@operation("save_weights_and_get_sampling_client")
def ephemeral(client: Client) -> None:
    sampler = done(client.model.save_weights_and_get_sampling_client("ephemeral"))
    close(sampler_logprobs(sampler), client.saved)
    step(client.model, learning_rate=0.05)
    close(sampler_logprobs(sampler), client.saved)
    moved = done(client.model.save_weights_and_get_sampling_client("moved"))
    differs(sampler_logprobs(moved), client.saved)


@operation("save_weights_and_get_sampling_client(kind=inflight)")
def inflight(client: Client) -> None:
    save = needs(client.model, "save_weights_and_get_sampling_client", "kind")
    first = done(save(kind="inflight"))
    before = sampler_logprobs(first)
    step(client.model, learning_rate=0.05)
    second = done(save(kind="inflight"))
    differs(sampler_logprobs(second), before)
    close(sampler_logprobs(first), sampler_logprobs(second))


@operation("SamplingClient.get_tokenizer")
def sampling_tokenizer(client: Client) -> None:
    tokenizer = needs(client.sampler, "get_tokenizer")()
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"


@operation("SamplingClient.get_base_model")
def base_model(client: Client) -> None:
    assert needs(client.sampler, "get_base_model")() == BASE_MODEL


@operation("sample")
def sample(client: Client) -> None:
    sequences = draw(client, num_samples=4, temperature=1.0)
    assert len({tuple(sequence.tokens) for sequence in sequences}) > 1
    whole = [*SEQUENCE, *sequences[0].tokens]
    close(sampler_logprobs(client.sampler, whole)[len(SEQUENCE) - 1 :], sequences[0].logprobs)


@operation("sample seed, temperature, top_k, top_p")
def sample_params(client: Client) -> None:
    greedy = draw(client, temperature=0.0)[0].tokens
    assert draw(client, temperature=1.0, top_k=1)[0].tokens == greedy
    assert draw(client, temperature=1.0, top_p=1e-6)[0].tokens == greedy
    first, second = (draw(client, seed=11, temperature=0.9)[0].tokens for _ in range(2))
    assert first == second


@operation("sample stop")
def sample_stop(client: Client) -> None:
    greedy = list(draw(client, temperature=0.0, stop=[])[0].tokens)
    assert len(greedy) == 8
    wanted = greedy.index(greedy[3]) + 1
    text = client.model.get_tokenizer().decode([greedy[3]])
    for stop in ([greedy[3]], text, [text, "never this"]):
        (sequence,) = draw(client, temperature=0.0, stop=stop)
        assert (list(sequence.tokens), sequence.stop_reason) == (greedy[:wanted], "stop"), stop


@operation("sample prompt logprobs")
def prompt_logprobs(client: Client) -> None:
    result = one_token(client, topk_prompt_logprobs=3)
    assert result.prompt_logprobs[0] is None
    close(np.array(result.prompt_logprobs[1:], np.float64), client.saved)
    assert len(result.topk_prompt_logprobs) == len(SEQUENCE)
    assert not result.topk_prompt_logprobs[0]
    for row in result.topk_prompt_logprobs[1:]:
        values = [value for _, value in row]
        assert len(row) == 3
        assert values == sorted(values, reverse=True)


@operation("sample(topk_sample_logprobs)")
def topk_sample_logprobs(client: Client) -> None:
    needs(client.sampler, "sample", "topk_sample_logprobs")
    params = types.SamplingParams(max_tokens=4, temperature=0.0)
    (sequence,) = done(client.sampler.sample(prompt(), 1, params, topk_sample_logprobs=2)).sequences
    rows = sequence.topk_logprobs if hasattr(sequence, "topk_logprobs") else sequence.topk_sample_logprobs
    assert [row[0][0] for row in rows] == list(sequence.tokens)
    close([row[0][1] for row in rows], sequence.logprobs)


@operation("sample(target_prompt_logprobs)")
def target_prompt_logprobs(client: Client) -> None:
    needs(client.sampler, "sample", "target_prompt_logprobs")
    wanted = np.full((len(SEQUENCE) - 1, 2), -1, np.int64)
    wanted[:, 0] = SEQUENCE[1:]
    result = one_token(client, target_prompt_logprobs=types.TensorData.from_numpy(wanted))
    found = np.array(result.target_prompt_logprobs.tolist())
    close(found[:, 0], client.saved)
    close(found[:, 1], 0.0)


@operation("sample(prompt_alt_tokens_k)")
def prompt_alt_tokens(client: Client) -> None:
    needs(client.sampler, "sample", "prompt_alt_tokens_k")
    alternatives = one_token(client, prompt_alt_tokens_k=3).prompt_alt_tokens
    drawn = np.array(alternatives.tokens.tolist())
    assert drawn.shape == (len(SEQUENCE) - 1, 3)
    assert ((drawn >= 0) & (drawn < VOCABULARY)).all()
    assert (np.array(alternatives.logprobs.tolist()) <= 0).all()


@operation("sample(prompt_logprobs_last_n)")
def prompt_logprobs_last_n(client: Client) -> None:
    needs(client.sampler, "sample", "prompt_logprobs_last_n")
    values = one_token(client, prompt_logprobs_last_n=4).prompt_logprobs
    assert values[:-4] == [None] * (len(SEQUENCE) - 4)
    close(np.array(values[-4:], np.float64), client.saved[-4:])


@operation("compute_logprobs")
def compute_logprobs(client: Client) -> None:
    futures = [client.sampler.compute_logprobs(prompt(SEQUENCE[:length])) for length in range(3, len(SEQUENCE))]
    for length, future in zip(range(3, len(SEQUENCE)), futures, strict=True):
        close(np.array(done(future)[1:], np.float64), client.saved[: length - 1])


@operation("pickled SamplingClient")
def pickled(client: Client) -> None:
    if "__reduce__" not in vars(type(client.sampler)):
        raise AbsentError("SamplingClient.__reduce__")
    copy = pickle.loads(pickle.dumps(client.sampler))
    close(sampler_logprobs(copy), client.saved)


@operation("get_sampler_handle")
def sampler_handle(client: Client) -> None:
    handle = needs(client.sampler, "get_sampler_handle")()
    close(sampler_logprobs(type(client.sampler).from_sampler_handle(handle)), client.saved)


@operation("refused sample")
def refused_sample(client: Client) -> None:
    far = 10**6
    refused(lambda: done(client.sampler.sample(prompt([5, far]), 1, types.SamplingParams(max_tokens=2))), str(far))
    assert draw(client)


@operation("refused sampler path")
def refused_path(client: Client) -> None:
    path = client.sampler_path.replace("named", "never-saved")

    def use() -> Any:
        return sampler_logprobs(done(client.service.create_sampling_client(model_path=path)))

    refused(use, "never-saved")
    assert draw(client)
