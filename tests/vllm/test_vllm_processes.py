"""The processes of real engines are killed under load: no sample is lost, and nothing is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.tree import wait_gone
from tests.processes import children_of
from tests.vllm.conftest import vllm_bench
from tests.vllm.load import (
    KINDS,
    NUM_SAMPLES,
    PATIENCE,
    Load,
    descendants_of,
    engines_of,
    process_of,
    shared_memory_of,
    tokens_of,
)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Load]:
    with vllm_bench(tmp_path_factory.mktemp("processes")) as (bench, sampler, group):
        load = Load(bench, sampler, group)
        load.publish_adapter()
        yield load


@pytest.fixture(scope="module")
def undisturbed(load):
    tokens = load.run()
    assert len({str(each) for each in tokens}) == NUM_SAMPLES
    assert load.run() == tokens
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_no_sample_is_lost_when_a_process_of_an_engine_is_killed(load, undisturbed, kind):
    [engine] = engines_of(os.getpid())
    family = descendants_of(engine)
    shared = shared_memory_of(family)
    assert shared
    futures = load.begin()
    os.kill(process_of(engine, "VLLM::Worker"), signal.SIGSTOP)  # so that the samples do not end before the blow
    assert any(not future.done() for future in futures)
    os.kill(process_of(engine, kind), signal.SIGKILL)
    assert tokens_of([future.result(timeout=150) for future in futures]) == undisturbed
    assert wait_gone(family, PATIENCE) == []
    assert [name for name in shared if Path(name).exists()] == []
    assert load.run() == undisturbed


def test_an_engine_that_is_killed_while_it_starts_leaves_nothing_behind(load, undisturbed):
    [first] = engines_of(os.getpid())
    os.kill(first, signal.SIGKILL)
    while not (second := [pid for pid in engines_of(os.getpid()) if pid != first]):
        pass
    while not children_of(second[0]):
        pass  # vLLM's own processes do not know yet whom to end with
    family = descendants_of(second[0])
    os.kill(second[0], signal.SIGKILL)
    assert wait_gone(family, PATIENCE) == []
    assert load.run() == undisturbed
