"""What the server adds to a call: p50 of forward_backward and of optim_step of a tiny model through the SDK.

The same SDK calls against a stub that answers fixed bytes show what the SDK and HTTP cost by themselves; the same data
given to the trainer in this process shows what the computation costs.  What remains is the server's own share:
acceptance, scheduling, the way to the worker and back.  All three are measured in turns in one run.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tinker
from support.models import write_tiny_llama
from support.report import report
from support.server import running, running_server
from tinker import types

from tinker_core.executors.build import build_rank, rank_context
from tinker_core.interfaces import WorkerGroupSpec
from tinker_core.types import (
    AdamParams,
    BaseModelSpec,
    Datum,
    LoraConfig,
    ModelInput,
    OptimizerConfig,
    PreparedModel,
    PreparedModelPass,
    PreparedModelPassBatch,
    PreparedOptimStep,
    TensorData,
)

NUM_DATA, NUM_TOKENS, RANK = 4, 32, 8
OPERATIONS = ("forward_backward", "optim_step")
WARM_UP = 20
GOAL_MS = 5.0

Calls = dict[str, Callable[[], object]]


def client(url: str, base_model: str) -> tinker.TrainingClient:
    service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
    return service.create_lora_training_client(base_model=base_model, rank=RANK, train_unembed=False).result()


def sdk_calls(training: tinker.TrainingClient, data: list[types.Datum]) -> Calls:
    return {
        "forward_backward": lambda: training.forward_backward(data, "cross_entropy").result(),
        "optim_step": lambda: training.optim_step(types.AdamParams(learning_rate=1e-4)).result(),
    }


def direct_calls(model: Path, tokens: np.ndarray, device: str, dtype: str) -> Calls:
    """The trainer in this process, with the plugins that a worker would load."""
    spec = WorkerGroupSpec(
        base_model=BaseModelSpec(name="tiny", path=str(model)),
        trainer="fsdp",
        sampler=None,
        plugins=("core", "fsdp"),
        num_ranks=1,
        device=device,
        dtype=dtype,
    )
    trainer, _ = build_rank(spec, rank_context(spec, 0, f"file://{tempfile.mkdtemp()}/rendezvous"))
    lora = LoraConfig(rank=RANK, seed=0, train_unembed=False)
    trainer.create(PreparedModel(model_id="m", lora_config=lora, optimizer_config=OptimizerConfig()))
    data = tuple(
        Datum(
            model_input=ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": TensorData.from_numpy(row[1:].astype(np.int64))},
        )
        for row in tokens
    )
    batch = PreparedModelPassBatch(
        requests=(PreparedModelPass(request_id="p", model_id="m", data=data, loss_fn="cross_entropy"),)
    )
    step = PreparedOptimStep(request_id="s", model_id="m", adam_params=AdamParams())

    def forward_backward() -> None:
        passes = trainer.forward_backward(batch)
        while True:
            try:
                next(passes)
            except StopIteration as stop:
                error = stop.value[0].error
                break
        if error is not None:
            raise RuntimeError(error.message)

    return {"forward_backward": forward_backward, "optim_step": lambda: trainer.optim_step([step])}


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=200)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    tokens = rng.integers(2, 256, size=(NUM_DATA, NUM_TOKENS + 1), dtype=np.int32)
    data = [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1].tolist()),
            loss_fn_inputs={"target_tokens": row[1:].astype(np.int64), "weights": np.ones(NUM_TOKENS, np.float32)},
        )
        for row in tokens
    ]
    with tempfile.TemporaryDirectory() as directory:
        model = write_tiny_llama(Path(directory, "model"))
        flags = ("--device", arguments.device, "--dtype", arguments.dtype)
        stub = [sys.executable, str(Path(__file__).with_name("support") / "stub.py")]
        with (
            running_server(model, Path(directory, "data"), *flags, name="tiny") as url,
            running(stub, re.compile(r"stub ready on (\S+)")) as stub_url,
        ):
            calls = {
                "sdk_and_server": sdk_calls(client(url, "tiny"), data),
                "sdk_and_stub": sdk_calls(client(stub_url, "stub"), data),
                "direct": direct_calls(model, tokens, arguments.device, arguments.dtype),
            }
            times: dict[str, dict[str, list[float]]] = {op: {way: [] for way in calls} for op in OPERATIONS}
            for index in range(arguments.repeats + WARM_UP):
                for way, by_operation in calls.items():
                    for operation, call in by_operation.items():
                        elapsed = timed(call)
                        if index >= WARM_UP:
                            times[operation][way].append(elapsed)
    results: dict[str, object] = {"dtype": arguments.dtype, "goal_ms": GOAL_MS}
    for operation in OPERATIONS:
        p50 = {way: statistics.median(values) for way, values in times[operation].items()}
        share = p50["sdk_and_server"] - p50["sdk_and_stub"] - p50["direct"]
        parts = ", ".join(f"{way} {value:.2f}" for way, value in p50.items())
        print(f"{operation:16} p50 in ms: {parts}; server's share {share:.2f} (goal: at most {GOAL_MS})")
        results[operation] = {
            "p50_ms": {way: round(value, 3) for way, value in p50.items()},
            "server_share_ms": round(share, 3),
            "ratio_to_goal": round(share / GOAL_MS, 3),
        }
    report("latency", arguments.device, results)


if __name__ == "__main__":
    main()
