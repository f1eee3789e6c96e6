"""Trainer and sampler are compared on the same tokens; where they disagree, the message says what to suspect."""

from __future__ import annotations

import asyncio
import logging
import math
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.core.beside_sampler import Beside, Fault
from tests.core.conftest import Client, EngineFactory, forward_backward
from tests.processes import kill_workers
from tinker_core.engine.agreement import figures_of
from tinker_core.errors import AgreementError, UnsupportedFeatureError, WorkerLostError
from tinker_core.types import BaseModelSpec, Transport

COMPARED = {"base", "adapter", "decode"}


@pytest.fixture
def handoff_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "memory"
    directory.mkdir()
    return directory


def opened(
    open_engine: EngineFactory, plugin: Beside, handoff_dir: Path, **settings: Any
) -> AbstractAsyncContextManager[Client]:
    settings = {"agreement_tolerance": 1.0, "handoff_dir": handoff_dir, **settings}
    return open_engine(more_plugins={plugin.name: plugin}, sampler=plugin.name, **settings)


async def refusal(client: Client) -> str:
    """Why the engine does not become ready."""
    with pytest.raises(AgreementError) as caught:
        await client.engine.wait_ready()
    readiness = client.engine.readiness()
    assert not readiness.ready
    assert readiness.models["tiny"] == f"failed: {caught.value}"
    return str(caught.value)


# --- at the start -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transports", [(Transport.SHARED_MEMORY, Transport.FILE), (Transport.FILE,)])
def test_a_sampler_beside_the_workers_that_agrees_starts_and_nothing_is_left_behind(
    open_engine: EngineFactory, handoff_dir: Path, transports: tuple[Transport, ...]
) -> None:
    async def body() -> None:
        plugin = Beside(transports=transports)
        async with opened(open_engine, plugin, handoff_dir, max_models=1) as client:
            await client.engine.wait_ready()
            [metrics] = client.engine.metrics()
            report = metrics.agreement
            assert report is not None
            assert report.agrees
            assert report.figures.keys() == COMPARED
            assert all(figures.max < 1e-5 for figures in report.figures.values())
            assert report.notes == ()
            assert plugin.resident == set()
            assert metrics.resident_revisions == metrics.stored_revisions == 0
            await client.create(0)  # the only one that there is room for
            assert client.engine.metrics()[0].resident_models == 1

    asyncio.run(body())
    assert list(handoff_dir.rglob("*.npz")) == []


@pytest.mark.parametrize(
    ("fault", "suspects", "others"),
    [
        ("base", ["the bare base model differ", "reads /models/tiny as float32", "same files"], ["attention", "KV"]),
        ("scale", ["trained adapter differ", "all their parts (attention, mlp, unembed)", "scale"], ["KV cache"]),
        ("mlp", ["in their part mlp: the bare base model agrees", "so do the other parts alone"], ["files", "unembed"]),
        ("together", ["so does each part of an adapter alone, but not all together"], ["files", "KV cache"]),
        ("decode", ["sampled tokens differ", "KV cache", "given tokens agree"], ["files", "attention"]),
        ("nan", ["sampled tokens differ by up to inf"], ["files"]),
    ],
)
def test_a_sampler_that_disagrees_keeps_the_server_from_becoming_ready_and_the_message_says_what_to_suspect(
    open_engine: EngineFactory, handoff_dir: Path, fault: Fault, suspects: list[str], others: list[str]
) -> None:
    async def body() -> None:
        base_models = (BaseModelSpec(name="tiny", path="/models/tiny"),)
        async with opened(open_engine, Beside(fault=fault), handoff_dir, base_models=base_models) as client:
            message = await refusal(client)
            for text in [*suspects, "--agreement-tolerance", "(tolerance 0.01)", "in float32"]:
                assert text in message
            for text in others:
                assert text not in message

    asyncio.run(body())


