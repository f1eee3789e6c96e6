"""What drawing rollouts while the model trains saves, when each waits 0.3 to 1 s for its reward.

The same reinforcement-learning job on a tiny model, with as many steps, in the three execution modes: each in a job's
own process, one after the other against one server, in turns. The time is that from the process's first report to its
last step; starting it and saving the result cost every mode the same. Rewards are waited for in threads, so within a
step they overlap in every mode; what the asynchronous modes add is that steps do.

With L seconds until a step's rewards are known and T to train, sync takes L + T a step. With at most K steps off
policy, K + 1 groups are under way, so a step takes (L + T) / (K + 1), or T where that is more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.models import write_chat_tokenizer, write_tiny_llama
from support.report import report
from support.server import running_server
from support.slow_verifier import LONGEST_S, SHORTEST_S

from tinker_jobs.protocol import EventType, JobSpec, decode_event, encode
from tinker_jobs.refs import FrozenCapability, FrozenDataset, FrozenFile, FrozenRefs

MODES: dict[str, dict[str, Any]] = {
    "sync": {"execution_mode": "sync"},
    "one_step_off_async": {"execution_mode": "one_step_off_async", "max_steps_off_policy": 1},
    "fully_async": {"execution_mode": "fully_async", "max_steps_off_policy": 4},
}
NUM_PROMPTS, NUM_ROLLOUTS = 4, 8
DATASET = {"name": "questions", "version": "1.0.0"}
GOAL = 1.5


def write_prompts(directory: Path) -> FrozenDataset:
    path = directory / "questions.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {n} + {n}?"}) + "\n" for n in range(64)))
    content = path.read_bytes()
    file = FrozenFile(path=str(path), size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    return FrozenDataset(name="questions", version="1.0.0", splits={"train": file}, default_split="train")


def spec(url: str, model: Path, directory: Path, dataset: FrozenDataset, mode: str, steps: int) -> JobSpec:
    config = {
        "algorithm": "importance_sampling",
        "prompt_dataset_ref": DATASET,
        "reward_recipe": {"name": "slow_verifier"},
        "steps": steps,
        "num_rollouts": NUM_ROLLOUTS,
        "batch_size": NUM_PROMPTS,
        "max_new_tokens": 8,
        "lora_rank": 8,
        **MODES[mode],
    }
    capability = FrozenCapability(name="none", version="1.0.0", prompt=None, runtime_digest="")
    return JobSpec(
        job_id=mode,
        attempt=1,
        request={
            "model": "tiny",
            "capability_ref": {"name": "none", "version": "1.0.0"},
            "backend": "tinker",
            "trainer_type": "rl",
            "config": config,
        },
        refs=FrozenRefs(capability=capability, prompt_dataset=dataset),
        base_model="tiny",
        model_path=str(model),
        base_url=url,
        api_key="tml-benchmark",
        directory=directory,
        plugins=("jobs", "support.slow_verifier"),
    )


def run_job(job: JobSpec) -> tuple[float, Mapping[str, Any]]:
    """Seconds from the start of training to the last step, and the final metrics."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tinker_jobs.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with process:
        process.stdin.write(encode(job))
        process.stdin.flush()
        start = end = 0.0
        metrics: Mapping[str, Any] = {}
        for line in process.stdout:
            event = decode_event(line)
            match event.event_type:
                case EventType.TRAINING_START:
                    start = time.perf_counter()
                case EventType.STEP_COMPLETE:
                    end = time.perf_counter()
                case EventType.TRAINING_END:
                    metrics = event.metrics
                case EventType.TRAINING_ERROR:
                    raise RuntimeError(event.message)
    return end - start, metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    times: dict[str, list[float]] = {mode: [] for mode in MODES}
    seen: dict[str, Mapping[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        model = write_tiny_llama(directory / "model")
        write_chat_tokenizer(model)
        dataset = write_prompts(directory)
        flags = ("--device", arguments.device, "--dtype", arguments.dtype)
        with running_server(model, directory / "data", *flags, name="tiny") as url:
            for _ in range(arguments.rounds):
                for mode in MODES:
                    seconds, seen[mode] = run_job(spec(url, model, directory, dataset, mode, arguments.steps))
                    times[mode].append(seconds)
    medians = {mode: statistics.median(values) for mode, values in times.items()}
    results = {}
    for mode, seconds in medians.items():
        results[mode] = {
            "seconds": round(seconds, 2),
            "ratio": round(medians["sync"] / seconds, 2),
            "max_staleness": seen[mode]["async/max_staleness_observed"],
            "max_steps_off_policy": MODES[mode].get("max_steps_off_policy", 0),
        }
        print(f"{mode:20} {results[mode]}")
    ratios = [results[mode]["ratio"] for mode in MODES if mode != "sync"]
    summary = {"goal": GOAL, "ratio": min(ratios), "steps": arguments.steps, "rollout_wait_s": [SHORTEST_S, LONGEST_S]}
    report("jobs_async", arguments.device, {**summary, "modes": results})


if __name__ == "__main__":
    main()
