"""GRPO jobs on a real Ray of their own, with real processes that are killed."""

from __future__ import annotations

import importlib.util
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import run_server
from tests.jobs.conftest import JobServer
from tests.jobs.grpo_jobs import (
    grpo_spec,
    make_task,
    outliving,
    processes_with,
    ready_pid,
    stop_by_force,
    trained_positions,
)
from tests.jobs.rl_jobs import final_metrics, messages, of_type
from tests.jobs.smollm2 import find_smollm2
from tests.jobs.workers import WorkerProcess, run_worker
from tinker_jobs.protocol import CANCEL, EventType, JobEvent, JobSpec
from tinker_server.cli import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed"),
    pytest.mark.timeout(900),
]

QUESTIONS = [{"prompt": f"What is {a} + 1?"} for a in range(24)]
LEARNING = {
    "num_rollouts": 32,
    "batch_size": 4,
    "learning_rate": 0.02,
    "num_rollout_workers": 2,
    "reward_recipe": {"name": "digits", "params": {}},
}
TASK = make_task(max_new_tokens=6, epochs=3, lora_rank=8)


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    """A job's directory, which all of its processes know and none outlives."""
    yield tmp_path
    assert outliving(str(tmp_path)) == {}
    assert not (tmp_path / "ray").exists()


def spec_of(job_server: JobServer, directory: Path, **config: object) -> JobSpec:
    return grpo_spec(job_server.url, job_server.model, directory, QUESTIONS, {**LEARNING, **config}, TASK)


def run_killing_a_worker(spec: JobSpec, step: int) -> list[JobEvent]:
    """The events of a job one of whose rollout workers is killed after a step."""
    events, workers = [], []
    with WorkerProcess(spec) as process:
        for event in process.events():
            events.append(event)
            if pid := ready_pid(event):
                workers.append(pid)
            if event.event_type is EventType.STEP_COMPLETE and event.data["step"] == step:
                stop_by_force(workers[0])
        assert process.process.wait(timeout=180) == 0
    assert events[-1].event_type is EventType.TRAINING_END, events[-1]
    return events


@pytest.mark.parametrize("mode", ["async", "colocated", "distributed"])
def test_a_job_learns_and_loses_no_step_while_a_rollout_worker_is_killed(
    job_server: JobServer, directory: Path, mode: str
) -> None:
    events = run_killing_a_worker(spec_of(job_server, directory, execution_mode=mode), step=4)
    metrics = final_metrics(events)
    assert metrics["steps"] == list(range(1, 19))
    assert trained_positions(events) == list(range(72))
    assert metrics["train/rollout_workers_lost"] == 1
    (lost,) = (line for line in messages(events, "warning") if "was lost" in line)
    assert "ActorDiedError" in lost
    assert metrics["train/reward"][0] < 0.3
    assert max(metrics["train/reward"]) >= 0.9
    assert (max(metrics["train/staleness"]) > 0) == (mode == "async")


def test_a_cancelled_job_stops_between_steps(job_server: JobServer, directory: Path) -> None:
    with WorkerProcess(spec_of(job_server, directory)) as process:
        events = []
        for event in process.events():
            events.append(event)
            if event.event_type is EventType.STEP_COMPLETE and event.data["step"] == 2:
                process.send(CANCEL)
        assert process.process.wait(timeout=180) == 0
    assert events[-1].event_type is EventType.CANCELLED
    assert len(of_type(events, EventType.STEP_COMPLETE)) < 18


def test_an_error_of_a_recipe_inside_a_worker_ends_the_job_and_names_the_row(
    job_server: JobServer, tmp_path: Path
) -> None:
    rows = [{"prompt": "a", "divisor": "1"}, {"prompt": "b", "divisor": "0"}]
    config = {"num_rollouts": 4, "batch_size": 2, "reward_recipe": {"name": "divide", "params": {}}}
    events = run_worker(grpo_spec(job_server.url, job_server.model, tmp_path, rows, config, TASK))
    assert events[-1].event_type is EventType.TRAINING_ERROR
    assert "prompts@1.0.0 row 2: divide failed: ZeroDivisionError" in str(events[-1].error)
    assert outliving(str(tmp_path)) == {}


def test_nothing_of_ray_outlives_a_job_that_is_killed(job_server: JobServer, tmp_path: Path) -> None:
    with WorkerProcess(spec_of(job_server, tmp_path)) as process:
        for event in process.events():
            if event.event_type is EventType.STEP_COMPLETE:
                break
        assert len(processes_with(str(tmp_path))) > 5
        process.process.kill()
        assert outliving(str(tmp_path)) == {}
    assert [
        link for link in Path(tempfile.gettempdir()).glob("tinker-ray-*/r") if link.readlink().parent == tmp_path
    ] == []


def test_a_job_that_is_submitted_to_a_server_runs_on_ray(
    job_server: JobServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {
        "datasets/ray-prompts/1/data.jsonl": "".join(f"{json.dumps(row)}\n" for row in QUESTIONS),
        "capabilities/ray-helper/1/prompt.md": "Be brief.",
        "tasks/ray-task/1/task.yaml": "grpo: {max_new_tokens: 6, lora_rank: 4}\n",
    }
    for name, text in files.items():
        path = job_server.data_dir / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    request = {
        "backend": "ray",
        "trainer_type": "rl",
        "model": job_server.model,
        "capability_ref": {"name": "ray-helper", "version": "1"},
        "config": {
            "task_ref": "ray-task",
            "prompt_dataset_ref": {"name": "ray-prompts", "version": "1"},
            "reward_recipe": {"name": "contains_v1", "params": {"needle": "a", "baseline": "leave_one_out"}},
        },
    }
    (tmp_path / "job.json").write_text(json.dumps(request))
    monkeypatch.setenv("TINKER_BASE_URL", job_server.url)
    assert main(["jobs", "submit", str(tmp_path / "job.json"), "--follow"]) == 0
    output = capsys.readouterr().out
    assert "step 3 of 3" in output
    assert "completed" in output.splitlines()[-1]
    assert outliving(str(job_server.data_dir / "jobs")) == {}


def test_a_real_chat_model_learns_contains_v1_while_a_rollout_worker_is_killed(tmp_path: Path) -> None:
    model = find_smollm2()
    rows = [{"prompt": f"What is {a} + {b}?"} for a in range(1, 10) for b in range(1, 10)]
    config = {
        "num_rollouts": 24,
        "batch_size": 4,
        "learning_rate": 5e-4,
        "num_rollout_workers": 2,
        "execution_mode": "distributed",
        "reward_recipe": {"name": "contains_v1", "params": {"needle": "="}},
    }
    task = make_task("Reply with only the number.", max_new_tokens=8)
    flags = ("--base-model", model, "--data-dir", str(tmp_path / "data"), "--dtype", "bfloat16")
    with run_server(*flags) as url:
        spec = grpo_spec(url, model, tmp_path / "job", rows[:48], config, task)
        events = run_killing_a_worker(spec, step=3)
    metrics = final_metrics(events)
    assert metrics["steps"] == list(range(1, 13))
    assert metrics["train/rollout_workers_lost"] == 1
    assert metrics["train/reward"][0] < 0.5
    assert max(metrics["train/reward"][-4:]) >= 0.9
