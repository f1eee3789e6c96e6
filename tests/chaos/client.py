"""The training script that must notice nothing: the unmodified SDK, in a process of its own.

``python -m tests.chaos.client LOOP --url URL --base-model NAME --steps N --record FILE`` writes one JSON line for every
result that it gets, in the order in which it asks for them, so that two runs can be compared line by line. The SDK
raising anything at all ends it with status 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import attrs
import numpy as np
import tinker
from tinker import types

API_KEY = "tml-chaos"
VOCABULARY = range(4, 60)
"""Token ids that every model of these tests has, none of them special."""
NUM_MANY = 1030
"""More data than the SDK puts into one request, so that it cuts them into chunks."""
ADAM = types.AdamParams(learning_rate=0.02, beta1=0.9, beta2=0.95, eps=1e-8)
AHEAD = 3
"""Steps that are submitted before the first one is waited for."""
FINAL = "final"


class Record:
    """Results as JSON lines; what differs from run to run, such as session ids, is left out."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def note(self, what: str, **values: Any) -> None:
        """Write a line; it is on disk when this returns, whatever happens to the process."""
        self._file.write(json.dumps({"what": what, **values}) + "\n")
        self._file.flush()

    def passed(self, what: str, output: types.ForwardBackwardOutput) -> None:
        """The result of a pass: its loss as it is, its logprobs as a digest and their sum."""
        logprobs = [np.array(fields["logprobs"].tolist(), np.float32) for fields in output.loss_fn_outputs]
        digest = hashlib.sha256(b"".join(row.tobytes() for row in logprobs)).hexdigest()[:16]
        total = float(sum(row.sum(dtype=np.float64) for row in logprobs))
        self.note(what, loss=output.metrics["loss:sum"], logprobs=total, exact=digest)

    def stepped(self, what: str, output: types.OptimStepResponse) -> None:
        """The result of an optimizer step."""
        self.note(what, grad_norm=(output.metrics or {})["grad_norm"])

    def sampled(self, what: str, output: types.SampleResponse) -> None:
        """The result of a sample, token by token."""
        sequences = [[list(found.tokens), list(found.logprobs or ())] for found in output.sequences]
        self.note(what, sequences=sequences)

    def saved(self, what: str, path: str) -> None:
        """The path of saved weights, without the run."""
        self.note(what, path=path.split("/", 3)[3])


def row(rng: np.random.Generator, length: int) -> list[int]:
    """Random tokens."""
    return [int(token) for token in rng.integers(VOCABULARY.start, VOCABULARY.stop, size=length)]


