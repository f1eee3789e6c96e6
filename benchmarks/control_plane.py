"""What the server does beside computing: operations per second with a trainer and a sampler that cost next to nothing.

An operation is a request and the poll for its result, each durable in the journal: a tiny ``forward_backward`` and an
``optim_step`` in turn, or a sample. Raw clients send them over the SDK's own transport, in turns with the same two
requests to a bare uvicorn and Starlette app; the SDK's own figure stands beside. Then 2,000 samples at once, of which
none may be lost, and 5,000 long polls that stay open while others are served.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import orjson
import tinker
import uvloop
from support.raw_client import PROTOBUF, RawClient, pass_body
from support.report import report
from support.server import running, running_server
from tinker import types

NUM_CLIENTS = (1, 8, 64)
GOAL_PER_SECOND = 500.0
FLAGS = ("--backend", "fake", "--sampler", "fake", "--max-resident-models", "256")

Operation = Callable[[int], Awaitable[None]]
"""Async: runs a client's n-th operation, from 1."""
Figures = dict[str, float]


def adam_body(model_id: str, seq_id: int) -> bytes:
    adam = {
        "learning_rate": 1e-4,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-12,
        "weight_decay": 0.0,
        "grad_clip_norm": 0.0,
    }
    return orjson.dumps({"model_id": model_id, "seq_id": seq_id, "type": "optim_step", "adam_params": adam})


def sample_body(sampler: str, seq_id: int, max_tokens: int = 4) -> bytes:
    return orjson.dumps(
        {
            "sampling_session_id": sampler,
            "seq_id": seq_id,
            "num_samples": 1,
            "prompt": {"chunks": [{"type": "encoded_text", "tokens": [3, 4, 5]}]},
            "sampling_params": {"max_tokens": max_tokens},
        }
    )


def training(client: RawClient, model_id: str) -> Operation:
    async def operate(number: int) -> None:
        if number % 2:
            request_id = await client.submit("forward_backward", pass_body(model_id, number), PROTOBUF)
        else:
            request_id = await client.submit("optim_step", adam_body(model_id, number))
        await client.retrieve(request_id)

    return operate


def sampling(client: RawClient, sampler: str) -> Operation:
    async def operate(number: int) -> None:
        await client.retrieve(await client.submit("asample", sample_body(sampler, number)))

    return operate


class Load:
    """Clients of one server that go on where they stopped."""

    def __init__(self, operations: list[Operation]) -> None:
        self._operations = operations
        self._done = [0] * len(operations)

    async def run(self, seconds: float) -> tuple[float, list[float]]:
        """Operations per second, and how long each took, in seconds."""
        times: list[float] = []
        start = time.perf_counter()

        async def client(index: int) -> None:
            while time.perf_counter() < start + seconds:
                self._done[index] += 1
                began = time.perf_counter()
                await self._operations[index](self._done[index])
                times.append(time.perf_counter() - began)

        await asyncio.gather(*(client(index) for index in range(len(self._operations))))
        return len(times) / (time.perf_counter() - start), times


