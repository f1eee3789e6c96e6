from __future__ import annotations

import errno
import itertools
import threading
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from typing import Any

import pytest

from tinker_core.executors.protocol import StateCall
from tinker_core.executors.rank_loop import Command, RankLoop
from tinker_core.executors.writing import WriterThread
from tinker_core.interfaces import RankContext, StateWriter
from tinker_core.testing.fake_sampler import FakeSampler
from tinker_core.testing.fakes import FakeTrainer
from tinker_core.types import (
    AdamParams,
    BaseModelSpec,
    LoraConfig,
    ModelInput,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    PreparedSample,
    SampleInput,
    SamplingParams,
    SnapshotParts,
    StopCondition,
)

from .conftest import datum


class Events:
    """Writes down what the loop does, in order."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def receive(self, *, block: bool) -> None:
        raise AssertionError("the test ticks by itself")

    def result(self, command: Command, value: object) -> None:
        self.seen.append(f"result {command.method}")

    def error(self, command: Command, error: object) -> None:
        self.seen.append(f"error {command.method}: {error}")


class LoggingTrainer(FakeTrainer):
    events: Events
    disk: Disk

    def capture(self, model_id: str, parts: SnapshotParts) -> StateWriter:
        super().capture(model_id, parts)
        return self.disk.write

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, Any]:
        steps = super().forward_backward(batch)
        while True:
            self.events.seen.append("micro-pass")
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value
            yield


class Disk:
    """Writes nothing, when it is let, or fails."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.errors: dict[str, Exception] = {}
        self.written: list[str] = []

    def write(self, directory: str) -> None:
        assert self.free.wait(60)
        if directory in self.errors:
            raise self.errors[directory]
        self.written.append(directory)


class LoggingSampler(FakeSampler):
    events: Events

    def step(self) -> Any:
        self.events.seen.append("token")
        return super().step()


def loop(world_size: int = 1, writes: WriterThread | None = None) -> tuple[RankLoop, Events]:
    context = RankContext(
        base_model=BaseModelSpec(name="tiny", path="tiny"),
        rank=0,
        world_size=1,
        rendezvous="",
        device="cpu",
        dtype="float32",
    )
    trainer = LoggingTrainer(context)
    sampler = LoggingSampler(context, trainer.model_handle())
    trainer.events = sampler.events = events = Events()
    trainer.disk = Disk()
    for model in "ab":
        prepared = PreparedModel(
            model_id=model, lora_config=LoraConfig(rank=2, seed=1), optimizer_config=OptimizerConfig()
        )
        trainer.create(prepared)
    return RankLoop(trainer, sampler, events, events, world_size=world_size, writes=writes), events


def long_pass(model: str, num_data: int) -> Command:
    request = PreparedModelPass(
        request_id=f"pass-{model}", model_id=model, data=(datum([1, 2, 3]),) * num_data, loss_fn="cross_entropy"
    )
    return Command(call_id=1, method="forward_backward", payload=PreparedModelPassBatch(requests=(request,)))


def sample(max_tokens: int) -> Command:
    request = SampleInput(
        sampling_session_id="s",
        seq_id=0,
        prompt=ModelInput.from_ints([1, 2]),
        sampling_params=SamplingParams(max_tokens=max_tokens, seed=1, stop=StopCondition(at_eos=False)),
    )
    payload = PreparedSample(request_id="sample", revision=None, request=request)
    return Command(call_id=2, method="sample", payload=payload)


def test_no_gap_between_two_tokens_spans_more_than_one_micro_pass() -> None:
    run, events = loop()
    run.tick([long_pass("a", 5), long_pass("b", 5), sample(12)])
    while run.has_work:
        run.tick([])
    tokens = [index for index, event in enumerate(events.seen) if event == "token"]
    gaps = [events.seen[a + 1 : b] for a, b in itertools.pairwise(tokens)]
    assert len(tokens) == 12
    assert max(gap.count("micro-pass") for gap in gaps) == 1
    assert sum(gap.count("micro-pass") for gap in gaps) >= 10  # training really ran beside it
    assert events.seen.count("result forward_backward") == 2
    assert events.seen.count("result sample") == 1


