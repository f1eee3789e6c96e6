"""Supervised jobs against a real server with a tiny model."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import tinker
import torch
from peft import PeftModel
from tinker import types
from transformers import AutoTokenizer

from tests.jobs.conftest import JobServer
from tests.jobs.supervised import Outcome, Row, run_job, sft_spec, sums, write_dataset
from tests.jobs.workers import WorkerProcess
from tests.peft_reference import load_peft
from tinker_core.storage.checkpoints import safe_directory_name
from tinker_core.types import TinkerPath
from tinker_jobs.errors import JobFailedError
from tinker_jobs.protocol import EventType, JobEvent, JobSpec
from tinker_jobs.refs import FrozenCapability
from tinker_jobs.rows import read_conversation
from tinker_jobs.sft.examples import Example, ExampleMaker
from tinker_jobs.sft.schedule import Checkpoints, Schedule

FAST = {"lora_rank": 4, "learning_rate": 0.01}
ALPHA = 8
"""Not the server's default."""
API_KEY = "tml-local"


def examples_of(server: JobServer, rows: Sequence[Row], system: str | None = None) -> list[Example]:
    maker = ExampleMaker(AutoTokenizer.from_pretrained(server.model), system=system, max_length=512)
    conversations = [read_conversation(row) for row in rows]
    return [example for one in conversations if one is not None for example in maker.make(one)]


def exported(server: JobServer, path: str) -> Path:
    """The directory of a checkpoint, which PEFT reads."""
    saved = TinkerPath.parse(path)
    directory = server.data_dir / "checkpoints" / safe_directory_name(saved.run_id)
    (found,) = directory.glob(f"versions/{saved.checkpoint_id}/*")
    return found


def resumption(spec: JobSpec, first: Outcome) -> JobSpec:
    """What the next process is told after one that ended early."""
    steps = [event.metrics for event in first.of(EventType.STEP_COMPLETE)]
    metrics = {name: [value for step in steps for value in step[name]] for name in steps[0]}
    artifacts = first.of(EventType.CHECKPOINT_SAVED)[-1].artifacts
    return attrs.evolve(spec, attempt=2, resume=first.resume, metrics=metrics, artifacts=artifacts)


def assert_same(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value), name


def new_client(service: tinker.ServiceClient, server: JobServer) -> tinker.TrainingClient:
    metadata = {"tinker_server.lora_alpha": str(ALPHA)}
    return service.create_lora_training_client(base_model=server.model, rank=4, seed=0, user_metadata=metadata).result()


def plain_loop(server: JobServer, batches: list[list[list[types.Datum]]], held_out: list[types.Datum]) -> list[float]:
    """What anyone would write with the SDK: the sum of losses of each step, and of the held-out data at the end."""
    adam = types.AdamParams(learning_rate=0.01, beta1=0.9, beta2=0.95, eps=1e-8)
    with tinker.ServiceClient(base_url=server.url, api_key=API_KEY) as service:
        client = new_client(service, server)
        losses = []
        for step in batches:
            results = [client.forward_backward(batch, "cross_entropy").result() for batch in step]
            client.optim_step(adam).result()
            losses.append(sum(result.metrics["loss:sum"] for result in results))
        losses.append(client.forward(held_out, "cross_entropy").result().metrics["loss:sum"])
    return losses


def summed_loss(model: PeftModel, examples: list[Example]) -> torch.Tensor:
    losses = []
    for example in examples:
        tokens = torch.from_numpy(example.tokens.astype(np.int64))
        logprobs = torch.log_softmax(model(input_ids=tokens[None, :-1]).logits[0], -1)
        chosen = logprobs.gather(1, tokens[1:, None])[:, 0]
        losses.append(-chosen[torch.from_numpy(example.is_learned[1:])].sum())
    return torch.stack(losses).sum()


