"""The process of one rank: ``python -m tinker_core.executors.rank ADDRESS RANK``.

The engine sends the spec first.  Commands reach rank 0 only; it passes each tick on to the others, so that all ranks
see the same ticks.  The process ends when the engine is gone: the kernel sees to that on Linux, also when a call into
a library never returns; everywhere its standard input closes.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import attrs
import zmq

from tinker_core.encoding import Encoder
from tinker_core.executors.build import build_rank, rank_context
from tinker_core.executors.protocol import METHODS
from tinker_core.executors.rank_loop import Command, RankLoop, describe_error
from tinker_core.executors.writing import WriterThread
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.logs import LOG_FORMAT_VARIABLE, configure_logging
from tinker_core.types import RequestError

log = logging.getLogger(__name__)

READY, FAILED, RESULT, ERROR, CALL, STOP = b"ready", b"failed", b"result", b"error", b"call", b"stop"
ENDED = b"ended"
"""The last message of rank 0 and of its writing thread: no answer follows."""
WRITER = b"writer"
"""How rank 0's writing thread names itself to the engine; ranks are named by their number."""

_PR_SET_PDEATHSIG = 1


@attrs.frozen(kw_only=True)
class Start:
    """The first message to a rank."""

    spec: WorkerGroupSpec
    rendezvous: str
    follower_addresses: tuple[str, ...]
    """Where rank 0 passes its ticks on to: one address for each of the ranks 1, 2, …"""


class EngineAnswers:
    """Answers to the engine over one socket, for the thread that owns the socket."""

    def __init__(self, socket: zmq.Socket[bytes], encoder: Encoder) -> None:
        self._socket = socket
        self._encoder = encoder

    def result(self, command: Command, value: object) -> None:
        """Answer a command."""
        payload = self._encoder.encode(value, METHODS[command.method][1])
        self._socket.send_multipart([RESULT, str(command.call_id).encode(), payload])

    def error(self, command: Command, error: RequestError) -> None:
        """Answer a command with its error."""
        payload = self._encoder.encode(error, RequestError)
        self._socket.send_multipart([ERROR, str(command.call_id).encode(), payload])


@contextmanager
def writer_answers(address: str) -> Iterator[EngineAnswers]:
    """Answers for the thread that writes state: it has a socket of its own, because threads cannot share one."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.setsockopt(zmq.IDENTITY, WRITER)
        socket.setsockopt(zmq.LINGER, 2000)
        socket.connect(address)
        yield EngineAnswers(socket, Encoder())
        socket.send_multipart([ENDED])


class LeaderLink(EngineAnswers):
    """Rank 0's side: commands from the engine, ticks to the followers, answers to the engine."""

    def __init__(self, socket: zmq.Socket[bytes], followers: list[zmq.Socket[bytes]], encoder: Encoder) -> None:
        super().__init__(socket, encoder)
        self._followers = followers

    def receive(self, *, block: bool) -> Sequence[Command] | None:
        """All commands that wait; passes them on as one tick."""
        frames: list[bytes] = []
        if block:
            self._socket.poll()
        while self._socket.poll(0):
            message = self._socket.recv_multipart()
            if message[0] == STOP:
                for follower in self._followers:
                    follower.send_multipart([STOP])
                return None
            frames += message[1:]
        for follower in self._followers:
            follower.send_multipart([CALL, *frames])
        return _decode(frames, self._encoder)


class FollowerLink:
    """The side of ranks 1, 2, …: ticks from rank 0, no answers."""

    def __init__(self, socket: zmq.Socket[bytes], encoder: Encoder) -> None:
        self._socket = socket
        self._encoder = encoder

    def receive(self, *, block: bool) -> Sequence[Command] | None:
        """The next tick of rank 0; waits for it also when there is other work, to stay in step."""
        del block
        message = self._socket.recv_multipart()
        return None if message[0] == STOP else _decode(message[1:], self._encoder)

    def result(self, command: Command, value: object) -> None:
        """Followers answer nothing."""

    def error(self, command: Command, error: RequestError) -> None:
        """Followers answer nothing."""


def _decode(frames: Sequence[bytes], encoder: Encoder) -> list[Command]:
    commands = []
    for call_id, method, payload in zip(frames[::3], frames[1::3], frames[2::3], strict=True):
        name = method.decode()
        commands.append(Command(call_id=int(call_id), method=name, payload=encoder.decode(payload, METHODS[name][0])))
    return commands


def _ask_kernel_to_end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _exit_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread inside its lock breaks the interpreter's own exit
        pass
    os._exit(1)


def _run(
    address: str, socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]], rank: int, encoder: Encoder
) -> None:
    start: Start = encoder.decode(socket.recv(), Start)
    link: LeaderLink | FollowerLink
    writes: WriterThread | None = None
    if rank == 0:
        followers = []
        for follower_address in start.follower_addresses:
            follower = context.socket(zmq.PUSH)
            follower.connect(follower_address)
            followers.append(follower)
        link = LeaderLink(socket, followers, encoder)
        writes = WriterThread(partial(writer_answers, address))
    else:
        ticks = context.socket(zmq.PULL)
        ticks.bind(start.follower_addresses[rank - 1])
        link = FollowerLink(ticks, encoder)
    rank_info = rank_context(start.spec, rank, start.rendezvous)
    trainer, sampler = build_rank(start.spec, rank_info)
    socket.send_multipart([READY])
    try:
        RankLoop(trainer, sampler, link, link, world_size=rank_info.world_size, writes=writes).run()
        if writes is not None:
            writes.finish()
    finally:
        trainer.close()


def main() -> None:
    """Connect, build, and loop until told to stop."""
    address, rank = sys.argv[1], int(sys.argv[2])
    configure_logging(os.environ.get(LOG_FORMAT_VARIABLE, "text"), process=f"rank{rank}")
    # Ctrl-C reaches the whole process group; the server decides when its ranks stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _ask_kernel_to_end_with_parent()
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    encoder = Encoder()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(rank).encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(address)
    socket.send_multipart([b"hello"])
    try:
        _run(address, socket, context, rank, encoder)
        socket.send_multipart([ENDED])
    except Exception as error:
        log.exception("rank %d failed", rank)
        socket.send_multipart([FAILED, encoder.encode(describe_error(error), RequestError)])
        context.destroy(linger=2000)
        os._exit(1)  # peers may hang in a collective with threads that never join
    context.destroy(linger=2000)


if __name__ == "__main__":
    main()
