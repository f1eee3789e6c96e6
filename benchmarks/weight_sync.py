"""From publishing to the first token with the new weights, on the sampler ``vllm``: the SDK, the server, a real engine.

An adapter of SmolLM2-135M is trained by a step, published in memory, and one token is sampled with it; beside it, in
turns, one token is sampled with weights that are loaded already (what sampling itself costs), and the same adapter is
saved under a name, read from its files and sampled from.  Every prompt is another one, so that none is cached.  After
it the parts of a publication are timed without server and SDK.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import attrs
import numpy as np
import tinker
from support.engine_alone import Publication, engine_alone
from support.models import smollm2, vocabulary_size
from support.report import report
from support.server import running_server
from tinker import types

PROMPT_TOKENS = 32
WARM_UP = 2
GOAL_MS = 100.0


class Prompts:
    """Random prompts, no two alike."""

    def __init__(self, vocab_size: int) -> None:
        self._random = np.random.default_rng(0)
        self._vocab_size = vocab_size

    def next(self) -> list[int]:
        return self._random.integers(3, self._vocab_size, size=PROMPT_TOKENS).tolist()


class Loop:
    """The part of a reinforcement-learning loop that is measured."""

    def __init__(self, service: tinker.ServiceClient, rank: int, prompts: Prompts) -> None:
        self._service = service
        self._prompts = prompts
        self._training = service.create_lora_training_client(base_model="smollm2", rank=rank).result()
        self._params = types.SamplingParams(max_tokens=1, temperature=1.0, seed=0)
        self._num_saves = 0

    def step(self) -> None:
        """Change every weight."""
        row = np.array(self._prompts.next())
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:], "weights": np.ones(row.size - 1, np.float32)},
        )
        self._training.forward_backward([datum], "cross_entropy").result()
        self._training.optim_step(types.AdamParams(learning_rate=1e-4)).result()

    def publish(self) -> tinker.SamplingClient:
        return self._training.save_weights_and_get_sampling_client().result()

    def through_files(self) -> tinker.SamplingClient:
        self._num_saves += 1
        path = self._training.save_weights_for_sampler(f"save-{self._num_saves}").result().path
        return self._service.create_sampling_client(model_path=path).result()

    def one_token(self, client: tinker.SamplingClient) -> None:
        client.sample(types.ModelInput.from_ints(self._prompts.next()), 1, self._params).result()


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure_server(
    model: Path, flags: tuple[str, ...], rank: int, repeats: int, prompts: Prompts
) -> dict[str, list[float]]:
    """Milliseconds of each round, by what was done."""
    times: dict[str, list[float]] = {name: [] for name in ("published", "until_saved", "sampled", "files")}
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(model, Path(directory), "--sampler", "vllm", *flags, name="smollm2") as url,
        tinker.ServiceClient(base_url=url, api_key="tml-benchmark") as service,
    ):
        loop = Loop(service, rank, prompts)
        for index in range(repeats + WARM_UP):
            loop.step()
            start = time.perf_counter()
            client = loop.publish()
            saved = time.perf_counter()
            loop.one_token(client)
            published = time.perf_counter()
            sampled = timed(lambda client=client: loop.one_token(client))  # type: ignore[misc]
            files = timed(lambda: loop.one_token(loop.through_files()))
            if index >= WARM_UP:
                times["published"].append(1000 * (published - start))
                times["until_saved"].append(1000 * (saved - start))
                times["sampled"].append(sampled)
                times["files"].append(files)
    return times


def measure_parts(model: Path, device: str, dtype: str, handoff: Path, rank: int, repeats: int) -> dict[str, float]:
    """Median milliseconds of each part without server and SDK."""
    prompts = Prompts(vocabulary_size(model))
    with engine_alone(model, device, dtype, handoff) as alone:
        alone.create(rank)
        rounds = [alone.publish((prompts.next(), prompts.next())) for _ in range(repeats + WARM_UP)][WARM_UP:]
    names = [field.name for field in attrs.fields(Publication)]
    return {f"{name}_ms": round(1000 * statistics.median(getattr(one, name) for one in rounds), 2) for name in names}


def compare(times: dict[str, list[float]]) -> dict[str, object]:
    """What publishing adds to sampling, of each round; its median, and the medians of the rest."""
    p50 = {name: statistics.median(values) for name, values in times.items()}
    added = {
        name: statistics.median(whole - sampled for whole, sampled in zip(times[name], times["sampled"], strict=True))
        for name in ("published", "files")
    }
    print(
        f"publish to first token {p50['published']:.1f} ms, of which {p50['until_saved']:.1f} until the SDK has its "
        f"sampling client; sampling itself {p50['sampled']:.1f} ms; through files {p50['files']:.1f} ms"
    )
    print(
        f"added to sampling: published {added['published']:.1f} ms (goal: under {GOAL_MS:.0f}), "
        f"through files {added['files']:.1f} ms"
    )
    return {
        **{f"{name}_ms": round(value, 2) for name, value in p50.items()},
        "added_by_publishing_ms": round(added["published"], 2),
        "added_by_files_ms": round(added["files"], 2),
        "ratio_to_goal": round(added["published"] / GOAL_MS, 3),
        "ratio_to_files": round(added["published"] / added["files"], 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--handoff-dir", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    model = smollm2()
    handoff: Path = arguments.handoff_dir
    flags = ("--device", arguments.device, "--dtype", arguments.dtype, "--handoff-dir", str(handoff))
    times = measure_server(model, flags, arguments.rank, arguments.repeats, Prompts(vocabulary_size(model)))
    results = compare(times)
    parts = measure_parts(model, arguments.device, arguments.dtype, handoff, arguments.rank, arguments.repeats)
    print("without server and SDK: " + ", ".join(f"{name} {value}" for name, value in parts.items()))
    report(
        "weight_sync",
        arguments.device,
        {
            "model": "SmolLM2-135M",
            "dtype": arguments.dtype,
            "rank": arguments.rank,
            "goal_ms": GOAL_MS,
            **results,
            "parts": parts,
        },
    )


if __name__ == "__main__":
    main()