def peft_loop(
    server: JobServer, batches: list[list[list[Example]]], held_out: list[Example], initial: Path
) -> list[float]:
    """The same with PyTorch alone, from the adapter that the server begins with."""
    model = load_peft(Path(server.model), {"default": initial})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trained, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)

    losses = []
    for step in batches:
        loss = summed_loss(model, [example for batch in step for example in batch])
        loss.backward()
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        return [*losses, summed_loss(model, held_out).item()]


def test_a_job_does_what_a_plain_loop_does_and_what_peft_does(job_server: JobServer, tmp_path: Path) -> None:
    rows, held_out_rows = sums(6), sums(3, start=20)
    refs = {
        "dataset": write_dataset(tmp_path, "sums", rows),
        "eval_dataset": write_dataset(tmp_path, "more-sums", held_out_rows),
    }
    config = {
        **FAST,
        "lora_alpha": ALPHA,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "steps": 3,
        "checkpoint_interval": 2,
    }
    end = run_job(sft_spec(job_server, tmp_path / "job", config, refs)).end
    metrics = end.metrics

    examples, held_out = examples_of(job_server, rows), examples_of(job_server, held_out_rows)
    schedule = Schedule(num_examples=6, batch_size=2, accumulation=2, steps=3, epochs=None)
    batches = [[[examples[i] for i in batch] for batch in schedule.batches(step)] for step in (1, 2, 3)]
    assert [[len(batch) for batch in step] for step in batches] == [[2, 2], [2], [2, 2]]
    counts = [sum(example.num_learned for batch in step for example in batch) for step in batches]
    counts.append(sum(example.num_learned for example in held_out))

    data = [[[example.datum() for example in batch] for batch in step] for step in batches]
    losses = [*metrics["train/loss"], metrics["eval/loss"]]
    plain = plain_loop(job_server, data, [example.datum() for example in held_out])
    np.testing.assert_allclose(np.multiply(losses, counts), plain, rtol=1e-6)

    with tinker.ServiceClient(base_url=job_server.url, api_key=API_KEY) as service:
        client = new_client(service, job_server)
        initial = client.save_weights_for_sampler("initial").result().path
    expected = peft_loop(job_server, batches, held_out, exported(job_server, initial))
    np.testing.assert_allclose(np.multiply(losses, counts), expected, rtol=1e-4)
    assert losses[2] < losses[0] - 0.1

    saved = exported(job_server, end.artifacts["checkpoints"][-1])
    assert json.loads((saved / "adapter_config.json").read_text())["lora_alpha"] == ALPHA
    trained = load_peft(Path(job_server.model), {"default": saved})
    with torch.no_grad():
        assert summed_loss(trained, held_out).item() == pytest.approx(plain[-1], rel=1e-5)


