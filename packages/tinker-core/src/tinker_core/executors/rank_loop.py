"""The loop of one rank: run commands, and let decoding and training take turns.

Every rank runs the same ticks.  A tick takes the commands that have arrived, lets the sampler compute one token for
each running sequence, and then advances training by one micro-pass or one whole operation.  So no gap between two
tokens of a sample spans more than one micro-pass.  Only rank 0 chooses what a tick holds; the others are told, and
everything after that choice is a function of state that is equal in all ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Protocol

import attrs

from tinker_core.encoding import Nothing
from tinker_core.errors import StorageError, TinkerError, UnsupportedFeatureError
from tinker_core.executors.protocol import (
    CancelCall,
    GroupCapabilities,
    ModelName,
    PublishCall,
    RetireCall,
    SaveRevisionCall,
    StateCall,
    WaitingCall,
)
from tinker_core.interfaces import RankSampler, StateWriter, Trainer
from tinker_core.types import PreparedModelPassBatch, PreparedSample, RequestError, SampleResult


@attrs.frozen(kw_only=True)
class Command:
    """One command with its decoded payload."""

    call_id: int
    method: str
    payload: Any


class Answers(Protocol):
    """Where results go; does nothing in ranks other than 0."""

    def result(self, command: Command, value: object) -> None:
        """Answer a command."""

    def error(self, command: Command, error: RequestError) -> None:
        """Answer a command with its error."""


class Inbox(Protocol):
    """Where a tick's commands come from."""

    def receive(self, *, block: bool) -> Sequence[Command] | None:
        """The commands of the next tick, possibly none if not ``block``; None when the loop shall end."""


class Writes(Protocol):
    """Where a rank hands over captured state, to be written while it goes on."""

    def start(self, command: Command, write: Callable[[], None]) -> None:
        """Queue a write; the command is answered when it is done."""


def describe_error(error: BaseException) -> RequestError:
    """An exception as it crosses a process border."""
    if isinstance(error, TinkerError):
        return RequestError(category=error.category, code=type(error).__name__, message=str(error))
    return RequestError(category="server", code=type(error).__name__, message=f"{type(error).__name__}: {error}")


def write_and_answer(command: Command, write: Callable[[], None], answers: Answers) -> None:
    """Run a write of captured state and answer its command.

    Only rank 0 writes and no rank's state depends on it, so a failure of whatever kind leaves a larger world in step.
    """
    try:
        write()
    except OSError as error:
        what = f"cannot write {error.filename or 'the state'}: {error.strerror or error}"
        answers.error(command, describe_error(StorageError(f"{what}; check free space and permissions")))
    except Exception as error:
        answers.error(command, describe_error(error))
    else:
        answers.result(command, Nothing())