def figures(runs: list[tuple[float, list[float]]]) -> Figures:
    times = sorted(value for _, values in runs for value in values)
    return {
        "per_second": round(statistics.median(rate for rate, _ in runs), 1),
        "p50_ms": round(1000 * times[len(times) // 2], 2),
        "p99_ms": round(1000 * times[len(times) * 99 // 100], 2),
    }


async def compare(url: str, reference: str, seconds: float, rounds: int) -> dict[str, dict[str, Figures]]:
    """Figures by number of clients and by what was asked."""
    server, bare = RawClient(url), RawClient(reference)
    models = [await server.new_model() for _ in range(max(NUM_CLIENTS))]
    samplers = [await server.new_sampler() for _ in range(max(NUM_CLIENTS))]
    number_of = dict.fromkeys(models, 0)

    def continued(model_id: str) -> Operation:
        """Operations of a model that counts on, whoever used it before."""
        operate = training(server, model_id)

        async def operate_next(_: int) -> None:
            number_of[model_id] += 1
            await operate(number_of[model_id])

        return operate_next

    found: dict[str, dict[str, Figures]] = {}
    offset = 0
    for num_clients in NUM_CLIENTS:
        loads = {
            "training": Load([continued(model_id) for model_id in models[:num_clients]]),
            "reference": Load([training(bare, "m") for _ in range(num_clients)]),
            "sampling": Load([_numbered(sampling(server, each), offset) for each in samplers[:num_clients]]),
        }
        offset += 1_000_000
        runs: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in loads}
        for index in range(rounds + 1):
            for name, load in loads.items():
                run = await load.run(seconds if index else seconds / 4)
                if index:  # the first round warms up
                    runs[name].append(run)
        found[str(num_clients)] = {name: figures(each) for name, each in runs.items()}
        shown = ", ".join(f"{name} {each['per_second']:.0f}/s" for name, each in found[str(num_clients)].items())
        print(f"{num_clients:3} clients: {shown}")
    return found


def _numbered(operate: Operation, offset: int) -> Operation:
    async def operate_later(number: int) -> None:
        await operate(offset + number)

    return operate_later


async def many_samples(url: str, number: int) -> Figures:
    """So many samples in progress at once, each with a poll of its own."""
    client = RawClient(url)
    sampler = await client.new_sampler()
    start = time.perf_counter()

    async def sample(seq_id: int) -> bool:
        request_id = await client.submit("asample", sample_body(sampler, seq_id, max_tokens=16))
        return bool(await client.retrieve(request_id))

    results = await asyncio.gather(*(sample(seq_id) for seq_id in range(number)))
    seconds = time.perf_counter() - start
    return {"samples": number, "lost": results.count(False), "seconds": round(seconds, 2)}


async def resident_bytes(url: str) -> float:
    """Memory of the server process."""
    import pyqwest

    answer = await pyqwest.Client(pyqwest.HTTPTransport()).get(f"{url}/metrics")
    found = re.search(rb"^process_resident_memory_bytes (\S+)", answer.content, re.MULTILINE)
    assert found is not None
    return float(found.group(1))


async def many_polls(url: str, number: int, seconds: float) -> Figures:
    """Polls that wait for passes which wait for their predecessor, and other operations meanwhile."""
    client, other = RawClient(url), RawClient(url)
    per_model = 100
    models = [await client.new_model() for _ in range(number // per_model)]
    requests = await asyncio.gather(
        *(
            client.submit("forward_backward", pass_body(model_id, seq_id), PROTOBUF)
            for model_id in models
            for seq_id in range(2, 2 + per_model)
        )
    )
    busy = Load([training(other, await other.new_model())])
    _, alone = await busy.run(seconds)
    before = await resident_bytes(url)
    polls = [asyncio.create_task(client.retrieve(request_id)) for request_id in requests]
    while await open_polls(url) < len(polls):
        pass  # each round is a request
    during = await resident_bytes(url)
    _, beside = await busy.run(seconds)
    start = time.perf_counter()
    await asyncio.gather(*(client.submit("forward_backward", pass_body(each, 1), PROTOBUF) for each in models))
    results = await asyncio.gather(*polls)
    return {
        "polls": len(results),
        "kb_per_poll": round((during - before) / len(polls) / 1024, 1),
        "other_p50_ms_without": round(1000 * statistics.median(alone), 2),
        "other_p50_ms_beside": round(1000 * statistics.median(beside), 2),
        "released_in_seconds": round(time.perf_counter() - start, 2),
    }


async def open_polls(url: str) -> int:
    import pyqwest

    answer = await pyqwest.Client(pyqwest.HTTPTransport()).get(f"{url}/metrics")
    found = re.search(rb"^tinker_open_polls (\S+)", answer.content, re.MULTILINE)
    assert found is not None
    return int(float(found.group(1)))


def with_sdk(url: str, num_clients: int, seconds: float) -> Figures:
    """Operations per second of SDK clients in threads of this process."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
    models = [service.create_lora_training_client(base_model="tiny", rank=4).result() for _ in range(num_clients)]
    tokens = np.arange(3, 11)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(tokens.tolist()),
            loss_fn_inputs={"target_tokens": tokens.astype(np.int64), "weights": np.ones(8, np.float32)},
        )
    ]
    times: list[float] = []
    start = time.perf_counter()

    def work(model: tinker.TrainingClient) -> None:
        while time.perf_counter() < start + seconds:
            for call in (
                lambda: model.forward_backward(data, "cross_entropy").result(),
                lambda: model.optim_step(types.AdamParams(learning_rate=1e-4)).result(),
            ):
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)

    threads = [threading.Thread(target=work, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return figures([(len(times) / (time.perf_counter() - start), times)])


def sdk_samples(url: str, number: int) -> Figures:
    """So many samples at once through one sampling client."""
    service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
    sampler = service.create_sampling_client(base_model="tiny").result()
    start = time.perf_counter()
    prompt, params = types.ModelInput.from_ints([3, 4, 5]), types.SamplingParams(max_tokens=16)
    futures = [sampler.sample(prompt, 1, params) for _ in range(number)]
    lost = sum(not future.result().sequences for future in futures)
    return {"samples": number, "lost": lost, "seconds": round(time.perf_counter() - start, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", help="for the report; nothing is computed on it")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measured stretch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--polls", type=int, default=5000)
    arguments = parser.parse_args()
    os.environ["TINKER_PLUGINS"] = "tinker_core.testing.fakes"
    os.environ["TINKER_TELEMETRY"] = "0"
    reference = [sys.executable, "-m", "support.two_requests"]
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    results: dict[str, object] = {"goal_per_second": GOAL_PER_SECOND}
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(Path("tiny"), Path(directory, "data"), *FLAGS, name="tiny") as url,
        running(reference, re.compile(r"reference ready on (\S+)")) as bare,
    ):
        found = uvloop.run(compare(url, bare, arguments.seconds, arguments.rounds))
        results["clients"] = found
        results["sdk"] = {str(number): with_sdk(url, number, arguments.seconds) for number in NUM_CLIENTS[:2]}
        results["many_samples"] = uvloop.run(many_samples(url, arguments.samples))
        results["many_samples_sdk"] = sdk_samples(url, arguments.samples)
        results["many_polls"] = uvloop.run(many_polls(url, arguments.polls, arguments.seconds))
    best = max(found.values(), key=lambda by_name: by_name["training"]["per_second"])
    results["per_second"] = best["training"]["per_second"]
    results["ratio_to_goal"] = round(best["training"]["per_second"] / GOAL_PER_SECOND, 2)
    results["ratio_to_reference"] = round(best["training"]["per_second"] / best["reference"]["per_second"], 3)
    for name in ("sdk", "many_samples", "many_samples_sdk", "many_polls"):
        print(f"{name}: {results[name]}")
    report("control_plane", arguments.device, results)


if __name__ == "__main__":
    main()
