"""Reads a Llama from a Hugging Face directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tinker_backend_nano.model import Config, Llama, rope_of
from tinker_core.errors import ConfigurationError


def load_llama(path: str, dtype: torch.dtype, device: torch.device) -> Llama:
    """Raises `ConfigurationError` for what cannot be read, and for what the model would compute wrongly."""
    try:
        config = json.loads((Path(path) / "config.json").read_text())
    except OSError as error:
        raise ConfigurationError(f"base model {path!r} cannot be read: {error}") from error
    check(config, path)
    generation = Path(path) / "generation_config.json"  # what ends a sequence stands here, where the file is there
    config |= {"eos_token_id": json.loads(generation.read_text()).get("eos_token_id")} if generation.exists() else {}
    weights: dict[str, torch.Tensor] = {}
    for file in sorted(Path(path).glob("*.safetensors")):
        weights |= {name: tensor.to(device, dtype) for name, tensor in load_file(file).items()}
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    with torch.device("meta"):
        model = Llama(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise ConfigurationError(f"the weights of base model {path!r} do not fit: {error}") from error
    return model


def check(config: Config, path: str) -> None:
    """Refuse other architectures, and Llamas with more than `Llama` has."""
    needed = {
        "model_type": (config.get("model_type"), "llama"),
        "rope_type": (rope_of(config).get("rope_type", "default"), "default"),
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for name, (found, supported) in needed.items():
        if found != supported:
            raise ConfigurationError(
                f"base model {path!r} has {name} {found!r}; the backend nano runs {supported!r} only"
            )