def test_a_sample_that_arrives_in_the_middle_of_a_pass_does_not_wait_for_its_end() -> None:
    run, events = loop()
    run.tick([long_pass("a", 50)])
    run.tick([sample(3)])
    while "result sample" not in events.seen:
        run.tick([])
    assert "result forward_backward" not in events.seen


def test_an_unexpected_exception_is_answered_and_the_loop_goes_on() -> None:
    run, events = loop()
    run.tick([Command(call_id=1, method="create", payload=None)])
    run.tick([sample(1)])
    assert events.seen[0].startswith("error create")
    assert events.seen[-1] == "result sample"


def test_in_a_larger_world_an_unexpected_exception_ends_the_rank_and_blames_no_command() -> None:
    run, events = loop(world_size=2)
    with pytest.raises(AttributeError):
        run.tick([Command(call_id=1, method="create", payload=None)])
    assert events.seen == []


def snapshot(directory: str, *, model: str = "a", background: bool = True) -> Command:
    call = StateCall(model_id=model, directory=directory, background=background)
    return Command(call_id=3, method="snapshot", payload=call)


def step(model: str) -> Command:
    payload = (PreparedOptimStep(request_id="step", model_id=model, adam_params=AdamParams()),)
    return Command(call_id=4, method="optim_step", payload=payload)


@pytest.fixture
def writing() -> Iterator[tuple[RankLoop, Events, Disk, WriterThread]]:
    """A loop of rank 0 in a world of two, whose disk stands still."""
    answers = Events()
    writes = WriterThread(lambda: nullcontext(answers))
    run, _ = loop(2, writes)
    trainer = run._trainer
    assert isinstance(trainer, LoggingTrainer)
    yield run, answers, trainer.disk, writes
    trainer.disk.free.set()
    writes.finish()


def test_commands_run_while_snapshots_are_written_and_each_is_answered_when_it_is_complete(
    writing: tuple[RankLoop, Events, Disk, WriterThread],
) -> None:
    run, answers, disk, writes = writing
    run.tick([snapshot("one"), snapshot("two"), step("a"), long_pass("a", 2)])
    while run.has_work:
        run.tick([])
    assert run._answers.seen[-1] == "result forward_backward"
    assert "result optim_step" in run._answers.seen
    assert answers.seen == []
    disk.free.set()
    writes.finish()
    assert answers.seen == ["result snapshot"] * 2
    assert disk.written == ["one", "two"]


def test_a_failed_write_is_answered_with_its_cause_and_nothing_else_suffers(
    writing: tuple[RankLoop, Events, Disk, WriterThread],
) -> None:
    run, answers, disk, writes = writing
    disk.errors = {
        "full": OSError(errno.ENOSPC, "No space left on device", "full/adapter"),
        "odd": RuntimeError("a bug"),
    }
    run.tick([snapshot("full"), snapshot("odd"), snapshot("good")])
    while run.has_work:
        run.tick([])
    disk.free.set()
    run.tick([snapshot("full", background=False)])
    run.tick([step("a")])
    writes.finish()
    assert [seen.split(":")[0] for seen in answers.seen] == ["error snapshot", "error snapshot", "result snapshot"]
    assert "StorageError" in answers.seen[0]
    assert "full/adapter: No space left on device" in answers.seen[0]
    assert "RuntimeError: a bug" in answers.seen[1]
    assert "No space left on device" in run._answers.seen[-2]
    assert run._answers.seen[-1] == "result optim_step"


def test_a_snapshot_of_an_unknown_model_is_refused_in_the_loop(
    writing: tuple[RankLoop, Events, Disk, WriterThread],
) -> None:
    run, answers, _, _ = writing
    run.tick([snapshot("one", model="nobody")])
    assert run._answers.seen[-1].startswith("error snapshot")
    assert "UnknownModelError" in run._answers.seen[-1]
    assert answers.seen == []
