"""New tokens per second of sampling through the server, beside what its sampler is measured by.

That is ``model.generate`` for the colocated sampler, and for ``--sampler vllm`` an ``AsyncLLM`` of the same settings.
Both decode the same ragged prompts with the same adapter (and with none), the same number of new tokens each, at batch
1, 8 and 32, in turns.  ``generate`` pads the prompts; server and ``AsyncLLM`` get one request per prompt.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import attrs
import numpy as np
import tinker
import torch
from peft import PeftModel
from support.models import smollm2, vocabulary_size
from support.report import report
from support.server import running_server
from tinker import types
from transformers import AutoModelForCausalLM

RANK = 16
GOALS = {"colocated": {1: 0.9, 8: 1.0, 32: 1.0}, "vllm": {1: 0.9, 8: 0.9, 32: 0.9}}
BATCHES = (1, 8, 32)


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(batch)
    return [rng.integers(3, vocab_size, size=n).tolist() for n in rng.integers(16, 96, size=batch)]


def through_server(client: tinker.SamplingClient, batch: list[list[int]], new_tokens: int) -> int:
    params = types.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[], seed=0)
    futures = [client.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in batch]
    return sum(len(future.result().sequences[0].tokens) for future in futures)


class Reference(Protocol):
    """What the server is compared with."""

    def use_adapter(self, directory: Path) -> None:
        """Sample with a PEFT adapter from now on."""

    def sample(self, batch: list[list[int]], new_tokens: int) -> int:
        """Continue all prompts; the number of new tokens."""


class Generate:
    """``model.generate`` of Hugging Face."""

    def __init__(self, model: Path, device: str, dtype: str) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()

    def use_adapter(self, directory: Path) -> None:
        self._model = PeftModel.from_pretrained(self._model, directory).eval()

    def sample(self, batch: list[list[int]], new_tokens: int) -> int:
        longest = max(len(prompt) for prompt in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(batch):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        with torch.no_grad():
            output = self._model.generate(
                input_ids=ids.to(self._model.device),
                attention_mask=mask.to(self._model.device),
                max_new_tokens=new_tokens,
                min_new_tokens=new_tokens,
                do_sample=True,
                top_k=0,
                pad_token_id=0,
            )
        return int(output.shape[0] * (output.shape[1] - longest))


@contextmanager
def reference(sampler: str, model: Path, device: str, dtype: str) -> Iterator[Reference]:
    if sampler == "colocated":
        yield Generate(model, device, dtype)
        return
    from support.bare_vllm import bare_vllm  # vLLM need not be installed for the other one

    with bare_vllm(model, device, dtype) as bare:
        yield bare


def train_and_save(service: tinker.ServiceClient, vocab_size: int) -> str:
    """A sampler path of an adapter that has taken a few steps, so that both of its factors are dense."""
    training = service.create_lora_training_client(base_model="smollm2", rank=RANK).result()
    row = np.random.default_rng(0).integers(3, vocab_size, size=65)
    datum = types.Datum(
        model_input=types.ModelInput.from_ints(row[:-1].tolist()),
        loss_fn_inputs={"target_tokens": row[1:], "weights": np.ones(64, np.float32)},
    )
    for _ in range(2):
        training.forward_backward([datum], "cross_entropy").result()
        training.optim_step(types.AdamParams(learning_rate=1e-4)).result()
    return training.save_weights_for_sampler("bench").result().path


@attrs.frozen(kw_only=True)
class Sizes:
    """How much is measured."""

    batches: tuple[int, ...]
    new_tokens: int
    repeats: int

    rounds_of_one: int
    """Rounds for each repeat at batch 1: small batches give few tokens a round, so they get more of them."""

    def rounds(self, batch_size: int) -> int:
        """How often a batch is run; the first time warms up."""
        return 1 + self.repeats * max(1, self.rounds_of_one // batch_size)


def measure(sampler: str, dtype: str, device: str, sizes: Sizes, path: Path) -> dict[str, dict[str, float]]:
    vocab_size = vocabulary_size(path)
    results = {}
    flags = ("--sampler", sampler, "--dtype", dtype, "--device", device)
    with (
        tempfile.TemporaryDirectory() as directory,
        reference(sampler, path, device, dtype) as other,
        running_server(path, Path(directory), *flags, name="smollm2") as url,
    ):
        service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        saved = train_and_save(service, vocab_size)
        adapter = next(Path(directory).rglob("adapter_config.json")).parent
        for label in ("base", "lora"):
            if label == "base":
                client = service.create_sampling_client(base_model="smollm2").result()
            else:
                client = service.create_sampling_client(model_path=saved).result()
                other.use_adapter(adapter)
            for batch_size in sizes.batches:
                rounds = compare(client, other, prompts(batch_size, vocab_size), sizes)
                title = f"{dtype:9} {label:5} batch {batch_size:2}"
                results[f"{label}_{batch_size}"] = summarise(title, rounds, GOALS[sampler][batch_size], sampler)
    return results


def compare(
    client: tinker.SamplingClient, other: Reference, batch: list[list[int]], sizes: Sizes
) -> list[tuple[float, float]]:
    """Tokens per second of the server and of the reference, round by round, one after the other."""

    def rate(call: Callable[[], int]) -> float:
        start = time.perf_counter()
        count = call()
        return count / (time.perf_counter() - start)

    rounds = []
    for repeat in range(sizes.rounds(len(batch))):
        calls = {
            "server": lambda: through_server(client, batch, sizes.new_tokens),
            "reference": lambda: other.sample(batch, sizes.new_tokens),
        }
        order = list(calls) if repeat % 2 else list(reversed(calls))  # neither always comes after the other
        rates = {name: rate(calls[name]) for name in order}
        if repeat > 0:  # the first round warms up
            rounds.append((rates["server"], rates["reference"]))
    return rounds


def summarise(title: str, rounds: list[tuple[float, float]], goal: float, sampler: str) -> dict[str, float]:
    """Medians of the rates, and of the ratios of the rounds."""
    server, other = (statistics.median(rates) for rates in zip(*rounds, strict=True))
    ratio = statistics.median(ours / theirs for ours, theirs in rounds)
    name = {"colocated": "generate", "vllm": "async_llm"}[sampler]
    print(
        f"{title}: server {server:7.1f} tok/s   {name} {other:7.1f} tok/s   ratio {ratio:.2f} (goal {goal})", flush=True
    )
    return {
        "server_tokens_per_second": round(server, 1),
        f"{name}_tokens_per_second": round(other, 1),
        "ratio": round(ratio, 3),
    }


def default_dtypes(sampler: str, device: str) -> list[str]:
    """Two engines take turns for long enough in one type; processors without bfloat16 emulate it."""
    if sampler == "colocated":
        return ["float32", "bfloat16"]
    return ["float32" if device == "cpu" else "bfloat16"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sampler", default="colocated", choices=list(GOALS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", action="append", type=int, choices=BATCHES)
    arguments = parser.parse_args()
    path = smollm2()
    sampler: str = arguments.sampler
    dtypes = arguments.dtype or default_dtypes(sampler, arguments.device)
    batches = tuple(arguments.batch or BATCHES)
    sizes = Sizes(
        batches=batches,
        new_tokens=arguments.new_tokens,
        repeats=arguments.repeats,
        rounds_of_one=8 if sampler == "colocated" else 2,
    )
    results = {dtype: measure(sampler, dtype, arguments.device, sizes, path) for dtype in dtypes}
    report("sample_throughput", arguments.device, {"model": "SmolLM2-135M", "sampler": sampler, **results})


if __name__ == "__main__":
    main()
