"""Load a Hugging Face causal LM, frozen, with our attention and LoRA linears, sharded when there are several ranks."""

from __future__ import annotations

from typing import Any

import attrs
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from tinker_backend_fsdp.attention import ATTENTION_NAME, register_attention
from tinker_backend_fsdp.root import CausalRoot
from tinker_core.errors import ConfigurationError
from tinker_core.lora_targets import ALL_TARGETS
from tinker_core.training.adapters import LinearSpec
from tinker_core.training.lora import LoraContext, install_lora
from tinker_core.training.world import World

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Values of ``model_type`` in ``config.json`` that this trainer can load."""

# Other kinds choose frequencies by the longest sequence of a batch, so co-tenants would change each other's numbers.
_SUPPORTED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@attrs.frozen(kw_only=True, eq=False)
class LoadedModel:
    """A base model that is ready for packed passes."""

    root: CausalRoot
    linears: tuple[LinearSpec, ...]
    """Linears that adapters may change, ``lm_head`` included."""
    dtype: torch.dtype
    vocab_size: int
    context_length: int
    architecture: str


def load_model(path: str, dtype_name: str, world: World) -> LoadedModel:
    """Load weights from a directory or hub name; raises `ConfigurationError` for what this trainer cannot run."""
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise ConfigurationError(f"dtype {dtype_name!r} is not supported; use {' or '.join(_DTYPES)}")
    config = _load_config(path)
    register_attention()
    model = _load_weights(path, dtype)
    model.to(world.device)
    model.eval()
    context = LoraContext()
    context.tag = context.tag.detach().to(world.device).requires_grad_()
    linears = install_lora(model, ALL_TARGETS, context)
    root = CausalRoot(model, context)
    if world.size > 1:
        _shard(root, model, world)
    return LoadedModel(
        root=root,
        linears=linears,
        dtype=dtype,
        vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings),
        architecture=str(config.model_type),
    )


def _load_config(path: str) -> Any:  # noqa: ANN401 - one class per architecture
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"base model {path!r} cannot be loaded: {error}") from error
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        known = ", ".join(SUPPORTED_ARCHITECTURES)
        raise ConfigurationError(f"base model {path!r} has model_type {config.model_type!r}; supported: {known}")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(f"base model {path!r} is quantized; give a directory with plain weights")
    if getattr(config, "use_sliding_window", False):
        raise ConfigurationError(f"base model {path!r} uses sliding-window attention, which is not supported")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _SUPPORTED_ROPE_TYPES:
        known = ", ".join(sorted(_SUPPORTED_ROPE_TYPES))
        raise ConfigurationError(f"base model {path!r} uses rope type {rope_type!r}; the fsdp backend runs {known}")
    return config


def _load_weights(path: str, dtype: torch.dtype) -> nn.Module:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
            use_safetensors=True,  # the other format is a pickle
        )
        model, info = loaded
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigurationError(f"the weights of base model {path!r} cannot be loaded: {error}") from error
    missing = sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"])
    if missing:
        # They would be random numbers.
        raise ConfigurationError(
            f"the weights of base model {path!r} lack {len(missing)} tensors, such as {missing[0]!r}"
        )
    assert isinstance(model, nn.Module)
    return model


def _shard(root: CausalRoot, model: nn.Module, world: World) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    layers = model.get_submodule("model.layers")
    for layer in layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
