from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tinker_core.engine import Engine, EngineConfig, NewSession
from tinker_core.plugins import Plugins
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import (
    LOCAL_CALLER,
    LOCAL_OWNER,
    AdamParams,
    BaseModelSpec,
    CreateModelInput,
    Datum,
    EngineOutput,
    EngineRequest,
    ForwardBackwardInput,
    LoraConfig,
    ModelInput,
    OptimStepInput,
    TensorData,
)


class ManualClock:
    """Time stands still until a test moves it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._moved = asyncio.Condition()

    def monotonic(self) -> float:
        return self.seconds

    def now(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.seconds)

    async def wait(self, event: asyncio.Event, deadline: float | None) -> None:
        waiter = asyncio.create_task(event.wait())
        passed = asyncio.create_task(self._reach(deadline))
        try:
            await asyncio.wait([waiter, passed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
            passed.cancel()
            await asyncio.gather(waiter, passed, return_exceptions=True)

    async def _reach(self, deadline: float | None) -> None:
        async with self._moved:
            await self._moved.wait_for(lambda: deadline is not None and self.seconds >= deadline)

    async def advance(self, seconds: float) -> None:
        async with self._moved:
            self.seconds += seconds
            self._moved.notify_all()


class Client:
    """Speaks to an engine the way the server's routes do."""

    def __init__(self, engine: Engine, session_id: str) -> None:
        self.engine = engine
        self.session_id = session_id

    async def run(self, request: EngineRequest) -> EngineOutput:
        accepted = await self.engine.submit(request, LOCAL_CALLER)
        return await self.result(accepted.request_id)

    async def result(self, request_id: str) -> EngineOutput:
        output = await self.engine.retrieve(request_id, 60.0, LOCAL_OWNER)
        assert output is not None, "no result within a minute"
        return output

    def create_input(self, model_seq_id: int = 0, *, rank: int = 4, base_model: str = "tiny") -> CreateModelInput:
        return CreateModelInput(
            session_id=self.session_id,
            model_seq_id=model_seq_id,
            base_model=base_model,
            lora_config=LoraConfig(rank=rank, seed=7),
        )

    async def create(self, model_seq_id: int = 0, **kwargs: Any) -> str:
        output: Any = await self.run(self.create_input(model_seq_id, **kwargs))
        return str(output.model_id)


def datum(tokens: list[int], targets: list[int] | None = None) -> Datum:
    targets = targets if targets is not None else [*tokens[1:], 0]
    return Datum(
        model_input=ModelInput.from_ints(tokens),
        loss_fn_inputs={"target_tokens": TensorData.from_numpy(np.array(targets, np.int64))},
    )


def forward_backward(model_id: str, seq_id: int, *data: Datum, **kwargs: Any) -> ForwardBackwardInput:
    data = data or (datum([1, 2, 3, 4]),)
    return ForwardBackwardInput(model_id=model_id, seq_id=seq_id, data=data, loss_fn="cross_entropy", **kwargs)


def optim_step(model_id: str, seq_id: int) -> OptimStepInput:
    return OptimStepInput(model_id=model_id, seq_id=seq_id, adam_params=AdamParams(learning_rate=0.1))


EngineFactory = Callable[..., AbstractAsyncContextManager[Client]]


@pytest.fixture
def open_engine(tmp_path: Path) -> EngineFactory:
    """An engine with the fakes in real worker processes, and one open session."""

    @asynccontextmanager
    async def make(**settings: Any) -> AsyncIterator[Client]:
        clock = settings.pop("clock", None)
        plugins = Plugins.load("core", FAKE_PLUGIN)
        for name, plugin in settings.pop("more_plugins", {}).items():
            plugins.register(plugin, name)
        config = EngineConfig(
            base_models=settings.pop("base_models", (BaseModelSpec(name="tiny", path="tiny"),)),
            data_dir=tmp_path / "data",
            backend="fake",
            sampler=settings.pop("sampler", "fake"),
            plugins=(FAKE_PLUGIN,),
            agreement_tolerance=settings.pop("agreement_tolerance", 0.0),  # samplers of tests make up their answers
            **settings,
        )
        async with Engine(config, plugins, clock=clock) as engine:
            session = await engine.create_session(NewSession())
            yield Client(engine, session.session_id)

    return make
