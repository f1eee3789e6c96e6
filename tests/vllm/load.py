"""Samples under way on a real engine, and the processes that they run in."""

from __future__ import annotations

import re
from concurrent.futures import Future
from pathlib import Path

from tests.processes import children_of
from tinker_core.testing import BlockingGroup
from tinker_core.testing.sampler_bench import OwnBench
from tinker_core.testing.sampler_contract import PROMPT, SampleLab
from tinker_core.types import LoraConfig, SampleOutput
from tinker_sampler_vllm.sampler import VllmSampler

ENGINE = "tinker_sampler_vllm.engine"
NUM_SAMPLES = 12
PATIENCE = 120.0
"""Seconds after which a test gives up waiting for a process to end."""
KINDS = ("engine", "VLLM::EngineCore", "VLLM::Worker")


def engines_of(parent: int) -> list[int]:
    """The pids of the running engine processes that a process has started."""
    return [pid for pid, words in children_of(parent).items() if ENGINE in words]


def descendants_of(pid: int) -> list[int]:
    """All processes below one, and itself first."""
    found = [pid]
    for child in children_of(pid):
        found += descendants_of(child)
    return found


def process_of(engine: int, kind: str) -> int:
    """One process of an engine: the one that we start, or the one of vLLM's that calls itself so."""
    if kind == "engine":
        return engine
    [pid] = [pid for pid in descendants_of(engine) if Path(f"/proc/{pid}/comm").read_text().startswith(kind[:15])]
    return pid


def shared_memory_of(pids: list[int]) -> set[str]:
    """The files in memory by which vLLM's processes talk to each other."""
    return {name for pid in pids for name in re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{pid}/maps").read_text())}


def tokens_of(outputs: list[SampleOutput]) -> list[list[tuple[int, ...]]]:
    return [[sequence.tokens for sequence in output.sequences] for output in outputs]


class Load:
    """A dozen samples, of the base model and an adapter in turns, each with its own seed and prompt."""

    def __init__(self, bench: OwnBench, sampler: VllmSampler, group: BlockingGroup) -> None:
        self.lab = SampleLab(bench)
        self._bench = bench
        self._sampler = sampler
        self._group = group

    def begin(self) -> list[Future[SampleOutput]]:
        """Send them; returns when the first ones are being generated."""
        requests = [
            self.lab.request(("r1", None)[index % 2], [*PROMPT, index], max_tokens=50, seed=index, temperature=1.0)
            for index in range(NUM_SAMPLES)
        ]
        futures = [self._bench.sample(request) for request in requests]
        while all(self._group.run(self._sampler.is_waiting(request.request_id)).result(30) for request in requests):
            pass  # each question goes to the engine and back
        return futures

    def run(self) -> list[list[tuple[int, ...]]]:
        """Their tokens when nothing happens to them."""
        return tokens_of([future.result(timeout=120) for future in self.begin()])

    def publish_adapter(self) -> None:
        """Train an adapter and publish it as ``r1``, once and for all."""
        self._bench.create_model("m1", LoraConfig(rank=4, seed=1))
        self._bench.train("m1", 3)
        self._bench.publish("r1", "m1")
