"""Training and sampling go on without the control database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from tests.core.conftest import EngineFactory, ManualClock, forward_backward, optim_step
from tests.core.test_engine_sampling import PROMPT, ephemeral, open_sampler
from tinker_core.engine.usage import FLUSH_SECONDS
from tinker_core.types import (
    LOCAL_OWNER,
    RequestError,
    SampleInput,
    SamplingParams,
)

ROUNDS = 20


@contextmanager
def statements() -> Iterator[list[str]]:
    """What any database engine of this process is told for the length of a block."""
    told: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        told.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield told
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def test_steps_and_samples_tell_the_database_nothing_but_sums_of_usage(open_engine: EngineFactory) -> None:
    async def body() -> None:
        clock = ManualClock()
        async with open_engine(clock=clock) as client:
            model = await client.create()
            base = await open_sampler(client, base_model="tiny")
            tuned = await ephemeral(client, model, 1, 1)
            await client.engine.accounts.audit.entries(LOCAL_OWNER, clock.now(), clock.now())
            with statements() as told:
                for number in range(ROUNDS):
                    seq_id = 2 + 2 * number
                    requests: list[Any] = [forward_backward(model, seq_id), optim_step(model, seq_id + 1)]
                    requests += [
                        SampleInput(
                            sampling_session_id=sampler,
                            seq_id=number,
                            prompt=PROMPT,
                            sampling_params=SamplingParams(max_tokens=2),
                        )
                        for sampler in (base, tuned)
                    ]
                    for output in [await client.run(request) for request in requests]:
                        assert not isinstance(output, RequestError), output
                    await client.engine.heartbeat(client.session_id, LOCAL_OWNER)
                assert told == []
                await clock.advance(FLUSH_SECONDS)
                used = await client.engine.accounts.usage.between(clock.now(), clock.now() + timedelta(hours=1))
                assert used
                assert {word for statement in told for word in statement.split() if word in TABLES} == {"usage"}

    asyncio.run(body())


TABLES = {"sessions", "training_runs", "checkpoints", "samplers", "api_keys", "audit_log", "usage"}