def test_the_figures_of_a_refusal_are_metrics(open_engine: EngineFactory, handoff_dir: Path) -> None:
    async def body() -> None:
        async with opened(open_engine, Beside(fault="mlp"), handoff_dir) as client:
            await refusal(client)
            report = client.engine.metrics()[0].agreement
            assert report is not None
            assert not report.agrees
            assert report.figures.keys() == {"base", "adapter", "attention", "mlp", "unembed"}
            wrong = {name for name, figures in report.figures.items() if figures.mean > report.tolerance.mean}
            assert wrong == {"adapter", "mlp"}

    asyncio.run(body())


def test_a_greater_tolerance_lets_a_difference_pass(open_engine: EngineFactory, handoff_dir: Path) -> None:
    async def body() -> None:
        async with opened(open_engine, Beside(fault="scale"), handoff_dir, agreement_tolerance=1e9) as client:
            await client.engine.wait_ready()
            report = client.engine.metrics()[0].agreement
            assert report is not None
            assert report.tolerance.max == pytest.approx(1e7)
            assert report.figures["adapter"].mean > 0.05

    asyncio.run(body())


def test_a_tolerance_of_zero_compares_nothing_and_the_log_says_so(
    open_engine: EngineFactory, handoff_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)

    async def body() -> None:
        plugin = Beside(fault="base")
        async with opened(open_engine, plugin, handoff_dir, agreement_tolerance=0.0) as client:
            await client.engine.wait_ready()
            assert plugin.num_samples == 1  # the probe of a start
            assert "not compared: --agreement-tolerance is 0" in caplog.text
            with pytest.raises(UnsupportedFeatureError, match="agreement-tolerance is 0"):
                await client.engine.compare_sides("tiny")

    asyncio.run(body())


def test_a_sampler_without_prompt_logprobs_is_compared_on_what_it_samples(
    open_engine: EngineFactory, handoff_dir: Path
) -> None:
    async def body() -> None:
        plugin = Beside(prompt_logprobs=False)
        async with opened(open_engine, plugin, handoff_dir) as client:
            await client.engine.wait_ready()
            report = client.engine.metrics()[0].agreement
            assert report is not None
            assert report.figures.keys() == {"decode"}
            assert report.notes == ("given tokens were not compared: prompt_logprobs are not offered",)
            plugin.fault = "decode"
            report = await client.engine.compare_sides("tiny")
            assert "or the base model's files, dtype or adapters" in report.suspect

    asyncio.run(body())


def test_a_sampler_that_takes_no_weights_is_compared_on_the_bare_base_model(
    open_engine: EngineFactory, handoff_dir: Path
) -> None:
    async def body() -> None:
        async with opened(open_engine, Beside(transports=()), handoff_dir) as client:
            await client.engine.wait_ready()
            report = client.engine.metrics()[0].agreement
            assert report is not None
            assert report.figures.keys() == {"base", "decode"}
            assert report.notes == ("adapters were not compared: the sampler takes none from this trainer",)

    asyncio.run(body())


# --- on demand --------------------------------------------------------------------------------------------------------


def test_a_base_model_whose_sampler_goes_wrong_is_doubtful_until_it_agrees_again(
    open_engine: EngineFactory, handoff_dir: Path
) -> None:
    async def body() -> None:
        plugin = Beside()
        async with opened(open_engine, plugin, handoff_dir) as client:
            model_id = await client.create(0)
            plugin.fault = "scale"
            report = await client.engine.compare_sides("tiny")
            assert not report.agrees
            readiness = client.engine.readiness()
            assert not readiness.ready
            assert readiness.models["tiny"].startswith("doubtful: trainer and sampler of base model 'tiny' disagree")
            await client.run(forward_backward(model_id, 1))  # whoever works goes on
            plugin.fault = None
            assert (await client.engine.compare_sides("tiny")).agrees
            assert client.engine.readiness().ready

    asyncio.run(body())


def test_a_sampler_in_the_ranks_is_compared_on_demand(open_engine: EngineFactory) -> None:
    async def body() -> None:
        async with open_engine(agreement_tolerance=1.0, max_models=1, max_revisions=1) as client:
            await client.engine.wait_ready()
            assert client.engine.metrics()[0].agreement is None
            await client.create(0)
            report = await client.engine.compare_sides("tiny")  # there is room for one model more than clients may have
            assert report.agrees
            assert report.figures.keys() == COMPARED
            assert client.engine.metrics()[0].agreement == report

    asyncio.run(body())