def test_metrics_and_artifacts_have_every_name_of_the_reference(job_server: JobServer, tmp_path: Path) -> None:
    capability = FrozenCapability(name="helper", version="1.0.0", prompt="Add up.", runtime_digest="sha256:00")
    refs = {
        "capability": capability,
        "trajectory_datasets": (write_dataset(tmp_path, "walks", sums(2, start=10)),),
        "dataset": write_dataset(tmp_path, "sums", sums(3)),
        "eval_dataset": write_dataset(tmp_path, "held-out", sums(2, start=20)),
    }
    outcome = run_job(
        sft_spec(job_server, tmp_path / "job", {**FAST, "batch_size": 2, "steps": 5, "checkpoint_interval": 2}, refs)
    )
    assert [event.event_type for event in outcome.events if event.event_type is not EventType.LOG] == [
        EventType.TRAINING_START,
        EventType.STEP_COMPLETE,
        EventType.STEP_COMPLETE,
        EventType.CHECKPOINT_SAVED,
        EventType.STEP_COMPLETE,
        EventType.STEP_COMPLETE,
        EventType.CHECKPOINT_SAVED,
        EventType.STEP_COMPLETE,
        EventType.CHECKPOINT_SAVED,
        EventType.CHECKPOINT_SAVED,
        EventType.EVAL_COMPLETE,
        EventType.TRAINING_END,
    ]
    assert outcome.saved == ["checkpoint-1-step2", "checkpoint-2-step4", "checkpoint-3-step5", "final"]

    metrics, losses = outcome.end.metrics, outcome.end.metrics["train/loss"]
    examples = examples_of(job_server, [*sums(2, start=10), *sums(3)], system="Add up.")
    schedule = Schedule(num_examples=5, batch_size=2, accumulation=1, steps=5, epochs=None)
    used = [examples[i] for step in range(1, 6) for batch in schedule.batches(step) for i in batch]
    assert metrics == {
        "train/steps": 5,
        "train/num_examples": 5,
        "train/num_sequences_processed": 9,
        "train/num_tokens_processed": sum(len(example.tokens) - 1 for example in used),
        "train/gradient_accumulation_steps": 1,
        "train/epochs_completed": 1,
        "train/loss_last": losses[-1],
        "train/loss_mean": pytest.approx(np.mean(losses)),
        "train/loss_best": min(losses),
        "eval/num_examples": 2,
        "eval/loss": metrics["eval/loss_history"][0],
        "steps": [1, 2, 3, 4, 5],
        "train/loss": losses,
        "train_loss": losses,
        "train/learning_rate": [0.01] * 5,
        "learning_rate": [0.01] * 5,
        "train/num_sequences": [2, 2, 1, 2, 2],
        "train/num_tokens": metrics["train/num_tokens"],
        "eval/steps": [5],
        "eval/loss_history": [metrics["eval/loss"]],
    }
    live = [event.metrics for event in outcome.of(EventType.STEP_COMPLETE)]
    series = [name for name, value in metrics.items() if isinstance(value, list) and not name.startswith("eval/")]
    assert {name: [value for one in live for value in one[name]] for name in series} == {
        name: metrics[name] for name in series
    }
    assert outcome.of(EventType.EVAL_COMPLETE)[0].metrics["eval/loss"] == metrics["eval/loss"]

    artifacts = {name: value for name, value in outcome.end.artifacts.items() if name != "plots"}
    paths = [event.data["path"] for event in outcome.of(EventType.CHECKPOINT_SAVED)]
    assert artifacts == {
        "capability": "helper@1.0.0",
        "checkpoints": paths,
        "dataset": "sums@1.0.0",
        "trajectory_datasets": ["walks@1.0.0"],
        "eval_dataset": "held-out@1.0.0",
    }
    assert all(path.startswith("tinker://") and "/sampler_weights/" in path for path in paths)

    rest = tinker.RestClient(base_url=job_server.url, api_key=API_KEY)
    kept = rest.list_checkpoints(TinkerPath.parse(paths[0]).run_id).result().checkpoints
    assert sorted(one.tinker_path for one in kept) == sorted([*paths, outcome.resume.state_path])


def cancel_after_first_step(event: JobEvent, cancelled: threading.Event) -> None:
    if event.event_type is EventType.STEP_COMPLETE:
        cancelled.set()


def cancel_at_start(event: JobEvent, cancelled: threading.Event) -> None:
    if event.event_type is EventType.TRAINING_START:
        cancelled.set()


def test_what_was_left_open_has_the_defaults_of_the_reference(job_server: JobServer, tmp_path: Path) -> None:
    refs = {"dataset": write_dataset(tmp_path, "sums", sums(17))}
    outcome = run_job(sft_spec(job_server, tmp_path / "job", {}, refs), cancel_at_start)
    (start,) = outcome.of(EventType.TRAINING_START)
    assert start.data == {
        "model": job_server.model,
        "max_sequence_length": 512,
        "batch_size": 16,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-4,
        "steps": 2,
        "steps_per_epoch": 2,
        "lora_rank": 16,
        "checkpoint_interval": 10,
        "num_examples": 17,
        "seed": 0,
    }
    assert (outcome.steps, outcome.saved) == ([], [])
    logged = [event.message for event in outcome.of(EventType.LOG)]
    assert logged == [
        "max_sequence_length is 512, the model's context, instead of 2048",
        "sums@1.0.0: 17 examples from 17 rows",
        "the model's chat template ends replies without a special token: when to stop is not learned",
    ]


