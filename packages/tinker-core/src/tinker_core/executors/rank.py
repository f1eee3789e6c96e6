"""The process of one rank: ``python -m tinker_core.executors.rank ADDRESS RANK``.

The engine sends the spec first.  Commands reach rank 0 only; it passes each tick on to the others, so that all ranks
see the same ticks.  The process ends itself when its standard input closes, that is, when the engine is gone.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence

import attrs
import zmq

from tinker_core.encoding import Encoder
from tinker_core.executors.build import build_rank, rank_context
from tinker_core.executors.protocol import METHODS
from tinker_core.executors.rank_loop import Command, RankLoop, describe_error
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.types import RequestError

log = logging.getLogger(__name__)

READY, FAILED, RESULT, ERROR, CALL, STOP = b"ready", b"failed", b"result", b"error", b"call", b"stop"


@attrs.frozen(kw_only=True)
class Start:
    """The first message to a rank."""

    spec: WorkerGroupSpec
    rendezvous: str
    follower_addresses: tuple[str, ...]
    """Where rank 0 passes its ticks on to: one address for each of the ranks 1, 2, …"""


class LeaderLink:
    """Rank 0's side: commands from the engine, ticks to the followers, answers to the engine."""

    def __init__(self, socket: zmq.Socket[bytes], followers: list[zmq.Socket[bytes]], encoder: Encoder) -> None:
        self._socket = socket
        self._followers = followers
        self._encoder = encoder

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

    def result(self, command: Command, value: object) -> None:
        """Answer a command."""
        payload = self._encoder.encode(value, METHODS[command.method][1])
        self._socket.send_multipart([RESULT, str(command.call_id).encode(), payload])

    def error(self, command: Command, error: RequestError) -> None:
        """Answer a command with its error."""
        payload = self._encoder.encode(error, RequestError)
        self._socket.send_multipart([ERROR, str(command.call_id).encode(), payload])


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


def _exit_with_parent() -> None:
    while os.read(0, 4096):  # not sys.stdin: a thread inside its lock breaks the interpreter's own exit
        pass
    os._exit(1)


def _run(socket: zmq.Socket[bytes], context: zmq.Context[zmq.Socket[bytes]], rank: int, encoder: Encoder) -> None:
    start: Start = encoder.decode(socket.recv(), Start)
    link: LeaderLink | FollowerLink
    if rank == 0:
        followers = []
        for address in start.follower_addresses:
            follower = context.socket(zmq.PUSH)
            follower.connect(address)
            followers.append(follower)
        link = LeaderLink(socket, followers, encoder)
    else:
        ticks = context.socket(zmq.PULL)
        ticks.bind(start.follower_addresses[rank - 1])
        link = FollowerLink(ticks, encoder)
    rank_info = rank_context(start.spec, rank, start.rendezvous)
    trainer, sampler = build_rank(start.spec, rank_info)
    socket.send_multipart([READY])
    try:
        RankLoop(trainer, sampler, link, link, world_size=rank_info.world_size).run()
    finally:
        trainer.close()


def main() -> None:
    """Connect, build, and loop until told to stop."""
    address, rank = sys.argv[1], int(sys.argv[2])
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s %(levelname)s rank{rank} %(name)s %(message)s")
    # Ctrl-C reaches the whole process group; the server decides when its ranks stop.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    encoder = Encoder()
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, str(rank).encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(address)
    socket.send_multipart([b"hello"])
    try:
        _run(socket, context, rank, encoder)
    except Exception as error:
        log.exception("rank %d failed", rank)
        socket.send_multipart([FAILED, encoder.encode(describe_error(error), RequestError)])
        socket.close()
        context.term()
        os._exit(1)  # peers may hang in a collective with threads that never join
    context.destroy(linger=2000)


if __name__ == "__main__":
    main()
