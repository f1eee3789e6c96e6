"""A fake engine behind the real `EngineServer` and a real socket, and what talks to it."""

from __future__ import annotations

import asyncio
import itertools
import socket
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from tinker_core.errors import CheckpointMismatchError, UnknownCheckpointError
from tinker_core.types import (
    BaseModelSpec,
    GeneratedSequence,
    ModelInput,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplerCapabilities,
    SamplingParams,
    StopReason,
    Transport,
)
from tinker_sampler_vllm.engine.incoming import IncomingWeights
from tinker_sampler_vllm.engine.listening import listening
from tinker_sampler_vllm.engine.serving import CLAIM_SECONDS, DEATH_SECONDS, EngineServer
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.links.remote import RemoteLink
from tinker_sampler_vllm.protocol import ClaimCall, EngineSettings

_T = TypeVar("_T")

SECRET = "a secret of enough characters"
CAPABILITIES = SamplerCapabilities(
    max_context_length=64,
    vocab_size=100,
    transports=(Transport.SHARED_MEMORY, Transport.FILE),
    max_revisions=8,
    max_lora_rank=8,
    lora_targets=("q_proj",),
)
_IDS = itertools.count()


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """Run it on a loop of its own, and give up after half a minute."""
    return asyncio.run(asyncio.wait_for(work, 120))


def free_address() -> str:
    """An address of this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


def make_sample(revision: str | None = None, session: str = "session", **fields: Any) -> PreparedSample:
    """A sample with an id of its own."""
    request = SampleInput(
        sampling_session_id=session,
        seq_id=0,
        prompt=ModelInput.from_ints([1, 2, 3]),
        sampling_params=SamplingParams(max_tokens=4, seed=7),
        **fields,
    )
    return PreparedSample(request_id=f"sample-{next(_IDS)}", revision=revision, request=request)


def claim_of(server: str = "server", base_model: str = "tiny", dtype: str = "float32", **fields: Any) -> ClaimCall:
    return ClaimCall(server=server, base_model=base_model, dtype=dtype, **fields)


class FakeEngine:
    """Implements `tinker_sampler_vllm.engine.serving.Engine`; its samples say which weights they came from."""

    def __init__(self) -> None:
        self.capabilities = CAPABILITIES
        self.weights: dict[str, dict[str, bytes]] = {}
        self.num_loads = 0
        self.open = asyncio.Event()
        """Samples end while it is set."""
        self.open.set()
        self.running: set[str] = set()
        self.begun = asyncio.Event()
        """Set when a sample begins."""
        self.awake = asyncio.Event()
        """It answers questions about its health while it is set."""
        self.awake.set()
        self.died = asyncio.Event()

    async def load(self, revision: str, directory: str) -> None:
        self.num_loads += 1
        files = _read(Path(directory))
        if b"bad" in files.values():
            raise CheckpointMismatchError("the adapter is bad")
        self.weights[revision] = files

    async def load_full(self, revision: str, directory: str) -> None:
        await self.load(revision, directory)

    async def retire(self, revision: str) -> None:
        self.weights.pop(revision, None)

    async def retire_all(self) -> None:
        assert not self.running
        self.weights.clear()

    async def sample(self, sample: PreparedSample) -> SampleOutput:
        if sample.revision is not None and sample.revision not in self.weights:
            raise UnknownCheckpointError(sample.revision)
        self.running.add(sample.request_id)
        self.begun.set()
        try:
            await self.open.wait()
            await self.awake.wait()
        finally:
            self.running.discard(sample.request_id)
        content = b"".join(self.weights.get(sample.revision or "", {}).values())
        tokens = tuple(content[:4]) or (0,)
        sequence = GeneratedSequence(stop_reason=StopReason.LENGTH, tokens=tokens, logprobs=(-1.0,) * len(tokens))
        return SampleOutput(sequences=(sequence,))

    def is_waiting(self, sample_id: str) -> bool:
        return sample_id in self.running and not self.open.is_set()

    async def check(self) -> None:
        await self.awake.wait()

    async def wait_dead(self) -> None:
        await self.died.wait()


def _read(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@asynccontextmanager
async def served(
    address: str,
    secret: str | None = SECRET,
    claim_seconds: float = CLAIM_SECONDS,
    death_seconds: float = DEATH_SECONDS,
    **settings: Any,
) -> AsyncIterator[FakeEngine]:
    """A fake engine that listens; when the block ends it is gone like a process that was killed."""
    engine = FakeEngine()
    given = {"device": "cpu", "dtype": "float32", **settings}
    with tempfile.TemporaryDirectory() as incoming, listening(address, secret) as listener:
        server = EngineServer(
            engine,
            EngineSettings(base_model=BaseModelSpec(name="tiny", path="/nowhere"), **given),
            "0.0",
            listener,
            IncomingWeights(Path(incoming) / "incoming"),
            claim_seconds=claim_seconds,
            death_seconds=death_seconds,
        )
        serving = asyncio.create_task(server.run())
        try:
            yield engine
        finally:
            server.stop()
            await asyncio.gather(serving, return_exceptions=True)


@asynccontextmanager
async def connected(
    address: str, claim: ClaimCall | None = None, secret: str = SECRET, checks: HealthChecks | None = None
) -> AsyncIterator[RemoteLink]:
    """A connection for the length of a block."""
    link = await RemoteLink.start("engine", address, secret, claim or claim_of(), checks)
    try:
        yield link
    finally:
        await link.close()


def write_weights(directory: Path, content: bytes) -> str:
    """Some files that a fake engine takes for weights."""
    directory.mkdir()
    (directory / "adapter_config.json").write_bytes(b"")
    (directory / "adapter_model.safetensors").write_bytes(content)
    return str(directory)
