"""Builds one rank's part of a model and fills it from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from tinker_backend_megatron.architecture import Architecture, check_division, read_architecture
from tinker_backend_megatron.context import PassContext
from tinker_backend_megatron.layers import PlannedAttention
from tinker_backend_megatron.linears import LoraColumnLinear, LoraRowLinear
from tinker_backend_megatron.mapping import ModelMap
from tinker_backend_megatron.model_config import make_config
from tinker_backend_megatron.root import MegatronRoot
from tinker_backend_megatron.weights import load_weights
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import ConfigurationError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@attrs.frozen(kw_only=True, eq=False)
class LoadedModel:
    """A rank's part of a base model, ready for packed passes."""

    root: MegatronRoot
    model_map: ModelMap
    dtype: torch.dtype

    @property
    def architecture(self) -> Architecture:
        """The shape of the model."""
        return self.model_map.architecture


def choose_dtype(name: str) -> torch.dtype:
    """A compute type by name; raises `ConfigurationError`."""
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not supported; use {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(path: str, dtype: torch.dtype, world: MegatronWorld) -> LoadedModel:
    """Load weights from a directory or hub name; raises `ConfigurationError` for what this trainer cannot run."""
    architecture = read_architecture(path)
    check_division(architecture, world.topology)
    model_map = ModelMap(architecture=architecture, topology=world.topology)
    config = make_config(architecture, world.topology, dtype, world.device)
    context = PassContext()
    context.tag = context.tag.detach().to(world.device).requires_grad_()
    root = MegatronRoot(architecture, config, world, context)
    root.requires_grad_(False)
    root.eval()
    _connect(root, model_map, world, context)
    load_weights(root, model_map, world.place, _directory(path))
    return LoadedModel(root=root, model_map=model_map, dtype=dtype)


def _connect(root: MegatronRoot, model_map: ModelMap, world: MegatronWorld, context: PassContext) -> None:
    """Tell the modules their names and what they share."""
    layers = world.topology.layers_of(world.place.pipeline, model_map.architecture.num_layers)
    for name, module in root.named_modules():
        if isinstance(module, LoraColumnLinear | LoraRowLinear):
            module.parts = model_map.lora_parts(name, layers.start)
            module.pass_context = context
        elif isinstance(module, PlannedAttention):
            module.pass_context = context


def _directory(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigurationError(f"the weights of base model {path!r} cannot be loaded: {error}") from error
