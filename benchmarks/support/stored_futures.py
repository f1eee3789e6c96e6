"""What a request costs while many results of others are stored: engines with fake models on prepared journals."""

from __future__ import annotations

import asyncio
import random
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path

import attrs
import numpy as np

from tinker_core.engine import Engine, EngineConfig, NewSession
from tinker_core.engine.journalling import RequestHead, encode_head, encode_record
from tinker_core.engine.request_ids import RequestIds
from tinker_core.plugins import Plugins
from tinker_core.storage.journal import AcceptedRow, Fate, Journal, ResultRow
from tinker_core.storage.secret import derive_key, load_secret
from tinker_core.testing.fakes import FAKE_PLUGIN
from tinker_core.types import (
    LOCAL_OWNER,
    AdamParams,
    BaseModelSpec,
    Caller,
    CreateModelInput,
    Datum,
    ForwardBackwardInput,
    LoraConfig,
    ModelInput,
    OptimStepInput,
    OptimStepOutput,
    RequestError,
    RequestType,
    TensorData,
)

CALLER = Caller(owner=LOCAL_OWNER)
AT_ONCE = 5000
YEAR = 365 * 24 * 3600.0
NUM_FETCHED = 100


@attrs.define
class Stored:
    """An engine on a journal with many results, and how long its requests took."""

    engine: Engine
    ids: RequestIds
    numbers: list[int]
    model_id: str = ""
    seq_id: int = 0
    seconds: list[float] = attrs.field(factory=list)


async def fill(data_dir: Path, num: int) -> list[int]:
    """Put the results of so many optimizer steps of long ago into a journal; their numbers in it."""
    journal = await Journal.open(data_dir / "journal", max_bytes=1 << 40)
    stored: list[int] = []
    resolved: asyncio.Future[None] | None = None
    try:
        for start in range(0, num, AT_ONCE):
            numbers = [journal.next_number() for _ in range(min(AT_ONCE, num - start))]
            rows = [_row(number, start + index) for index, number in enumerate(numbers)]
            await asyncio.gather(*map(journal.accept, rows))
            results = [_result(number, start + index) for index, number in enumerate(numbers)]
            if resolved is not None:
                await resolved
            resolved = journal.resolve(results)
            stored += numbers
        if resolved is not None:
            await resolved
    finally:
        await journal.close()
    return stored


_HEAD = encode_head(
    RequestHead(
        number=0,
        request_id="req-" + "0" * 36,
        request_type=RequestType.OPTIM_STEP,
        caller=CALLER,
        scope=f"{LOCAL_OWNER}:model:past:train:0",
        place=0,
        accepted_at=0.0,
    )
)
"""The same for all, which are told apart by what is beside it."""


def _row(number: int, index: int) -> AcceptedRow:
    return AcceptedRow(
        number=number,
        scope=f"{LOCAL_OWNER}:model:past:train:{index % 1000}",
        place=index // 1000,
        owner=LOCAL_OWNER,
        model_id=None,
        seq_id=None,
        head=_HEAD,
        body=None,
    )


def _result(number: int, index: int) -> ResultRow:
    payload = encode_record(OptimStepOutput(metrics={"grad_norm": float(index)}))
    keep_until = time.time() + YEAR
    return ResultRow(number=number, owner=LOCAL_OWNER, payload=payload, fate=Fate.DROP, keep_until=keep_until)


async def _start(stack: AsyncExitStack, data_dir: Path, numbers: list[int]) -> Stored:
    config = EngineConfig(
        base_models=(BaseModelSpec(name="tiny", path="tiny"),),
        data_dir=data_dir,
        backend="fake",
        sampler="fake",
        plugins=("core", FAKE_PLUGIN),
    )
    engine = await stack.enter_async_context(Engine(config, Plugins.load("core", FAKE_PLUGIN)))
    await engine.wait_ready()
    session = await engine.create_session(NewSession())
    request = CreateModelInput(
        session_id=session.session_id, model_seq_id=0, base_model="tiny", lora_config=LoraConfig(rank=4, seed=1)
    )
    accepted = await engine.submit(request, CALLER)
    created = await engine.retrieve(accepted.request_id, 60.0, LOCAL_OWNER)
    if created is None or isinstance(created, RequestError):
        raise RuntimeError(f"no model: {created}")
    ids = RequestIds(derive_key(load_secret(data_dir), "request ids"))
    return Stored(engine=engine, ids=ids, numbers=numbers, model_id=accepted.model_id or "")


async def _step(stored: Stored, data: tuple[Datum, ...]) -> None:
    """A pass and a step, as clients send them: both, then both results."""
    started = time.perf_counter()
    model_id, seq_id = stored.model_id, stored.seq_id
    stored.seq_id += 2
    requests = (
        ForwardBackwardInput(model_id=model_id, seq_id=seq_id + 1, data=data, loss_fn="cross_entropy"),
        OptimStepInput(model_id=model_id, seq_id=seq_id + 2, adam_params=AdamParams()),
    )
    accepted = [await stored.engine.submit(request, CALLER) for request in requests]
    for receipt in accepted:
        output = await stored.engine.retrieve(receipt.request_id, 60.0, LOCAL_OWNER)
        if output is None or isinstance(output, RequestError):
            raise RuntimeError(f"a request failed: {output}")
    stored.seconds.append((time.perf_counter() - started) / len(requests))


async def _fetch(stored: Stored, rng: random.Random) -> float:
    """Fetch random stored results; median seconds. Raises `RuntimeError` for a wrong one."""
    seconds = []
    for index in rng.sample(range(len(stored.numbers)), NUM_FETCHED):
        request_id = stored.ids.issue(LOCAL_OWNER, stored.numbers[index])
        started = time.perf_counter()
        output = await stored.engine.retrieve(request_id, 1.0, LOCAL_OWNER)
        seconds.append(time.perf_counter() - started)
        if output != OptimStepOutput(metrics={"grad_norm": float(index)}):
            raise RuntimeError(f"result {index} of {len(stored.numbers)} came back as {output}")
    return statistics.median(seconds)


async def measure(sizes: tuple[int, ...], rounds: int) -> dict[str, dict[str, float]]:
    """Median microseconds of a request and of a fetched result by number of stored futures, in turns."""
    rng = random.Random(0)
    tokens = np.random.default_rng(0).integers(2, 60, size=17, dtype=np.int32)
    targets = TensorData.from_numpy(tokens[1:].astype(np.int64))
    data = (Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": targets}),)
    with tempfile.TemporaryDirectory() as directory:
        async with AsyncExitStack() as stack:
            all_stored = []
            for size in sizes:
                data_dir = Path(directory, str(size))
                all_stored.append(await _start(stack, data_dir, await fill(data_dir, size)))
            fetched: dict[int, list[float]] = {size: [] for size in sizes}
            for index in range(rounds + rounds // 5):
                if index == rounds // 5:  # what came before warmed up
                    for stored in all_stored:
                        stored.seconds.clear()
                for stored in rng.sample(all_stored, len(all_stored)):
                    await _step(stored, data)
            for size, stored in zip(sizes, all_stored, strict=True):
                fetched[size].append(await _fetch(stored, rng))
    return {
        str(size): {
            "request_us": round(1e6 * statistics.median(stored.seconds), 1),
            "fetch_us": round(1e6 * statistics.median(fetched[size]), 1),
        }
        for size, stored in zip(sizes, all_stored, strict=True)
    }
