"""Who fills a rank's parameters from a Hugging Face directory: this package, or a bridge of others. Needs no torch.

A bridge can be used if it fills modules that are not its own.  mbridge does: it goes by the names of Megatron-Core's
``GPTModel``, which are those of our root.  What it reads goes through the first tensor-parallel rank, tensor by tensor.
Writing is always `weight_export`'s: mbridge gathers every tensor in all ranks, and its ranks send each other pickles.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import Option

if TYPE_CHECKING:
    from tinker_backend_megatron.mapping import ModelMap
    from tinker_backend_megatron.root import MegatronRoot
    from tinker_backend_megatron.world import MegatronWorld

NONE, MBRIDGE = "none", "mbridge"
WEIGHTS_BRIDGE = Option(
    name="weights-bridge",
    type=str,
    default=NONE,
    help="who reads the base model's weights: none, which is this package itself, or mbridge where it is installed",
)
_CANNOT = {
    "mcore-bridge": "cannot be imported without Transformer Engine and fills only models that it has built itself",
    "megatron-bridge": "cannot be imported without Transformer Engine and fills only models that it has built itself",
}


class WeightsBridge(Protocol):
    """Fills all parameters of a rank's root; a collective. Raises `ConfigurationError`."""

    def __call__(self, root: MegatronRoot, model_map: ModelMap, world: MegatronWorld, directory: Path) -> None:
        """``directory`` is a Hugging Face model's."""


def choose_bridge(name: str) -> WeightsBridge:
    """A bridge by name; raises `ConfigurationError` for one that is unknown, unfit, or not installed."""
    flag = f"--{WEIGHTS_BRIDGE.name}"
    if name == NONE:
        return read_directly
    if name in _CANNOT:
        raise ConfigurationError(f"{flag} {name}: it {_CANNOT[name]}; use {NONE} or {MBRIDGE}")
    if name != MBRIDGE:
        raise ConfigurationError(f"{flag} {name!r} is not known; use {NONE} or {MBRIDGE}")
    if importlib.util.find_spec("mbridge") is None:
        raise ConfigurationError(
            f"{flag} {MBRIDGE} needs mbridge, which is not installed; install it with: "
            "pip install 'tinker-backend-megatron[mbridge]', or leave the option out"
        )
    return _read_by_mbridge


def read_directly(root: MegatronRoot, model_map: ModelMap, world: MegatronWorld, directory: Path) -> None:
    """Every rank reads its own part; what ``none`` stands for."""
    from tinker_backend_megatron.weights import load_weights

    load_weights(root, model_map, world.place, directory)


def _read_by_mbridge(root: MegatronRoot, model_map: ModelMap, world: MegatronWorld, directory: Path) -> None:
    import torch
    from mbridge import AutoBridge

    architecture = model_map.architecture
    if architecture.experts is not None:
        raise ConfigurationError(
            f"--{WEIGHTS_BRIDGE.name} {MBRIDGE} knows experts only in the form that Transformer Engine groups them in, "
            f"which this backend does not use; leave it at {NONE}"
        )
    bridge = AutoBridge.from_config(architecture.hf_config, dtype=root.config.params_dtype)
    _adapt(bridge, architecture.ties_embeddings)
    bridge.make_vocab_size_divisible_by = world.topology.tensor
    bridge.vocab_size, bridge.padded_vocab_size = architecture.vocab_size, root.tokens.padded_size
    try:
        with torch.no_grad():
            # One tensor after the other: otherwise the first tensor-parallel rank would hold all of its stage.
            bridge.load_weights([root], str(directory), memory_efficient=True)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        raise ConfigurationError(
            f"base model {str(directory)!r} cannot be loaded by {MBRIDGE}: {type(error).__name__}: {error}; "
            f"--{WEIGHTS_BRIDGE.name} {NONE} may tell more"
        ) from error


def _adapt(bridge: Any, ties_embeddings: bool) -> None:  # noqa: ANN401 - mbridge has no types
    """Teach it the norms, which it knows as a part of the linears that Transformer Engine fuses them into."""
    layer = "model.layers.{layer_number}."
    head = "model.embed_tokens.weight" if ties_embeddings else "lm_head.weight"
    # Of this object only: mbridge itself changes those of its classes, which other models share.
    bridge._DIRECT_MAPPING = {**bridge._DIRECT_MAPPING, "output_layer.weight": head}
    bridge._MLP_MAPPING = {
        **bridge._MLP_MAPPING,
        "pre_mlp_layernorm.weight": [f"{layer}post_attention_layernorm.weight"],
    }
    bridge._OTHER_MAPPING = {**bridge._OTHER_MAPPING, "input_layernorm.weight": [f"{layer}input_layernorm.weight"]}
