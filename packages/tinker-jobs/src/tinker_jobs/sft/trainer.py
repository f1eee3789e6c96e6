"""Supervised fine-tuning: the assistant's replies, learned with ``cross_entropy``."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import tinker
from tinker import types

from tinker_jobs.errors import CancelledJobError
from tinker_jobs.protocol import EventType
from tinker_jobs.requests import TinkerSFTJobConfig
from tinker_jobs.sft.data import read_evaluation_examples, read_training_examples
from tinker_jobs.sft.examples import Example
from tinker_jobs.sft.metrics import StepReport, reports_of, series, summary, token_loss
from tinker_jobs.sft.schedule import Checkpoints, Schedule
from tinker_jobs.worker.run import JobRun

LOSS: types.LossFnType = "cross_entropy"
FINAL = "final"
DEFAULT_MAX_SEQUENCE_LENGTH = 2048
DEFAULT_BATCH_SIZE = 16
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_CHECKPOINT_INTERVAL = 10
SEED = 0


def run_sft(run: JobRun) -> None:
    """Train on the job's conversations. Raises `JobFailedError`, `CancelledJobError`, and the SDK's errors."""
    config = run.request.config
    assert isinstance(config, TinkerSFTJobConfig)
    max_length = _max_length(run, config)
    examples = read_training_examples(run, max_length)
    held_out = read_evaluation_examples(run, max_length)
    schedule = Schedule(
        num_examples=len(examples),
        batch_size=config.batch_size or DEFAULT_BATCH_SIZE,
        accumulation=config.gradient_accumulation_steps or 1,
        steps=config.steps,
        epochs=config.epochs,
        seed=SEED,
    )
    interval = config.checkpoint_interval or DEFAULT_CHECKPOINT_INTERVAL
    client = run.open_training_client(rank=config.lora_rank, alpha=config.lora_alpha, seed=SEED)
    training = _Training(
        run=run,
        client=client,
        examples=examples,
        schedule=schedule,
        checkpoints=Checkpoints(interval=interval, total_steps=schedule.total_steps),
        adam=types.AdamParams(
            learning_rate=config.learning_rate or DEFAULT_LEARNING_RATE, beta1=0.9, beta2=0.95, eps=1e-8
        ),
        reports=reports_of(run.spec.metrics, run.first_step - 1),
    )
    training.announce(config, max_length)
    training.train()
    training.finish(_evaluate(run, client, held_out, schedule.total_steps))


def _max_length(run: JobRun, config: TinkerSFTJobConfig) -> int:
    """Tokens of a sequence: as asked for, or as many as the model takes."""
    wanted, context = config.max_sequence_length or DEFAULT_MAX_SEQUENCE_LENGTH, run.context_length
    if context is None or wanted <= context:
        return wanted
    level = "info" if config.max_sequence_length is None else "warning"
    run.log(f"max_sequence_length is {context}, the model's context, instead of {wanted}", level=level)
    return context


@attrs.frozen(kw_only=True)
class _Pending:
    """A step that the server was asked to do."""

    step: int
    batches: Sequence[Sequence[Example]]
    passes: Sequence[tinker.APIFuture[types.ForwardBackwardOutput]]
    update: tinker.APIFuture[types.OptimStepResponse]


@attrs.frozen(kw_only=True)
class _Training:
    run: JobRun
    client: tinker.TrainingClient
    examples: Sequence[Example]
    schedule: Schedule
    checkpoints: Checkpoints
    adam: types.AdamParams
    reports: list[StepReport]
    """Of all steps so far, those of earlier processes included."""
    _pending: deque[_Pending] = attrs.field(factory=deque, init=False)

    def announce(self, config: TinkerSFTJobConfig, max_length: int) -> None:
        """Say what is about to be done, with every setting that was left open."""
        resume, total = self.run.spec.resume, self.schedule.total_steps
        settings = {
            "model": self.run.request.model,
            "max_sequence_length": max_length,
            "batch_size": self.schedule.batch_size,
            "gradient_accumulation_steps": self.schedule.accumulation,
            "learning_rate": self.adam.learning_rate,
            "steps": total,
            "steps_per_epoch": self.schedule.steps_per_epoch,
            "lora_rank": self.client.get_info().lora_rank,
            "lora_alpha": config.lora_alpha,
            "checkpoint_interval": self.checkpoints.interval,
            "num_examples": len(self.examples),
            "seed": self.schedule.seed,
        }
        what = f"training on {len(self.examples)} examples for {total} steps"
        self.run.emit(
            EventType.TRAINING_START,
            what if resume is None else f"{what}, resumed after step {resume.step}",
            data={name: value for name, value in settings.items() if value is not None},
        )

    def train(self) -> None:
        """All steps that are left, each asked for while the server is still at the one before it."""
        total = self.schedule.total_steps
        try:
            for step in range(self.run.first_step, total + 1):
                self.run.check_cancelled()
                self._submit(step)
                name = self.checkpoints.name(step)
                # A checkpoint is saved before the next step is asked for: it must hold its own step and no more.
                self._report(leave=0 if name else 1)
                if name:
                    self.run.check_cancelled()
                    self.run.save_checkpoint(self.client, name, step)
        except CancelledJobError:
            # What the server does already is done, and charged: it is reported.
            self._report(leave=0)
            raise
        # A process that ended after its last save leaves nothing to save.
        if not self.run.checkpoints or not self.run.checkpoints[-1].endswith(f"/{FINAL}"):
            self.run.check_cancelled()
            self.run.save_checkpoint(self.client, FINAL, total)

    def finish(self, evaluation: Mapping[str, Any]) -> None:
        """Report the end with all metrics and artifacts."""
        total = self.schedule.total_steps
        metrics = {
            "train/num_examples": len(self.examples),
            "train/gradient_accumulation_steps": self.schedule.accumulation,
            "train/epochs_completed": self.schedule.epochs_completed(total),
            **summary(self.reports),
            **series(self.reports),
            **evaluation,
        }
        loss = metrics["train/loss_last"]
        self.run.emit(
            EventType.TRAINING_END,
            f"complete after {total} steps: loss {loss:.4f}",
            metrics=metrics,
            artifacts={**self.run.refs.artifacts(), "checkpoints": list(self.run.checkpoints)},
        )

    def _submit(self, step: int) -> None:
        batches = [[self.examples[index] for index in batch] for batch in self.schedule.batches(step)]
        passes = [self.client.forward_backward([one.datum() for one in batch], LOSS) for batch in batches]
        update = self.client.optim_step(self.adam)
        self._pending.append(_Pending(step=step, batches=batches, passes=passes, update=update))

    def _report(self, *, leave: int) -> None:
        """Wait for all pending steps but the last ``leave``, and report each."""
        while len(self._pending) > leave:
            pending = self._pending.popleft()
            outputs = [one.result() for one in pending.passes]
            pending.update.result()
            sequences = [example for batch in pending.batches for example in batch]
            report = StepReport(
                step=pending.step,
                loss=token_loss(outputs, pending.batches),
                learning_rate=self.adam.learning_rate,
                num_sequences=len(sequences),
                num_tokens=sum(len(example.tokens) - 1 for example in sequences),
            )
            self.reports.append(report)
            self.run.emit(
                EventType.STEP_COMPLETE,
                f"step {report.step}/{self.schedule.total_steps}: loss {report.loss:.4f}",
                metrics=report.metrics(),
            )


def _evaluate(run: JobRun, client: tinker.TrainingClient, held_out: Sequence[Example], step: int) -> dict[str, Any]:
    """The loss on held-out examples after training; nothing when there are none."""
    if not held_out:
        return {}
    run.check_cancelled()
    output = client.forward([example.datum() for example in held_out], LOSS).result()
    loss = token_loss([output], [held_out])
    metrics = {
        "eval/num_examples": len(held_out),
        "eval/loss": loss,
        "eval/steps": [step],
        "eval/loss_history": [loss],
    }
    run.emit(
        EventType.EVAL_COMPLETE,
        f"loss {loss:.4f} on {len(held_out)} held-out examples after step {step}",
        metrics=metrics,
    )
    return metrics
