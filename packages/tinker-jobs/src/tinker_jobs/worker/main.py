"""Reads what to do, does it, and tells how it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import BinaryIO

import tinker

from tinker_core.errors import TinkerError
from tinker_core.rewards import RewardError
from tinker_jobs.errors import CancelledJobError
from tinker_jobs.protocol import CANCEL, EventType, JobEvent, JobSpec, decode_spec, encode
from tinker_jobs.worker.run import JobRun

SERVER_GONE = 3
"""Exit status of a process whose server has ended."""
_PR_SET_PDEATHSIG = 1
_CHUNK_BYTES = 1024 * 1024


def main() -> int:
    """Run the job that standard input describes; 0 when its end was reported."""
    _die_with_server()
    events = _take_standard_output()
    commands = _read_lines(sys.stdin.fileno())
    spec = decode_spec(next(commands, b""))
    cancelled = threading.Event()
    threading.Thread(target=_listen, args=(commands, cancelled), daemon=True).start()
    lock = threading.Lock()

    def send(event: JobEvent) -> None:
        with lock:
            events.write(encode(event))
            events.flush()

    _run(spec, send, cancelled)
    return 0


def _die_with_server() -> None:
    # The end of standard input tells of it too, but only once Python runs: not in the middle of a long computation.
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _take_standard_output() -> BinaryIO:
    """Standard output for events alone: whatever libraries print goes to standard error."""
    events = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return events


def _read_lines(descriptor: int) -> Iterator[bytes]:
    """Lines as they come.

    Not through a file: of one with a buffer, the thread that listens would hold the lock when the interpreter ends, and
    one without reads a byte at a time.
    """
    line = bytearray()
    while chunk := os.read(descriptor, _CHUNK_BYTES):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            yield bytes(line + end + b"\n")
            line.clear()
        line += rest


def _listen(commands: Iterator[bytes], cancelled: threading.Event) -> None:
    for line in commands:
        if line == CANCEL:
            cancelled.set()
    os._exit(SERVER_GONE)


def _run(spec: JobSpec, send: Callable[[JobEvent], None], cancelled: threading.Event) -> None:
    try:
        run = JobRun(spec, send, cancelled)
        train = trainer_of(run.request.backend, run.request.trainer_type)
        train(run)
    except CancelledJobError:
        send(JobEvent(event_type=EventType.CANCELLED, message="stopped as asked"))
    except (TinkerError, RewardError, tinker.TinkerError) as error:
        send(_failure(str(error)))
    except Exception as error:
        traceback.print_exc()
        send(_failure(f"{type(error).__name__}: {error}"))


def _failure(error: str) -> JobEvent:
    return JobEvent(event_type=EventType.TRAINING_ERROR, message=f"failed: {error}", level="error", error=error)


def trainer_of(backend: str, trainer_type: str) -> Callable[[JobRun], None]:
    """The trainer of a kind of job."""
    if trainer_type == "sft":
        from tinker_jobs.sft.trainer import run_sft

        return run_sft
    if backend == "ray":
        from tinker_jobs.grpo.trainer import run_grpo

        return run_grpo
    from tinker_jobs.rl.trainer import run_rl

    return run_rl