def datum(tokens: list[int], weight: float = 1.0) -> types.Datum:
    """Predict each next token."""
    inputs: dict[str, Any] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "weights": np.full(len(tokens) - 1, weight, np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


@attrs.frozen(kw_only=True)
class Script:
    """What a loop works with."""

    service: tinker.ServiceClient
    url: str
    base_model: str
    steps: int
    record: Record

    def create(self) -> tinker.TrainingClient:
        """A new model, the same in every run."""
        return self.service.create_lora_training_client(base_model=self.base_model, rank=4, seed=7).result()


def supervised(script: Script) -> tinker.TrainingClient:
    """Passes in several requests and steps, several of them in flight; saves, loads, and models made from saves."""
    service, record = script.service, script.record
    rest = tinker.RestClient(base_url=script.url, api_key=API_KEY)
    model = script.create()
    waiting: list[Callable[[], None]] = []
    last = ""

    def settle(down_to: int = 0) -> None:
        while len(waiting) > down_to:
            waiting.pop(0)()

    for step in range(script.steps):
        rng = np.random.default_rng([1, step])
        data = [datum(row(rng, int(rng.integers(6, 24)))) for _ in range(4)]
        if step % 5 == 2:
            data = [datum(row(rng, 4), 0.01) for _ in range(NUM_MANY)]
        passes = [model.forward_backward(data[:2], "cross_entropy"), model.forward_backward(data[2:], "cross_entropy")]
        stepped = model.optim_step(ADAM)
        waiting.append(_settle_step(record, step, passes, stepped))
        if step % 3 == 1:
            saving = model.save_state(f"step-{step}")
            settle()
            last = saving.result().path
            record.saved(f"save {step}", last)
        if step % 6 == 4:
            model.load_state_with_optimizer(last).result()
            record.note(f"load {step}")
        if step % 9 == 7:
            settle()
            model = service.create_training_client_from_state_with_optimizer(last).result()
            record.note(f"from state {step}")
        if step % 6 == 1 and step > 1:
            settle()
            rest.delete_checkpoint_from_tinker_path(last).result()
            last = model.save_state(f"again-{step}").result().path
            record.saved(f"save again {step}", last)
        settle(AHEAD)
    settle()
    return model


def _settle_step(record: Record, step: int, passes: list[Any], stepped: Any) -> Callable[[], None]:
    def settle() -> None:
        for number, passed in enumerate(passes):
            record.passed(f"pass {step}.{number}", passed.result())
        record.stepped(f"step {step}", stepped.result())

    return settle


def reinforced(script: Script) -> tinker.TrainingClient:
    """Sample several prompts at once from the newest weights, train on what came back."""
    record, model = script.record, script.create()
    for step in range(script.steps):
        sampler = model.save_weights_and_get_sampling_client().result()
        rng = np.random.default_rng([2, step])
        prompts = [row(rng, 5) for _ in range(5)]
        sampling = [
            sampler.sample(
                types.ModelInput.from_ints(prompt),
                2,
                types.SamplingParams(max_tokens=8, seed=100 * step + index, temperature=1.0, stop=[]),
            )
            for index, prompt in enumerate(prompts)
        ]
        rollouts = []
        for index, future in enumerate(sampling):
            output = future.result()
            record.sampled(f"sample {step}.{index}", output)
            rollouts += [_rollout(prompts[index], found) for found in output.sequences]
        passes = [
            model.forward_backward(rollouts[:5], "importance_sampling"),
            model.forward_backward(rollouts[5:], "importance_sampling"),
        ]
        stepped = model.optim_step(ADAM)
        _settle_step(record, step, passes, stepped)()
        if step % 4 == 3:
            record.saved(f"save {step}", model.save_state(f"step-{step}").result().path)
    return model


def _rollout(prompt: list[int], sequence: types.SampledSequence) -> types.Datum:
    """Advantage: even tokens are good, odd ones are bad."""
    answer = list(sequence.tokens)
    tokens = [*prompt, *answer]
    silent = [0.0] * (len(prompt) - 1)
    inputs: dict[str, Any] = {
        "target_tokens": np.array(tokens[1:], np.int64),
        "logprobs": np.array([*silent, *(sequence.logprobs or ())], np.float32),
        "advantages": np.array([*silent, *(1.0 if token % 2 == 0 else -1.0 for token in answer)], np.float32),
    }
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


LOOPS = {"supervised": supervised, "reinforced": reinforced}


def main() -> None:
    """Run a loop and save what it made."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("loop", choices=sorted(LOOPS))
    parser.add_argument("--url", required=True)
    parser.add_argument("--base-model", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--record", type=Path, required=True)
    arguments = parser.parse_args()
    with (
        arguments.record.open("w") as file,
        tinker.ServiceClient(base_url=arguments.url, api_key=API_KEY) as service,
    ):
        record = Record(file)
        script = Script(
            service=service,
            url=arguments.url,
            base_model=arguments.base_model,
            steps=arguments.steps,
            record=record,
        )
        _finish(service, LOOPS[arguments.loop](script), record)


def _finish(service: tinker.ServiceClient, model: tinker.TrainingClient, record: Record) -> None:
    """Save what the loop made, and use it."""
    probe = row(np.random.default_rng(3), 20)
    record.passed("probe", model.forward([datum(probe)], "cross_entropy").result())
    record.saved("final state", model.save_state(FINAL).result().path)
    path = model.save_weights_for_sampler(FINAL).result().path
    record.saved("final sampler", path)
    sampler = service.create_sampling_client(model_path=path).result()
    params = types.SamplingParams(max_tokens=12, seed=5, stop=[])
    record.sampled("final sample", sampler.sample(types.ModelInput.from_ints(probe[:6]), 3, params).result())
    record.note("done", path=path, state=path.replace("/sampler_weights/", "/weights/"))


if __name__ == "__main__":
    main()
