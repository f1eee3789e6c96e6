"""What Hugging Face and plain torch make of the data that trainers of all parameters are given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinker_core.testing.trainer_lab import Arrays
from tinker_core.types import AdamParams, Datum


class Reference:
    """A Hugging Face model in float32 that accumulates gradients by autograd."""

    def __init__(self, directory: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        self._optimizer: Any = torch.optim.AdamW(self.model.parameters())

    def logprobs(self, datum: Datum) -> Any:
        """Of a datum's targets, float32 ``[T]``."""
        import torch

        tokens = torch.from_numpy(datum.model_input.text_tokens().astype(np.int64))
        targets = torch.from_numpy(datum.loss_fn_inputs["target_tokens"].to_numpy().copy())
        logits = self.model(tokens[None]).logits[0].float()
        return torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0]

    def backward(self, data: Sequence[Datum]) -> float:
        """Add the gradient of the weighted cross entropy; returns the loss."""
        import torch

        total = 0.0
        for datum in data:
            weights = torch.from_numpy(datum.loss_fn_inputs["weights"].to_numpy().copy())
            loss = -(weights * self.logprobs(datum)).sum()
            loss.backward()
            total += loss.item()
        return total

    def step(self, params: AdamParams) -> float:
        """Clip and step as torch does; returns the norm of the gradient."""
        import torch

        limit = params.grad_clip_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        self._optimizer.param_groups[0].update(
            lr=params.learning_rate,
            betas=(params.beta1, params.beta2),
            eps=params.eps,
            weight_decay=params.weight_decay,
        )
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    @property
    def gradient(self) -> Arrays:
        """Of every parameter by its name."""
        return _by_expert({name: one.grad.numpy().copy() for name, one in self.model.named_parameters()})

    @property
    def weights(self) -> Arrays:
        """Of every parameter by its name."""
        return _by_expert({name: one.detach().numpy().copy() for name, one in self.model.named_parameters()})


def _by_expert(arrays: Arrays) -> Arrays:
    """Experts, which Transformers holds in one tensor for all, under the names that they have in files."""
    found: Arrays = {}
    for name, array in arrays.items():
        prefix, stacked, kind = name.partition(".experts.")
        if not stacked:
            found[name] = array
            continue
        for expert, one in enumerate(array):
            halves = np.split(one, 2) if kind == "gate_up_proj" else [one]
            names = ("gate_proj", "up_proj") if kind == "gate_up_proj" else (kind,)
            for part, half in zip(names, halves, strict=True):
                found[f"{prefix}.experts.{expert}.{part}.weight"] = half
    return found
