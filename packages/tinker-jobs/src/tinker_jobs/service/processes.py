"""The process of one job: how it is started, spoken with and ended."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from tinker_jobs.protocol import CANCEL, JobSpec, encode

COMMAND = (sys.executable, "-P", "-m", "tinker_jobs.worker")

MAX_LINE = 16 * 1024 * 1024
"""Most bytes of one event; the whole series at the end of a hundred thousand steps are smaller."""
LOG_NAME = "worker.log"
"""Standard error of all processes of a job, in the job's directory."""
_CHUNK = 1024 * 1024
_LAST_BYTES, _LAST_LINES = 4096, 8
"""What of standard error is told about a process that was lost."""

_SECRETS = ("TINKER_API_KEY", "TINKER_BASE_URL", "DATABASE_URL", "GOOGLE_APPLICATION_CREDENTIALS")
_SECRET_PREFIXES = ("AWS_", "AZURE_STORAGE_", "RCLONE_", "PG")
"""Environment variables with which the server reaches its database and its object store, or somebody a server."""


class MalformedOutputError(Exception):
    """A process said something that is no event."""


def worker_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The server's environment without its secrets: a job reaches everything through the API."""
    return {
        name: value
        for name, value in environment.items()
        if name not in _SECRETS and not name.startswith(_SECRET_PREFIXES)
    }


@contextlib.asynccontextmanager
async def hold_directory(directory: Path) -> AsyncIterator[int]:
    """Hold a job's directory and yield the lock's descriptor, for its process to inherit.

    The lock lasts until this block and every process that inherited it have ended, so it is waited for as long as an
    earlier process lives, whichever server started that.
    """
    descriptor = _open_lock(directory)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        await _wait_for(descriptor)
    except OSError:  # such as a file system without locks
        os.close(descriptor)
        raise
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open_lock(directory: Path) -> int:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


async def _wait_for(descriptor: int) -> None:
    """Take a lock that is held. Who stops waiting leaves the descriptor to the thread that cannot."""
    loop = asyncio.get_running_loop()
    held: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if held.cancelled():
            os.close(descriptor)
        else:
            held.set_result(None)

    def wait() -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        try:
            loop.call_soon_threadsafe(settle)
        except RuntimeError:  # the loop has ended, and with it whoever waited
            os.close(descriptor)

    # A daemon: nothing can interrupt it, and a server that stops must not wait for it.
    threading.Thread(target=wait, daemon=True).start()
    try:
        await held
    except asyncio.CancelledError:
        if not held.cancelled():  # it was taken just now
            os.close(descriptor)
        raise


class JobProcess:
    """A running process. `exited` is set once it has ended."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path, log_begins: int) -> None:
        self._process = process
        self._log = log
        self._log_begins = log_begins
        self.exited = asyncio.Event()
        self._reaper = asyncio.create_task(self._reap())

    @classmethod
    async def start(cls, spec: JobSpec, held: int) -> JobProcess:
        """Start a process that holds the job's directory and knows what to do; raises `OSError`."""
        log = spec.directory / LOG_NAME
        with log.open("ab") as errors:
            process = await asyncio.create_subprocess_exec(
                *COMMAND,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                limit=_CHUNK,
                pass_fds=(held,),
                env=worker_environment(os.environ),
                # A terminal's Ctrl-C is for the server, which ends its jobs in an order of its own.
                start_new_session=True,
            )
            started = cls(process, log, errors.tell())
        try:
            await started._write(encode(spec))
        except BaseException:
            await started.end()
            raise
        return started

    async def _reap(self) -> None:
        await self._process.wait()
        self.exited.set()

    async def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        # A process that has ended reads nothing; why it has is found out where its output ends.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._process.stdin.write(line)
            await self._process.stdin.drain()

    async def batches(self) -> AsyncIterator[list[bytes]]:
        """Lines as they come, all that are there at once together; raises `MalformedOutputError` for an endless one."""
        assert self._process.stdout is not None
        rest = b""
        while chunk := await self._process.stdout.read(_CHUNK):
            *lines, rest = (rest + chunk).split(b"\n")
            if len(rest) > MAX_LINE:
                raise MalformedOutputError(f"a line of more than {MAX_LINE} bytes")
            if lines:
                yield lines
        if rest:
            yield [rest]

    async def cancel(self) -> None:
        """Ask it to stop at the next step."""
        await self._write(CANCEL)

    def kill(self) -> None:
        """End it and whatever it has started at once; does nothing when it has ended."""
        if not self.exited.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def end(self) -> None:
        """Kill it and return when it is gone."""
        self.kill()
        await self.exited.wait()
        assert self._process.stdin is not None
        self._process.stdin.close()

    def describe_end(self) -> str:
        """How it ended, and its last words."""
        code = self._process.returncode
        assert code is not None
        how = f"exit status {code}" if code >= 0 else f"killed by {_signal_name(-code)}"
        words = self._last_words()
        return f"{how}; its last lines: {words}" if words else how

    def _last_words(self) -> str:
        with self._log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(self._log_begins, size - _LAST_BYTES))
            text = file.read().decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-_LAST_LINES:])


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