@pytest.mark.slow
def test_a_stopped_job_saves_nothing_more_and_its_next_process_does_the_same_steps(
    job_server: JobServer, tmp_path: Path
) -> None:
    def cancel_at_three(event: JobEvent, cancelled: threading.Event) -> None:
        if event.event_type is EventType.STEP_COMPLETE and event.metrics["steps"] == [3]:
            cancelled.set()

    refs = {
        "dataset": write_dataset(tmp_path, "sums", sums(5)),
        "eval_dataset": write_dataset(tmp_path, "held-out", sums(2, start=20)),
    }
    spec = sft_spec(job_server, tmp_path / "job", {**FAST, "batch_size": 2, "steps": 5, "checkpoint_interval": 2}, refs)
    whole, stopped = run_job(spec), run_job(spec, cancel_at_three)
    # The server was at step 4 when step 3 was reported.
    assert (stopped.was_cancelled, stopped.steps, stopped.saved) == (True, [1, 2, 3, 4], ["checkpoint-1-step2"])

    resumed = run_job(resumption(spec, stopped))
    assert resumed.steps == [3, 4, 5]
    assert resumed.of(EventType.TRAINING_START)[0].message.endswith("resumed after step 2")
    assert resumed.saved == ["checkpoint-2-step4", "checkpoint-3-step5", "final"]
    assert len(resumed.end.artifacts["checkpoints"]) == 4
    assert_same(resumed.end.metrics, whole.end.metrics)

    # A process that ended between its last save and its end leaves the evaluation to the next.
    again = run_job(resumption(spec, whole))
    assert (again.steps, again.saved) == ([], [])
    assert_same(again.end.metrics, whole.end.metrics)
    assert again.end.artifacts["checkpoints"] == whole.end.artifacts["checkpoints"]


@pytest.mark.slow
def test_a_killed_job_does_the_same_steps_in_its_next_process(job_server: JobServer, tmp_path: Path) -> None:
    refs = {
        "dataset": write_dataset(tmp_path, "sums", sums(7)),
        "eval_dataset": write_dataset(tmp_path, "held-out", sums(2, start=20)),
    }
    config = {**FAST, "batch_size": 2, "steps": 7, "checkpoint_interval": 2}
    whole = run_job(sft_spec(job_server, tmp_path / "whole", config, refs))

    spec = sft_spec(job_server, tmp_path / "killed", config, refs)
    seen: list[JobEvent] = []
    with WorkerProcess(spec) as worker:
        for event in worker.events():
            seen.append(event)
            if event.event_type is EventType.STEP_COMPLETE and event.metrics["steps"] == [5]:
                break
    resumed = run_job(resumption(spec, Outcome(seen, was_cancelled=False)))
    assert resumed.steps == [5, 6, 7]
    assert resumed.of(EventType.TRAINING_START)[0].message.endswith("resumed after step 4")
    assert_same(resumed.end.metrics, whole.end.metrics)
    names = [path.rsplit("/", 1)[1] for path in resumed.end.artifacts["checkpoints"]]
    assert names == ["checkpoint-1-step2", "checkpoint-2-step4", "checkpoint-3-step6", "checkpoint-4-step7", "final"]