def test_those_who_ask_while_sides_are_compared_get_the_same_report(
    open_engine: EngineFactory, handoff_dir: Path
) -> None:
    async def body() -> None:
        plugin = Beside()
        async with opened(open_engine, plugin, handoff_dir) as client:
            await client.engine.wait_ready()
            first, second = await asyncio.gather(*(client.engine.compare_sides("tiny") for _ in range(2)))
            assert first is second
            assert await client.engine.compare_sides("tiny") is not first

    asyncio.run(body())


def test_a_comparison_during_which_the_workers_die_is_given_up_and_the_next_one_succeeds(
    open_engine: EngineFactory, handoff_dir: Path
) -> None:
    async def body() -> None:
        plugin = Beside()
        async with opened(open_engine, plugin, handoff_dir) as client:
            await client.engine.wait_ready()
            plugin.held = asyncio.Event()
            plugin.started.clear()
            asking = asyncio.create_task(client.engine.compare_sides("tiny"))
            await plugin.started.wait()
            kill_workers()
            with pytest.raises(WorkerLostError, match="ask again"):
                await asking
            assert plugin.resident == set()
            plugin.held = None
            await client.create(0)  # waits for other workers
            assert (await client.engine.compare_sides("tiny")).agrees

    asyncio.run(body())


def test_a_comparison_ends_with_the_engine(open_engine: EngineFactory, handoff_dir: Path) -> None:
    async def body() -> None:
        plugin = Beside()
        async with opened(open_engine, plugin, handoff_dir) as client:
            await client.engine.wait_ready()
            plugin.held = asyncio.Event()
            plugin.started.clear()
            asking = asyncio.create_task(client.engine.compare_sides("tiny"))
            await plugin.started.wait()
        with pytest.raises(WorkerLostError, match="has ended"):
            await asking

    asyncio.run(body())


def test_what_cannot_be_compared_says_why(open_engine: EngineFactory, handoff_dir: Path) -> None:
    async def body() -> None:
        async with open_engine(agreement_tolerance=1.0, sampler=None) as client:
            await client.engine.wait_ready()
            with pytest.raises(UnsupportedFeatureError, match="has no sampler"):
                await client.engine.compare_sides("tiny")
        async with opened(open_engine, Beside(), handoff_dir, max_context_length=2) as client:
            await client.engine.wait_ready()
            with pytest.raises(UnsupportedFeatureError, match="2 tokens of context are too few"):
                await client.engine.compare_sides("tiny")

    asyncio.run(body())


# --- figures ----------------------------------------------------------------------------------------------------------


def test_the_figures_are_the_greatest_and_the_mean_difference_and_an_estimate_of_the_divergence() -> None:
    trainer = [np.array([-1.0, -2.0]), np.array([-3.0])]
    sampler = [np.array([-1.5, -2.0]), np.array([-2.5])]
    figures = figures_of(trainer, sampler)
    assert figures.max == pytest.approx(0.5)
    assert figures.mean == pytest.approx(1 / 3)
    assert figures.kl == pytest.approx((math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5) / 3)


def test_the_estimate_of_the_divergence_is_right_on_average() -> None:
    random = np.random.default_rng(0)
    ours, theirs = (np.log(random.dirichlet(np.ones(8))) for _ in range(2))
    drawn = random.choice(8, 200_000, p=np.exp(theirs))
    exact = float((np.exp(theirs) * (theirs - ours)).sum())
    assert figures_of([ours[drawn]], [theirs[drawn]]).kl == pytest.approx(exact, rel=0.03)


def test_a_logprob_that_is_not_finite_is_beyond_every_tolerance() -> None:
    assert figures_of([np.array([-1.0, -np.inf])], [np.array([-1.0, -np.inf])]).max == math.inf