class RankLoop:
    """Drives one trainer and, if the group has one, its rank sampler."""

    def __init__(
        self,
        trainer: Trainer,
        sampler: RankSampler | None,
        inbox: Inbox,
        answers: Answers,
        *,
        world_size: int = 1,
        writes: Writes | None = None,
    ) -> None:
        """Without ``writes`` state is written in the loop: for ranks other than 0, whose writers write nothing."""
        self._trainer = trainer
        self._sampler = sampler
        self._inbox = inbox
        self._answers = answers
        self._world_size = world_size
        self._writes = writes
        self._training: deque[Command] = deque()
        self._pass: tuple[Command, Generator[None, None, object]] | None = None
        self._samples: dict[str, Command] = {}
        self._immediate: dict[str, Callable[[Command], None]] = {
            "capabilities": self._capabilities,
            "publish": self._publish,
            "save_revision": self._save_revision,
            "retire": self._retire,
            "sample": self._sample,
            "cancel": self._cancel,
            "is_waiting": self._is_waiting,
        }
        self._captures: dict[str, Callable[[StateCall], StateWriter]] = {
            "snapshot": self._snapshot,
            "export": self._export,
        }
        self._operations: dict[str, Callable[[Any], object]] = {
            "create": trainer.create,
            "optim_step": trainer.optim_step,
            "restore": self._restore,
            "unload": self._unload,
        }

    def run(self) -> None:
        """Tick until the inbox ends."""
        while True:
            commands = self._inbox.receive(block=not self.has_work)
            if commands is None:
                return
            self.tick(commands)

    @property
    def has_work(self) -> bool:
        """Whether a tick without commands would do anything."""
        sampling = self._sampler is not None and self._sampler.has_work
        return sampling or self._pass is not None or bool(self._training)

    def tick(self, commands: Sequence[Command]) -> None:
        """Take commands, then one decode step, then one micro-pass or one training operation."""
        for command in commands:
            run = self._immediate.get(command.method)
            if run is None:
                self._training.append(command)
            else:
                self._guard(command, run, command)
        if self._sampler is not None and self._sampler.has_work:
            for result in self._sampler.step():
                self._answer_sample(result)
        self._advance_training()

    def _advance_training(self) -> None:
        if self._pass is None and self._training:
            command = self._training.popleft()
            if command.method == "forward_backward":
                batch: PreparedModelPassBatch = command.payload
                self._pass = (command, self._trainer.forward_backward(batch))
            else:
                run = self._run_capture if command.method in self._captures else self._run_operation
                self._guard(command, run, command)
                return
        if self._pass is not None:
            self._guard(self._pass[0], self._advance_pass, *self._pass)

    def _advance_pass(self, command: Command, steps: Generator[None, None, object]) -> None:
        self._pass = None  # an exception ends the pass
        try:
            next(steps)
        except StopIteration as stop:
            self._answers.result(command, stop.value)
        else:
            self._pass = (command, steps)

    def _run_operation(self, command: Command) -> None:
        value = self._operations[command.method](command.payload)
        self._answers.result(command, Nothing() if value is None else value)

    def _run_capture(self, command: Command) -> None:
        call: StateCall = command.payload
        write = partial(self._captures[command.method](call), call.directory)
        if call.background:
            self._write(command, write)
        else:
            write_and_answer(command, write, self._answers)

    def _write(self, command: Command, write: Callable[[], None]) -> None:
        """Answer a command when its files are written, in the background where there is one."""
        if self._writes is not None:
            self._writes.start(command, write)
        else:
            write_and_answer(command, write, self._answers)

    def _guard(self, command: Command, run: Callable[..., None], *args: object) -> None:
        """Answer a command's exception as its error; in a larger world an unexpected one ends the rank.

        The ranks of a world must stay in step.  A deliberate error is a function of the shared state, so every rank
        raised it; anything else may have happened here only, and the next collective would hang.  It may also be how
        the death of another rank looks from here, so the command is not blamed for it: it runs again with new workers.
        """
        try:
            run(*args)
        except TinkerError as error:
            self._answers.error(command, describe_error(error))
        except Exception as error:
            if self._world_size > 1:
                raise
            self._answers.error(command, describe_error(error))

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _require_sampler(self) -> RankSampler:
        if self._sampler is None:
            raise UnsupportedFeatureError("this base model was started without a sampler in its ranks")
        return self._sampler

    def _capabilities(self, command: Command) -> None:
        sampler = self._sampler.capabilities() if self._sampler is not None else None
        self._answers.result(command, GroupCapabilities(trainer=self._trainer.capabilities(), sampler=sampler))

    def _publish(self, command: Command) -> None:
        call: PublishCall = command.payload
        self._require_sampler().publish(call.revision, call.ref)
        self._answers.result(command, Nothing())

    def _save_revision(self, command: Command) -> None:
        call: SaveRevisionCall = command.payload
        self._write(command, partial(self._require_sampler().capture_revision(call.revision), call.directory))

    def _retire(self, command: Command) -> None:
        call: RetireCall = command.payload
        self._require_sampler().retire(call.revision)
        self._answers.result(command, Nothing())

    def _sample(self, command: Command) -> None:
        sample: PreparedSample = command.payload
        sampler = self._require_sampler()
        self._samples[sample.request_id] = command
        try:
            sampler.submit(sample)
        except BaseException:
            del self._samples[sample.request_id]
            raise

    def _cancel(self, command: Command) -> None:
        call: CancelCall = command.payload
        self._require_sampler().cancel(call.request_id)
        self._samples.pop(call.request_id, None)
        self._answers.result(command, Nothing())

    def _is_waiting(self, command: Command) -> None:
        call: WaitingCall = command.payload
        self._answers.result(command, self._require_sampler().is_waiting(call.request_id))

    def _answer_sample(self, result: SampleResult) -> None:
        command = self._samples.pop(result.request_id, None)
        if command is None:
            return  # cancelled between its last token and this step
        if result.error is not None:
            self._answers.error(command, result.error)
        else:
            self._answers.result(command, result.output)

    # --- state ------------------------------------------------------------------------------------------------------

    def _snapshot(self, call: StateCall) -> StateWriter:
        return self._trainer.capture(call.model_id, call.parts)

    def _restore(self, call: StateCall) -> None:
        self._trainer.restore(call.model_id, call.directory, call.parts)

    def _export(self, call: StateCall) -> StateWriter:
        return self._trainer.capture_weights(call.model_id)

    def _unload(self, call: ModelName) -> None:
        self._trainer.unload(call.model_id)
