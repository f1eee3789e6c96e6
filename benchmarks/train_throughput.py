"""Tokens per second of training through the server with the SDK: of ``fsdp`` beside a plain Hugging Face + PEFT loop.

With ``--backend megatron``, of that backend beside ``fsdp``: two servers, of one rank each.

Both sides train the same LoRA on SmolLM2-135M with the same data, type and number of threads, one step each in turns.
The plain loop pads each batch to its longest sequence; servers pack.  Lengths are lognormal (median 100, sigma 0.7, at
most 512), as instruction data is.  Useful tokens count, padding does not.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np
import tinker
import torch
from peft import LoraConfig, get_peft_model
from support.models import smollm2, vocabulary_size
from support.report import report
from support.server import running_server
from tinker import types
from transformers import AutoModelForCausalLM

BATCH_SIZE, RANK = 8, 32
REFERENCES = {"fsdp": "peft", "megatron": "fsdp"}
"""Beside what each backend is measured."""
GOALS = {"fsdp": "; goal 1.5", "megatron": ""}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]


def batches(num: int, vocab_size: int) -> list[list[np.ndarray]]:
    rng = np.random.default_rng(0)
    lengths = np.minimum(512, np.exp(rng.normal(np.log(100), 0.7, size=(num, BATCH_SIZE)))).astype(int) + 1
    return [[rng.integers(3, vocab_size, size=length) for length in row] for row in lengths]


class Loop(Protocol):
    def step(self, batch: list[np.ndarray]) -> float: ...


class ServerLoop:
    def __init__(self, url: str) -> None:
        service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        self.training = service.create_lora_training_client(base_model="smollm2", rank=RANK).result()

    def step(self, batch: list[np.ndarray]) -> float:
        data = [
            types.Datum(
                model_input=types.ModelInput.from_ints(row[:-1].tolist()),
                loss_fn_inputs={"target_tokens": row[1:], "weights": np.ones(len(row) - 1, np.float32)},
            )
            for row in batch
        ]
        passed = self.training.forward_backward(data, "cross_entropy")
        stepped = self.training.optim_step(types.AdamParams(learning_rate=1e-4))
        loss = passed.result().metrics["loss:sum"]
        stepped.result()
        return float(loss)


class PeftLoop:
    def __init__(self, path: Path, device: str, dtype: str) -> None:
        base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device)
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=TARGETS, lora_dropout=0.0)
        self.model = get_peft_model(base, config)
        self.device = device
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, betas=(0.9, 0.95), eps=1e-12, weight_decay=0.0)

    def step(self, batch: list[np.ndarray]) -> float:
        longest = max(len(row) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(batch):
            ids[index, : len(row)] = torch.from_numpy(row)
            mask[index, : len(row)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        logits = self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1]).logits
        targets = torch.where(mask[:, 1:] == 1, ids[:, 1:], -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.item())


def make_loop(name: str, dtype: str, device: str, path: Path, stack: ExitStack) -> Loop:
    """The plain loop, or a backend behind a server of its own."""
    if name == "peft":
        return PeftLoop(path, device, dtype)
    data_dir = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    flags = ("--backend", name, "--dtype", dtype, "--device", device)
    return ServerLoop(stack.enter_context(running_server(path, data_dir, *flags, name="smollm2")))


def measure(backend: str, dtype: str, device: str, steps: int, path: Path) -> dict[str, float]:
    data = batches(steps + 1, vocabulary_size(path))
    reference = REFERENCES[backend]
    with ExitStack() as stack:
        loops = {name: make_loop(name, dtype, device, path, stack) for name in (backend, reference)}
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        first: dict[str, float] = {}
        for index, batch in enumerate(data):
            for name, loop in loops.items():
                start = time.perf_counter()
                loss = loop.step(batch)
                first.setdefault(name, loss)
                if index > 0:  # the first step warms up
                    seconds[name].append(time.perf_counter() - start)
    tolerance = 1e-4 if dtype == "float32" else 1e-2
    assert abs(first[backend] / first[reference] - 1) < tolerance, f"the loops compute different losses: {first}"
    tokens = sum(len(row) - 1 for batch in data[1:] for row in batch)
    rates = {name: tokens / sum(values) for name, values in seconds.items()}
    ratio = rates[backend] / rates[reference]
    paired = statistics.median(r / b for b, r in zip(seconds[backend], seconds[reference], strict=True))
    print(
        f"{dtype:9} {backend} {rates[backend]:7.1f} tok/s   {reference} {rates[reference]:7.1f} tok/s   "
        f"ratio {ratio:.2f} (per step, median {paired:.2f}{GOALS[backend]})"
    )
    return {**{f"{name}_tokens_per_second": round(rate, 1) for name, rate in rates.items()}, "ratio": round(ratio, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="fsdp", choices=list(REFERENCES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", type=Path, help="directory of a model to measure instead of SmolLM2-135M")
    arguments = parser.parse_args()
    path = arguments.model or smollm2()
    dtypes = arguments.dtype or ["float32", "bfloat16"]
    results = {dtype: measure(arguments.backend, dtype, arguments.device, arguments.steps, path) for dtype in dtypes}
    report("train_throughput", arguments.device, {"model": path.name, "batch_size": BATCH_SIZE, **results})


if __name__ == "__main__":
    main()
