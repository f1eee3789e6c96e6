"""A plain vLLM server's answers, good and bad, as samples and errors, over real HTTP."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from tests.vllm_links.engines import CAPABILITIES, SECRET, claim_of, free_address, make_sample, run, served
from tests.vllm_links.plain_servers import VOCAB_SIZE, fake_vllm, plain_link, plain_server
from tinker_core.errors import (
    ConfigurationError,
    InvalidRequestError,
    NonFiniteError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.types import StopReason
from tinker_sampler_vllm.keeper import EngineKeeper
from tinker_sampler_vllm.links.remote import RemoteLink
from tinker_sampler_vllm.sampler import VllmSampler


def choice_of(answer):
    return answer["choices"][0]


# --- requests and answers ---------------------------------------------------------------------------------------------


def test_every_parameter_is_sent_so_that_no_default_of_the_server_counts(tmp_path):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            output = await link.sample(make_sample(num_samples=2, topk_sample_logprobs=3))
            assert [sequence.tokens for sequence in output.sequences] == [(7, 7, 7, 7)] * 2
            assert output.sequences[0].stop_reason is StopReason.LENGTH
            np.testing.assert_allclose(output.sequences[0].logprobs, -math.log(100), rtol=1e-6)
            assert output.prompt_cache_hit_tokens == 2
            first, second = fake.bodies
            assert first.pop("seed") != second.pop("seed")
            assert first == second
            assert first == {
                "model": "tiny", "prompt": [1, 2, 3], "max_tokens": 4, "n": 1, "echo": False, "stream": False,
                "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_tokens": 0, "presence_penalty": 0.0,
                "frequency_penalty": 0.0, "repetition_penalty": 1.0, "watermarking": False, "stop": [],
                "stop_token_ids": [2], "ignore_eos": True, "logprobs": 3, "add_special_tokens": False,
                "skip_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True,
            }  # fmt: skip

    run(scenario())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"token_ids": [7, 7], "finish_reason": "stop"}, ConfigurationError, "rule of its own.*--generation-config"),
        ({"token_ids": [7, 7], "finish_reason": "length"}, ConfigurationError, "after 2 of 4 tokens"),
        ({"token_ids": [7, 7], "finish_reason": "abort"}, WorkerLostError, "gave up"),
        ({"prompt_token_ids": [2, 3]}, ConfigurationError, "changed the prompt"),
        ({"token_ids": None}, ConfigurationError, "rule of its own"),
        ({"logprobs": None}, ConfigurationError, "completions API"),
    ],
)
def test_an_answer_to_another_request_is_no_sample(tmp_path, change, error, words):
    def spoil(answer):
        choice_of(answer).update(change)
        if choice_of(answer)["logprobs"] is not None and change.get("token_ids"):
            choice_of(answer)["logprobs"] = {"token_logprobs": [-1.0] * 2, "top_logprobs": [{}] * 2}

    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.change = spoil
            with pytest.raises(error, match=words):
                await link.sample(make_sample())

    run(scenario())


def test_logits_that_are_not_finite_fail_their_sample(tmp_path):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.change = lambda answer: choice_of(answer)["logprobs"].update(token_logprobs=[math.nan] * 4)
            with pytest.raises(NonFiniteError):
                await link.sample(make_sample())

    run(scenario())


# --- beginnings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("allowed", "vocab_size"), [(20, VOCAB_SIZE), (2, VOCAB_SIZE), (3, VOCAB_SIZE), (99, 40)])
def test_the_greatest_top_k_is_found_out(tmp_path, allowed, vocab_size):
    async def scenario():
        async with fake_vllm() as fake:
            fake.max_logprobs, fake.num_likely = allowed, vocab_size
            async with plain_link(fake, tmp_path, vocab_size=vocab_size) as link:
                assert link.description.capabilities.max_topk == min(allowed, vocab_size)
                assert link.description.capabilities.max_context_length == 50

    run(scenario())


@pytest.mark.parametrize("values", [[0.0, -9999.0], [-0.693147, -0.693147], [12.5, 3.0], [-0.2, -0.9], [-9.0, -9.1]])
def test_logprobs_that_are_not_the_models_own_are_refused_at_the_start(tmp_path, values):
    """Those after top_k, also of a tie, logits, what adds up to more than one, and what no likeliest token can have."""

    def spoil(answer):
        top = {f"token_id:{token}": value for token, value in enumerate(values)}
        choice_of(answer)["logprobs"]["top_logprobs"] = [top]

    async def scenario():
        async with fake_vllm() as fake:
            fake.change = spoil
            with pytest.raises(ConfigurationError, match="--logprobs-mode raw_logprobs"):
                await plain_server(fake.url, tmp_path).connect()

    run(scenario())


def test_a_server_that_reports_no_top_k_is_refused_at_the_start(tmp_path):
    async def scenario():
        async with fake_vllm() as fake:
            fake.max_logprobs = 1
            with pytest.raises(ConfigurationError, match=r"not like this.*--max-logprobs 64"):
                await plain_server(fake.url, tmp_path).connect()

    run(scenario())


@pytest.mark.parametrize("card", [{"id": "tiny", "root": "x"}, {"id": "x", "root": "tiny"}])
def test_a_model_is_known_by_its_name_and_adapters_are_none(tmp_path, card):
    async def scenario():
        async with fake_vllm() as fake:
            adapter = {"id": "tiny", "root": "tiny", "parent": "x", "max_model_len": None}
            fake.models = [adapter, card | {"parent": None, "max_model_len": 50}]
            async with plain_link(fake, tmp_path) as link:
                await link.sample(make_sample())
                assert fake.bodies[0]["model"] == card["id"]
            fake.models = [adapter]
            with pytest.raises(ConfigurationError, match="serves no base model"):
                await plain_server(fake.url, tmp_path).connect()

    run(scenario())


def test_an_address_where_nobody_answers_and_one_with_a_password_are_refused(tmp_path):
    with pytest.raises(WorkerLostError, match="is it running"):
        run(plain_server(free_address().replace("tcp", "http"), tmp_path).connect())
    with pytest.raises(ConfigurationError, match="VLLM_API_KEY"):
        plain_server("http://me:secret@127.0.0.1", tmp_path)
    without_files = plain_server("http://127.0.0.1", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigurationError, match="configuration of base model 'tiny'"):
        run(without_files.connect())


# --- errors and life --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, InvalidRequestError, "not like this"),
        (422, InvalidRequestError, "not like this"),
        (401, ConfigurationError, "VLLM_API_KEY"),
        (500, WorkerLostError, "500: not like this"),
        (307, WorkerLostError, "307"),
    ],
)
def test_an_error_of_one_request_is_not_the_end_of_the_server(tmp_path, status, error, words):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.status = status
            with pytest.raises(error, match=words):
                await link.sample(make_sample())
            fake.status = 200
            assert not link.is_lost
            assert (await link.sample(make_sample())).sequences[0].tokens == (7, 7, 7, 7)

    run(scenario())


def test_a_server_that_is_not_well_is_lost_with_its_samples(tmp_path):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.open.clear()
            sample = asyncio.create_task(link.sample(make_sample()))
            await fake.begun.wait()
            fake.health = 503
            assert "503" in await link.wait_lost()
            with pytest.raises(WorkerLostError, match="503"):
                await sample
            await fake.dropped.wait()
            with pytest.raises(WorkerLostError, match="503"):
                await link.sample(make_sample())

    run(scenario())


def test_a_server_that_is_gone_or_serves_another_model_is_lost(tmp_path):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.status = 404
            with pytest.raises(WorkerLostError, match="does not serve 'tiny' any more"):
                await link.sample(make_sample())
            assert link.is_lost
        async with fake_vllm() as fake:
            link = await plain_server(fake.url, tmp_path).connect()
        assert "does not answer" in await link.wait_lost()
        await link.close()

    run(scenario())


def test_a_cancelled_sample_closes_its_request(tmp_path):
    async def scenario():
        async with fake_vllm() as fake, plain_link(fake, tmp_path) as link:
            fake.open.clear()
            sample = asyncio.create_task(link.sample(make_sample()))
            await fake.begun.wait()
            sample.cancel()
            await fake.dropped.wait()
            assert not link.is_lost

    run(scenario())


def test_beside_other_engines_a_plain_server_gets_only_what_it_can_serve(tmp_path):
    async def scenario():
        address = free_address()
        async with fake_vllm() as fake, served(address) as engine:
            server = plain_server(fake.url, tmp_path / "model")
            own = EngineKeeper("own", lambda: RemoteLink.start("own", address, SECRET, claim_of()))
            plain = EngineKeeper("plain", server.connect, takes_weights=False, check=server.check)
            sampler = VllmSampler([plain, own], tmp_path / "held")
            await sampler.start()
            try:
                assert sampler.capabilities() == CAPABILITIES  # the plain server takes nothing away
                fake.bodies.clear()
                await sampler.sample(make_sample(session="base"))
                assert (len(fake.bodies), engine.begun.is_set()) == (1, False)
                await sampler.sample(make_sample(session="base", prompt_alt_tokens_k=1))
                assert (len(fake.bodies), engine.begun.is_set()) == (1, True)
                fake.open.clear()
                fake.begun.clear()
                waiting = asyncio.create_task(sampler.sample(make_sample(session="another")))
                await fake.begun.wait()
                fake.health = 503  # it runs again on the other engine
                assert (await waiting).sequences[0].tokens == (0,)
            finally:
                await sampler.close()

    run(scenario())


def test_two_plain_servers_let_models_be_trained(tmp_path):
    async def scenario():
        async with fake_vllm() as first, fake_vllm() as second:
            servers = [plain_server(fake.url, tmp_path / "model") for fake in (first, second)]
            keepers = [EngineKeeper(s.url, s.connect, takes_weights=False, check=s.check) for s in servers]
            sampler = VllmSampler(keepers, tmp_path / "held")
            await sampler.start()
            try:
                capabilities = sampler.capabilities()
                assert (capabilities.max_lora_rank, capabilities.lora_targets) == (None, None)
                with pytest.raises(UnsupportedFeatureError, match="bare base models"):
                    await sampler.sample(make_sample("model/1"))
            finally:
                await sampler.close()

    run(scenario())
