"""What durability costs, and how long a recovery takes.

(a) Steps per second of the real server, and of the same server without journal and snapshots, in turns.
(b) Seconds from SIGKILL of the server, in the middle of a snapshot interval, until it accepts, until the workers are
loaded, until the model is restored and until its last steps are done again; beside the first start of the same run.
(c) Cost of a request while 100, 10,000 and 1,000,000 results of others are stored.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tinker
from support.models import smollm2, write_tiny_llama
from support.recovery import READY, measure_recovery
from support.report import report
from support.server import running
from support.stored_futures import measure as measure_stored
from tinker import types

GOAL_COST = 0.10
"""Share of the steps per second."""
GOAL_SECONDS = 2.0
"""Beyond load and restore, until a recovered model works on."""
GOAL_FLAT = 0.10
SIZES = (100, 10_000, 1_000_000)
SHAPES = {"tiny": (4, 32, 8), "smollm2": (4, 64, 32)}
"""Data, tokens and LoRA rank of a step."""


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def make_data(name: str) -> list[types.Datum]:
    num_data, length, _ = SHAPES[name]
    rows = np.random.default_rng(0).integers(2, 256, size=(num_data, length + 1))
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:].astype(np.int64), "weights": np.ones(length, np.float32)},
        )
        for row in rows
    ]


class Loop:
    """A supervised loop against one server; pass and step are submitted together, as training scripts do."""

    def __init__(self, url: str, name: str) -> None:
        self._service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        self._client = self._service.create_lora_training_client(base_model="bench", rank=SHAPES[name][2]).result()
        self._data = make_data(name)

    def step(self) -> None:
        passed = self._client.forward_backward(self._data, "cross_entropy")
        stepped = self._client.optim_step(types.AdamParams(learning_rate=1e-4))
        passed.result()
        stepped.result()

    def close(self) -> None:
        self._service.close("success").result()

    def rate(self, seconds: float) -> float:
        """Steps per second over a while."""
        started, num_steps = time.perf_counter(), 0
        while time.perf_counter() - started < seconds:
            self.step()
            num_steps += 1
        return num_steps / (time.perf_counter() - started)


def measure_cost(name: str, model: Path, flags: Sequence[str], block: float, rounds: int) -> dict[str, object]:
    """Blocks of ``block`` seconds on each server in turns, every second round in the other order."""
    common = ["--base-model", f"bench={model}", "--port", "0", *flags]
    script = str(Path(sys.executable).parent / "tinker-server")
    bare = str(Path(__file__).with_name("support") / "no_journal.py")
    with tempfile.TemporaryDirectory() as directory:
        with_journal = [script, *common, "--data-dir", f"{directory}/with"]
        without = [sys.executable, bare, *common, "--data-dir", f"{directory}/without"]
        with running(with_journal, READY) as url, running(without, READY) as bare_url:
            loops = {"with": Loop(url, name), "without": Loop(bare_url, name)}
            for loop in loops.values():
                loop.rate(block / 8)
            rates: dict[str, list[float]] = {way: [] for way in loops}
            for index in range(rounds):
                for way in sorted(loops, reverse=index % 2 == 1):
                    rates[way].append(loops[way].rate(block))
            for loop in loops.values():
                loop.close()
    medians = {way: statistics.median(values) for way, values in rates.items()}
    paired = [one / other for one, other in zip(rates["with"], rates["without"], strict=True)]
    ratio = statistics.median(paired)
    say(
        f"{name}: {medians['with']:.2f} steps/s with and {medians['without']:.2f} without journal and snapshots, "
        f"ratio {ratio:.3f} (each round: {', '.join(f'{value:.3f}' for value in paired)}; "
        f"goal: at least {1 - GOAL_COST})"
    )
    return {
        "steps_per_second_with": round(medians["with"], 3),
        "steps_per_second_without": round(medians["without"], 3),
        "ratio": round(ratio, 4),
        "ratio_of_rounds": [round(value, 4) for value in paired],
        "block_s": block,
        "num_data": SHAPES[name][0],
        "length": SHAPES[name][1],
        "lora_rank": SHAPES[name][2],
    }


def recovery_of(name: str, model: Path, flags: tuple[str, ...], steps: int) -> dict[str, object]:
    """Part (b) of one model, with what it took beyond load and restore."""
    parts = measure_recovery(model, make_data(name), SHAPES[name][2], steps, flags)
    beyond = parts["ready_s"] - parts["load_s"]
    say(
        f"{name}: accepting after {parts['accepting_s']:.2f} s; workers loaded after {parts['ready_s']:.2f} s "
        f"(the first start took {parts['load_s']:.2f} s); model restored {parts['restore_s']:.2f} s later; "
        f"{steps} steps done again in {parts['replay_s']:.2f} s (they took {parts['original_s']:.2f} s); "
        f"beyond load and restore {beyond:.2f} s (goal: at most {GOAL_SECONDS})"
    )
    return {
        **parts,
        "beyond_load_and_restore_s": round(beyond, 3),
        "ratio_to_goal": round(max(beyond, parts["accepting_s"]) / GOAL_SECONDS, 3),
        "replay_ratio_to_original": round(parts["replay_s"] / parts["original_s"], 3),
    }


def stored_futures(sizes: tuple[int, ...], rounds: int) -> dict[str, object]:
    """Part (c)."""
    say(f"filling journals with {', '.join(map(str, sizes))} results")
    figures = asyncio.run(measure_stored(sizes, rounds))
    ratio = max(found["request_us"] for found in figures.values()) / figures[str(min(sizes))]["request_us"]
    for size, found in figures.items():
        say(f"{size:>8} stored: {found['request_us']:.0f} us a request, {found['fetch_us']:.0f} us to fetch an old one")
    say(f"most expensive to fewest stored: {ratio:.3f} (goal: at most {1 + GOAL_FLAT})")
    return {**figures, "ratio": round(ratio, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--parts", nargs="+", choices=["cost", "recovery", "stored"])
    parser.add_argument("--models", nargs="+", choices=sorted(SHAPES), default=["tiny", "smollm2"])
    parser.add_argument("--quick", action="store_true", help="short blocks and fewer results, to try it out")
    arguments = parser.parse_args()
    parts = arguments.parts or ["cost", "recovery", "stored"]
    flags = ("--device", arguments.device, "--dtype", arguments.dtype)
    results: dict[str, object] = {
        "dtype": arguments.dtype,
        "goals": {"ratio": 1 - GOAL_COST, "beyond_load_and_restore_s": GOAL_SECONDS, "flat_ratio": 1 + GOAL_FLAT},
    }
    with tempfile.TemporaryDirectory() as directory:
        paths = {
            name: smollm2() if name == "smollm2" else write_tiny_llama(Path(directory, name))
            for name in arguments.models
        }
        # A block of the larger model is longer than the interval of its snapshots, which are a share of its cost.
        blocks = (
            {"tiny": (2.0, 2), "smollm2": (5.0, 1)} if arguments.quick else {"tiny": (6.0, 6), "smollm2": (36.0, 2)}
        )
        if "cost" in parts:
            results["cost"] = {name: measure_cost(name, path, flags, *blocks[name]) for name, path in paths.items()}
        if "recovery" in parts:
            steps = {"tiny": 100, "smollm2": 8}
            results["recovery"] = {name: recovery_of(name, path, flags, steps[name]) for name, path in paths.items()}
        if "stored" in parts:
            sizes = SIZES[:2] if arguments.quick else SIZES
            results["stored"] = stored_futures(sizes, 100 if arguments.quick else 600)
    report("durability", arguments.device, results)


if __name__ == "__main__":
    main()
