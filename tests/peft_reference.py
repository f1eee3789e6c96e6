"""Hugging Face + PEFT on trainers' exports: what trainers are compared with, written from definitions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tinker_core.types import Datum, TensorData

Arrays = dict[str, np.ndarray]


def load_peft(model_path: Path, adapters: Mapping[str, Path]) -> PeftModel:
    """The model in float32 with adapters by name; the first is the active one."""
    base = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    names = list(adapters)
    with warnings.catch_warnings():
        # PEFT warns about merging adapters on tied weights; nothing is merged here.
        warnings.filterwarnings("ignore", message=".*tie.*")
        model = PeftModel.from_pretrained(base, adapters[names[0]], adapter_name=names[0], is_trainable=True)
        for name in names[1:]:
            model.load_adapter(adapters[name], adapter_name=name, is_trainable=True)
    model.eval()
    return model


def parameters_of(model: PeftModel, adapter: str) -> dict[str, torch.nn.Parameter]:
    """An adapter's parameters by ``<module>.lora_A.weight`` or ``.lora_B.weight``."""
    return {
        key.removeprefix("base_model.model.").replace(f".{adapter}.", "."): parameter
        for key, parameter in model.named_parameters()
        if f".{adapter}." in key
    }


def gradients_of(model: PeftModel, adapter: str) -> Arrays:
    """An adapter's gradients by the same names."""
    return {
        name: parameter.grad.numpy().copy()
        for name, parameter in parameters_of(model, adapter).items()
        if parameter.grad is not None
    }


def dense(tensor: TensorData) -> torch.Tensor:
    return torch.from_numpy(np.array(tensor.to_numpy()))


def reference_logprobs(model: Any, datum: Datum) -> torch.Tensor:
    """Log-probabilities of a datum's targets, in their shape."""
    tokens = torch.from_numpy(datum.model_input.text_tokens().astype(np.int64))[None]
    targets = dense(datum.loss_fn_inputs["target_tokens"])
    table = torch.log_softmax(model(input_ids=tokens).logits[0].float(), -1)
    return table.gather(1, targets if targets.ndim == 2 else targets[:, None]).reshape(targets.shape)


def formula(name: str, p: torch.Tensor, datum: Datum, config: Mapping[str, float | str]) -> torch.Tensor:
    """Each loss of a datum, written from its definition; ``p`` are log-probabilities."""
    inputs = {key: dense(value) for key, value in datum.loss_fn_inputs.items()}
    if name == "cross_entropy":
        return -(inputs.get("weights", torch.ones_like(p)) * p).sum()
    q, a = inputs["logprobs"], inputs["advantages"]
    low = inputs.get("clip_low_threshold", torch.full_like(p, config.get("clip_low_threshold", 0.8)))
    high = inputs.get("clip_high_threshold", torch.full_like(p, config.get("clip_high_threshold", 1.2)))
    ratio = (p - q).exp()
    if name == "importance_sampling":
        return -(ratio * a).sum()
    if name == "ppo":
        return -torch.min(ratio * a, torch.max(torch.min(ratio, high), low) * a).sum()
    if name == "cispo":
        return -(torch.max(torch.min(ratio, high), low).detach() * p * a).sum()
    if name == "dro":
        return -(p * a - 0.5 * config["beta"] * (p - q) ** 2).sum()
    assert name == "gspo"
    counted = inputs["sequence_ratio_mask"] != 0
    s = (p - q)[counted].mean().exp().detach() * (p - p.detach()).exp()
    return -torch.min(s * a, torch.max(torch.min(s, high), low) * a).sum()
