"""New tokens per second of sampling: the colocated sampler through the server, beside ``model.generate``.

Both decode the same ragged prompts with the same adapter (and with none), the same number of new tokens each, at batch
1, 8 and 32, in turns.  ``generate`` pads the prompts; the server gets one request per prompt.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

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
GOALS = {1: 0.9, 8: 1.0, 32: 1.0}


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    rng = np.random.default_rng(batch)
    return [rng.integers(3, vocab_size, size=n).tolist() for n in rng.integers(16, 96, size=batch)]


def through_server(client: tinker.SamplingClient, batch: list[list[int]], new_tokens: int) -> int:
    params = types.SamplingParams(max_tokens=new_tokens, temperature=1.0, stop=[], seed=0)
    futures = [client.sample(types.ModelInput.from_ints(prompt), 1, params) for prompt in batch]
    return sum(len(future.result().sequences[0].tokens) for future in futures)


def through_generate(model: Any, batch: list[list[int]], new_tokens: int) -> int:
    longest = max(len(prompt) for prompt in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        output = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
    return int(output.shape[0] * (output.shape[1] - longest))


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

    def rounds(self, batch_size: int) -> int:
        """Small batches give few tokens a round, so they get more rounds; one more warms up."""
        return 1 + self.repeats * max(1, 8 // batch_size)


def measure(dtype: str, device: str, sizes: Sizes, path: Path) -> dict[str, dict[str, float]]:
    vocab_size = vocabulary_size(path)
    results = {}
    with (
        tempfile.TemporaryDirectory() as directory,
        running_server(path, Path(directory), "--dtype", dtype, "--device", device, name="smollm2") as url,
    ):
        service = tinker.ServiceClient(base_url=url, api_key="tml-benchmark")
        saved = train_and_save(service, vocab_size)
        adapter = next(Path(directory).rglob("adapter_config.json")).parent
        base = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).to(device).eval()
        plain = service.create_sampling_client(base_model="smollm2").result()
        results |= compare("base", plain, base, sizes, dtype)
        adapted = PeftModel.from_pretrained(base, adapter).eval()
        lora = service.create_sampling_client(model_path=saved).result()
        results |= compare("lora", lora, adapted, sizes, dtype)
    return results


def compare(
    label: str, client: tinker.SamplingClient, model: Any, sizes: Sizes, dtype: str
) -> dict[str, dict[str, float]]:
    results = {}
    vocab_size = model.config.vocab_size
    for batch_size in sizes.batches:
        goal = GOALS[batch_size]
        batch = prompts(batch_size, vocab_size)
        seconds, tokens = {"server": 0.0, "generate": 0.0}, {"server": 0, "generate": 0}
        for repeat in range(sizes.rounds(batch_size)):
            for name in seconds:
                start = time.perf_counter()
                if name == "server":
                    count = through_server(client, batch, sizes.new_tokens)
                else:
                    count = through_generate(model, batch, sizes.new_tokens)
                if repeat > 0:  # the first round warms up
                    seconds[name] += time.perf_counter() - start
                    tokens[name] += count
        rates = {name: tokens[name] / seconds[name] for name in seconds}
        ratio = rates["server"] / rates["generate"]
        print(
            f"{dtype:9} {label:5} batch {batch_size:2}: server {rates['server']:7.1f} tok/s   "
            f"generate {rates['generate']:7.1f} tok/s   ratio {ratio:.2f} (goal {goal})"
        )
        results[f"{label}_{batch_size}"] = {
            "server_tokens_per_second": round(rates["server"], 1),
            "generate_tokens_per_second": round(rates["generate"], 1),
            "ratio": round(ratio, 3),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--batch", action="append", type=int, choices=list(GOALS))
    arguments = parser.parse_args()
    path = smollm2()
    dtypes = arguments.dtype or ["float32", "bfloat16"]
    batches = tuple(arguments.batch or GOALS)
    sizes = Sizes(batches=batches, new_tokens=arguments.new_tokens, repeats=arguments.repeats)
    results = {dtype: measure(dtype, arguments.device, sizes, path) for dtype in dtypes}
    report("sample_throughput", arguments.device, {"model": "SmolLM2-135M", **results})


if __name__ == "__main__":
    main()
