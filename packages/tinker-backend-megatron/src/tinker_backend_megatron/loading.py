"""Builds one rank's part of a model and fills it from a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path

import attrs
import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from megatron.core.transformer.moe.moe_layer import MoELayer

from tinker_backend_megatron.architecture import Architecture, read_architecture
from tinker_backend_megatron.bridges import WeightsBridge, read_directly
from tinker_backend_megatron.context import PassContext
from tinker_backend_megatron.experts import ExpertLinear, connect_experts
from tinker_backend_megatron.layers import PlannedAttention
from tinker_backend_megatron.linears import LoraColumnLinear, LoraRowLinear
from tinker_backend_megatron.mapping import ModelMap
from tinker_backend_megatron.model_config import make_config
from tinker_backend_megatron.root import MegatronRoot
from tinker_backend_megatron.world import MegatronWorld
from tinker_core.errors import ConfigurationError
from tinker_core.sampling.stopping import eos_tokens_of
from tinker_core.training.model_files import MODEL_FILE_PATTERNS

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@attrs.frozen(kw_only=True, eq=False)
class LoadedModel:
    """A rank's part of a base model, ready for packed passes."""

    root: MegatronRoot
    model_map: ModelMap
    dtype: torch.dtype
    directory: Path
    """Where the Hugging Face model is."""

    @property
    def architecture(self) -> Architecture:
        """The shape of the model."""
        return self.model_map.architecture

    @property
    def eos_tokens(self) -> frozenset[int]:
        """Where samples end unless they are told otherwise."""
        return eos_tokens_of(str(self.directory), self.architecture.hf_config)


def choose_dtype(name: str) -> torch.dtype:
    """A compute type by name; raises `ConfigurationError`."""
    if name not in _DTYPES:
        raise ConfigurationError(f"dtype {name!r} is not supported; use {' or '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(
    path: str,
    dtype: torch.dtype,
    world: MegatronWorld,
    *,
    transformer_engine: bool = False,
    read: WeightsBridge = read_directly,
) -> LoadedModel:
    """Load weights from a directory or hub name; raises `ConfigurationError` for what this trainer cannot run."""
    architecture = read_architecture(path)
    model_map = ModelMap(architecture=architecture, topology=world.topology)
    _prepare_megatron(world)
    config = make_config(architecture, world.topology, dtype, world.device, transformer_engine=transformer_engine)
    context = PassContext()
    context.tag = context.tag.detach().to(world.device).requires_grad_()
    root = MegatronRoot(architecture, config, world, context)
    root.requires_grad_(False)
    root.eval()
    _connect(root, model_map, world, context)
    directory = _directory(path)
    read(root, model_map, world, directory)
    return LoadedModel(root=root, model_map=model_map, dtype=dtype, directory=directory)


def _prepare_megatron(world: MegatronWorld) -> None:
    """Make up for what Megatron-Core lacks on this machine; loads the CPU shim only where it cannot run without it."""
    topology = world.topology
    needs = {
        "pipeline parallelism": topology.pipeline > 1,
        "sequence parallelism": topology.sequence_parallel,
        "expert parallelism": topology.expert > 1,
    }
    reason = ", ".join(name for name, needed in needs.items() if needed)
    if reason and world.device.type == "cpu":
        from tinker_backend_megatron import cpu_shim

        cpu_shim.install(reason, announce=world.rank == 0)


def _connect(root: MegatronRoot, model_map: ModelMap, world: MegatronWorld, context: PassContext) -> None:
    """Tell the modules their names and what they share."""
    layers = world.topology.layers_of(world.place.pipeline, model_map.architecture.num_layers)
    for name, module in root.named_modules():
        if isinstance(module, LoraColumnLinear | LoraRowLinear | ExpertLinear):
            module.parts = model_map.lora_parts(name, layers.start, world.place)
            module.pass_context = context
        elif isinstance(module, PlannedAttention):
            module.pass_context = context
        elif isinstance(module, MoELayer):
            connect_experts(module, context)


def _directory(path: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.safetensors", *MODEL_FILE_PATTERNS]))
    except (OSError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise ConfigurationError(f"the weights of base model {path!r} cannot be loaded: {error}") from error