def test_training_goes_on_from_the_checkpoint_that_the_request_names(job_server: JobServer, tmp_path: Path) -> None:
    rows = sums(2)
    data = [example.datum() for example in examples_of(job_server, rows)]
    with tinker.ServiceClient(base_url=job_server.url, api_key=API_KEY) as service:
        client = new_client(service, job_server)
        client.forward_backward(data, "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=0.01)).result()
        state = client.save_state("begun").result().path
        expected = client.forward(data, "cross_entropy").result().metrics["loss:sum"]
    refs = {"dataset": write_dataset(tmp_path, "sums", rows)}
    spec = sft_spec(job_server, tmp_path / "job", {"steps": 9}, refs, model=state)
    outcome = run_job(spec, cancel_after_first_step)
    count = sum(sum(datum.loss_fn_inputs["weights"].tolist()) for datum in data)
    assert outcome.of(EventType.STEP_COMPLETE)[0].metrics["train/loss"][0] * count == pytest.approx(expected, rel=1e-5)
    assert outcome.of(EventType.TRAINING_START)[0].data["lora_rank"] == 4
    with pytest.raises(JobFailedError, match="has LoRA rank 4; leave lora_rank out"):
        run_job(sft_spec(job_server, tmp_path / "other", {"lora_rank": 8}, refs, model=state))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "no reply"}], "Training inputs did not produce any usable conversations."),
        ([{"prompt": "x" * 600, "answer": "y"}], "Training inputs did not produce any usable conversations."),
        ([*sums(2), {"messages": "hello"}], "dataset sums@1.0.0, sums.jsonl: row 3: messages must be a list"),
        (
            [{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "ls"}}]}]}],
            "dataset sums@1.0.0, sums.jsonl: row 1: the model's chat template does not write the tool call 'ls'",
        ),
    ],
)
def test_what_cannot_be_learned_fails_with_a_reason(
    job_server: JobServer, tmp_path: Path, rows: list[dict[str, object]], message: str
) -> None:
    refs = {"dataset": write_dataset(tmp_path, "sums", rows)}
    with pytest.raises(JobFailedError) as failure:
        run_job(sft_spec(job_server, tmp_path / "job", FAST, refs))
    assert str(failure.value).startswith(message)


def test_what_is_left_out_is_counted_in_the_log(job_server: JobServer, tmp_path: Path) -> None:
    rows = [*sums(3), {"text": "no reply"}, {"prompt": "x" * 600, "answer": "y"}]
    refs = {"dataset": write_dataset(tmp_path, "sums", rows)}
    outcome = run_job(sft_spec(job_server, tmp_path / "job", FAST, refs), cancel_at_start)
    (line,) = [event for event in outcome.of(EventType.LOG) if "sums@1.0.0" in event.message]
    assert line.level == "warning"
    assert line.data == {
        "dataset": "sums@1.0.0",
        "split": "train",
        "num_rows": 5,
        "num_skipped": 1,
        "num_examples": 3,
        "num_truncated": 1,
        "num_dropped": 1,
    }


@pytest.mark.parametrize(
    ("steps", "epochs", "total"), [(None, None, 3), (7, None, 7), (None, 2, 6), (4, 2, 4), (9, 2, 6)]
)
def test_the_smaller_of_steps_and_epochs_ends_a_job(steps: int | None, epochs: int | None, total: int) -> None:
    schedule = Schedule(num_examples=11, batch_size=2, accumulation=2, steps=steps, epochs=epochs)
    assert (schedule.steps_per_epoch, schedule.total_steps) == (3, total)


def test_every_example_is_seen_once_an_epoch_in_another_order_each_time() -> None:
    schedule = Schedule(num_examples=11, batch_size=2, accumulation=2, steps=None, epochs=2)
    steps = [schedule.batches(step) for step in range(1, 7)]
    assert [[len(batch) for batch in step] for step in steps] == [[2, 2], [2, 2], [2, 1]] * 2
    orders = [[int(i) for step in epoch for batch in step for i in batch] for epoch in (steps[:3], steps[3:])]
    assert [sorted(order) for order in orders] == [list(range(11))] * 2
    assert orders[0] != orders[1] != list(range(11))


def test_checkpoints_are_saved_at_every_interval_and_at_the_end() -> None:
    checkpoints = Checkpoints(interval=3, total_steps=7)
    names = [checkpoints.name(step) for step in range(1, 8)]
    assert names == [None, None, "checkpoint-1-step3", None, None, "checkpoint-2-step6", "checkpoint-3-step7"]
