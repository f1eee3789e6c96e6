"""The sampler as a whole, with fake engines: no sample is lost with an engine, and no weights are."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from tests.vllm_links.engines import make_sample, run, write_weights
from tests.vllm_links.places import Place, until
from tinker_core.errors import (
    CheckpointMismatchError,
    ConfigurationError,
    UnknownCheckpointError,
    UnsupportedFeatureError,
    WorkerLostError,
)
from tinker_core.types import Transport, WeightsRef
from tinker_sampler_vllm.sampler import MAX_DEATHS, VllmSampler


@asynccontextmanager
async def sampler_of(tmp_path, *made):
    sampler = VllmSampler([place.keeper for place in made], tmp_path / "held")
    await sampler.start()
    try:
        yield sampler
    finally:
        for place in made:
            place.may_start.set()
        await sampler.close()


def ref_of(tmp_path, content=b"weights"):
    return WeightsRef(transport=Transport.FILE, directory=write_weights(tmp_path / "given", content))


def test_when_one_of_several_engines_does_not_start_the_others_are_stopped(tmp_path):
    def refuse(link):
        raise ConfigurationError("no such model")

    async def scenario():
        good, bad = Place("good"), Place("bad", refuse)
        with pytest.raises(ConfigurationError, match="no such model"):
            async with sampler_of(tmp_path, good, bad):
                pass
        assert good.link.closed

    run(scenario())


def test_published_weights_are_in_all_engines_and_retired_ones_in_none(tmp_path):
    async def scenario():
        first, second = Place("first"), Place("second")
        async with sampler_of(tmp_path, first, second) as sampler:
            await sampler.publish("r1", ref_of(tmp_path))
            assert [place.link.weights for place in (first, second)] == [["r1"], ["r1"]]
            await sampler.retire("r1")
            assert [place.link.weights for place in (first, second)] == [[], []]
            with pytest.raises(UnknownCheckpointError):
                await sampler.sample(make_sample("r1"))

    run(scenario())


def test_weights_that_one_engine_refuses_are_kept_nowhere(tmp_path):
    async def scenario():
        good = Place("good")
        bad = Place("bad", lambda link: setattr(link, "refusal", CheckpointMismatchError("bad weights")))
        async with sampler_of(tmp_path, good, bad) as sampler:
            with pytest.raises(CheckpointMismatchError, match="bad weights"):
                await sampler.publish("r1", ref_of(tmp_path))
            assert good.link.weights == []
            assert list((tmp_path / "held").iterdir()) == []
            with pytest.raises(UnknownCheckpointError):
                await sampler.sample(make_sample("r1"))

    run(scenario())


def test_samples_of_a_dead_engine_run_again_on_another_and_find_their_weights(tmp_path):
    async def scenario():
        first, second = Place("first"), Place("second")
        async with sampler_of(tmp_path, first, second) as sampler:
            await sampler.publish("r1", ref_of(tmp_path))
            first.link.may_sample.clear()
            samples = [asyncio.create_task(sampler.sample(make_sample(revision))) for revision in (None, "r1", "r1")]
            await until(lambda: len(first.link.running) == 3)
            first.may_start.clear()
            first.link.lose()
            for output in await asyncio.gather(*samples):
                assert output.sequences[0].tokens == (1,)

    run(scenario())


def test_the_next_engine_is_given_the_weights_that_samples_need_and_nobody_publishes_again(tmp_path):
    async def scenario():
        place = Place("place")
        async with sampler_of(tmp_path, place) as sampler:
            await sampler.publish("r1", ref_of(tmp_path))
            await place.lose()
            assert place.link.weights == []
            samples = [sampler.sample(make_sample("r1")) for _ in range(5)]
            assert len(await asyncio.gather(*samples)) == 5
            assert place.link.loads == ["r1"]

    run(scenario())


def test_weights_published_while_no_engine_runs_are_there_when_one_does(tmp_path):
    async def scenario():
        place = Place("place")
        async with sampler_of(tmp_path, place) as sampler:
            place.may_start.clear()
            place.link.lose()
            await sampler.publish("r1", ref_of(tmp_path))
            sample = asyncio.create_task(sampler.sample(make_sample("r1")))
            place.may_start.set()
            assert (await sample).sequences
            assert place.link.weights == ["r1"]

    run(scenario())


def test_an_engine_that_dies_while_it_is_given_weights_does_not_fail_their_publishing(tmp_path):
    async def scenario():
        first, second = Place("first"), Place("second")
        async with sampler_of(tmp_path, first, second) as sampler:
            first.link.may_load.clear()
            publishing = asyncio.create_task(sampler.publish("r1", ref_of(tmp_path)))
            await until(lambda: first.link.loads)
            first.link.lose()
            await publishing
            assert (await sampler.sample(make_sample("r1"))).sequences

    run(scenario())


def test_a_sample_under_which_engines_keep_dying_fails_and_takes_no_other_with_it(tmp_path):
    async def scenario():
        place = Place("place", lambda link: link.may_sample.clear())
        async with sampler_of(tmp_path, place) as sampler:
            deadly = asyncio.create_task(sampler.sample(make_sample()))
            for death in range(MAX_DEATHS):
                if death == MAX_DEATHS - 1:
                    assert not deadly.done()
                await place.link.begun.wait()
                await place.lose()
            with pytest.raises(WorkerLostError, match=f"engines died {MAX_DEATHS} times under this sample"):
                await deadly
            place.link.may_sample.set()
            assert (await sampler.sample(make_sample())).sequences
            assert place.num_starts == MAX_DEATHS + 1

    run(scenario())


def test_a_sample_waits_until_its_engine_says_that_it_has_begun(tmp_path):
    async def scenario():
        place = Place("place")
        async with sampler_of(tmp_path, place) as sampler:
            assert not await sampler.is_waiting("unknown")
            sample = make_sample()
            place.link.may_sample.clear()
            place.may_start.clear()
            running = asyncio.create_task(sampler.sample(sample))
            await place.link.begun.wait()
            assert not await sampler.is_waiting(sample.request_id)
            place.link.waiting.add(sample.request_id)
            assert await sampler.is_waiting(sample.request_id)
            place.link.waiting.clear()
            place.link.lose()
            assert await sampler.is_waiting(sample.request_id)  # it has to begin again
            place.may_start.set()
            assert (await running).sequences
            assert not await sampler.is_waiting(sample.request_id)

    run(scenario())


def test_a_cancelled_sample_leaves_its_engine_and_its_place_in_the_count(tmp_path):
    async def scenario():
        place = Place("place")
        async with sampler_of(tmp_path, place) as sampler:
            sample = make_sample(num_samples=3)
            place.link.may_sample.clear()
            running = asyncio.create_task(sampler.sample(sample))
            await place.link.begun.wait()
            assert place.keeper.num_sequences == 3
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert place.keeper.num_sequences == 0
            assert not place.link.running
            assert not await sampler.is_waiting(sample.request_id)

    run(scenario())


def test_weights_cannot_be_published_where_only_plain_servers_are(tmp_path):
    async def scenario():
        place = Place("place", takes_weights=False)
        async with sampler_of(tmp_path, place) as sampler:
            with pytest.raises(UnsupportedFeatureError, match="bare base models"):
                await sampler.publish("r1", ref_of(tmp_path))
            assert (await sampler.sample(make_sample())).sequences

    run(scenario())
