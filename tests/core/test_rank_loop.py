from __future__ import annotations

import itertools
from collections.abc import Generator
from typing import Any

from tinker_core.executors.rank_loop import Command, RankLoop
from tinker_core.interfaces import RankContext
from tinker_core.testing.fake_sampler import FakeSampler
from tinker_core.testing.fakes import FakeTrainer
from tinker_core.types import (
    BaseModelSpec,
    LoraConfig,
    ModelInput,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedSample,
    SampleInput,
    SamplingParams,
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

    def forward_backward(self, batch: PreparedModelPassBatch) -> Generator[None, None, Any]:
        steps = super().forward_backward(batch)
        while True:
            self.events.seen.append("micro-pass")
            try:
                next(steps)
            except StopIteration as stop:
                return stop.value
            yield


class LoggingSampler(FakeSampler):
    events: Events

    def step(self) -> Any:
        self.events.seen.append("token")
        return super().step()


def loop() -> tuple[RankLoop, Events]:
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
    for model in "ab":
        prepared = PreparedModel(
            model_id=model, lora_config=LoraConfig(rank=2, seed=1), optimizer_config=OptimizerConfig()
        )
        trainer.create(prepared)
    return RankLoop(trainer, sampler, events, events), events


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
