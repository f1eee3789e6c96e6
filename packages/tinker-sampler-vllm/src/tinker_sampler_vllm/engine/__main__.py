"""The process of one engine: ``python -m tinker_sampler_vllm.engine ADDRESS``; settings come on standard input.

The first line of standard input is the encoded `EngineSettings` in base64, an optional second one the secret that both
sides share.  The process writes one line to the descriptor that ``TINKER_READY_FD`` names when it is ready.  It ends in
order on SIGTERM, and at once with its parent, whose death closes standard input.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import os
import signal
import sys
import threading

from tinker_core.encoding import Encoder
from tinker_core.errors import TinkerError
from tinker_core.executors.rank_loop import describe_error
from tinker_core.logs import LOG_FORMAT_VARIABLE, configure_logging
from tinker_core.types import RequestError
from tinker_sampler_vllm.engine.in_vllm import end_with_parent
from tinker_sampler_vllm.engine.incoming import IncomingWeights, incoming_directory
from tinker_sampler_vllm.engine.listening import listening
from tinker_sampler_vllm.process_group import end_group
from tinker_sampler_vllm.protocol import FAILED, READY, EngineSettings

log = logging.getLogger(__name__)

READY_FD_VARIABLE = "TINKER_READY_FD"


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    if os.getpgrp() == os.getpid():
        end_group(os.getpid())  # vLLM's processes do not know yet whom to die with while they start
    os._exit(1)


class _Report:
    """Tells the parent once how the start ended."""

    def __init__(self) -> None:
        self._descriptor = int(os.environ.pop(READY_FD_VARIABLE))
        self.made = False

    def __call__(self, kind: bytes, detail: bytes = b"") -> None:
        """Write the line."""
        self.made = True
        with os.fdopen(self._descriptor, "wb") as pipe:
            pipe.write(kind + b" " + base64.b64encode(detail) + b"\n")


async def _serve(address: str, settings: EngineSettings, secret: str | None, report: _Report) -> None:
    import vllm

    from tinker_sampler_vllm.engine.serving import EngineServer
    from tinker_sampler_vllm.engine.vllm_engine import VllmEngine

    with listening(address, secret) as socket:
        engine = await VllmEngine.start(settings)
        incoming = IncomingWeights(incoming_directory(os.getpid()))
        server = EngineServer(engine, settings, vllm.__version__, socket, incoming)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.stop)
        report(READY)
        await server.run()
        engine.close()  # a dead one goes with this process


def main() -> None:
    """Start the engine and serve until told to stop."""
    configure_logging(os.environ.get(LOG_FORMAT_VARIABLE, "text"), process="engine")
    end_with_parent()
    encoder, report = Encoder(), _Report()
    settings: EngineSettings = encoder.decode(base64.b64decode(sys.stdin.readline()), EngineSettings)
    secret = sys.stdin.readline().strip() or None
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    try:
        asyncio.run(_serve(sys.argv[1], settings, secret, report))
    except Exception as error:
        if not isinstance(error, TinkerError):
            log.exception("the engine failed")
        if report.made:
            log.error("the engine ends: %s", error)
        else:
            report(FAILED, encoder.encode(describe_error(error), RequestError))
        sys.stdout.flush()
        os._exit(1)  # threads of a dead vLLM never join


if __name__ == "__main__":
    main()
