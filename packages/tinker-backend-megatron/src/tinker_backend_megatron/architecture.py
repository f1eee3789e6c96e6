"""What a Hugging Face configuration says of a model, and whether it can be run and divided as asked."""

from __future__ import annotations

import math
from typing import Any

import attrs
from transformers import AutoConfig

from tinker_backend_megatron.topology import DISPATCHER, EXPERT, PIPELINE, TENSOR, Topology
from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import RankContext

SUPPORTED_ARCHITECTURES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Values of ``model_type`` in ``config.json`` that this trainer can load."""

# Other kinds choose frequencies by the longest sequence of a batch, so co-tenants would change each other's numbers.
_SUPPORTED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@attrs.frozen(kw_only=True)
class Experts:
    """The mixture of experts in place of each feed-forward layer."""

    count: int
    per_token: int
    ffn_size: int
    renormalizes: bool
    """Whether the weights of a token's experts are made to sum to 1."""


@attrs.frozen(kw_only=True, eq=False)
class Architecture:
    """The shape of a model."""

    name: str
    hf_config: Any
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    norm_epsilon: float
    normalizes_qk: bool
    has_qkv_bias: bool
    ties_embeddings: bool
    experts: Experts | None = None

    @property
    def query_heads_per_group(self) -> int:
        """Query heads that share a key-value head."""
        return self.num_heads // self.num_kv_heads


def read_architecture(path: str) -> Architecture:
    """Read ``config.json``; raises `ConfigurationError` for what this trainer cannot run."""
    config = _load_config(path)
    _check_supported(path, config)
    kind = str(config.model_type)
    return Architecture(
        name=kind,
        hf_config=config,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_size=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings),
        norm_epsilon=config.rms_norm_eps,
        normalizes_qk=kind.startswith("qwen3"),
        has_qkv_bias=kind == "qwen2",
        ties_embeddings=bool(config.tie_word_embeddings),
        experts=_experts(config) if kind == "qwen3_moe" else None,
    )


def _load_config(path: str) -> Any:  # noqa: ANN401 - one class per architecture
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"base model {path!r} cannot be loaded: {error}") from error


def _check_supported(path: str, config: Any) -> None:  # noqa: ANN401
    if config.model_type not in SUPPORTED_ARCHITECTURES:
        known = ", ".join(SUPPORTED_ARCHITECTURES)
        raise ConfigurationError(f"base model {path!r} has model_type {config.model_type!r}; supported: {known}")
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigurationError(f"base model {path!r} is quantized; give a directory with plain weights")
    if getattr(config, "use_sliding_window", False):
        raise ConfigurationError(f"base model {path!r} uses sliding-window attention, which is not supported")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            raise ConfigurationError(f"base model {path!r} has {name}, which needs --backend fsdp")
    if config.hidden_act != "silu":
        raise ConfigurationError(f"base model {path!r} uses the activation {config.hidden_act!r}; supported: silu")
    if config.model_type == "qwen3_moe" and (config.decoder_sparse_step != 1 or config.mlp_only_layers):
        raise ConfigurationError(f"base model {path!r} has layers without experts between those with; not supported")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type not in _SUPPORTED_ROPE_TYPES:
        known = ", ".join(sorted(_SUPPORTED_ROPE_TYPES))
        raise ConfigurationError(f"base model {path!r} uses rope type {rope_type!r}; the megatron backend runs {known}")


def _experts(config: Any) -> Experts:  # noqa: ANN401
    return Experts(
        count=config.num_experts,
        per_token=config.num_experts_per_tok,
        ffn_size=config.moe_intermediate_size,
        renormalizes=bool(config.norm_topk_prob),
    )


def plan_topology(context: RankContext) -> Topology:
    """How the ranks share the model; raises `ConfigurationError` before any rank waits for another."""
    architecture = read_architecture(context.base_model.path)
    topology = Topology.from_options(context.world_size, context.options)
    check_division(architecture, topology)
    if architecture.experts is None:
        return topology
    if topology.expert_dispatcher == "alltoall" and context.device == "cpu":
        raise ConfigurationError(
            f"--{DISPATCHER} alltoall needs --device cuda: Megatron-Core hands gloo sizes that it does not take; "
            f"use --{DISPATCHER} allgather"
        )
    # Else tensor-parallel ranks would all send the same tokens to the experts.
    return attrs.evolve(topology, sequence_parallel=topology.tensor > 1)


def check_division(architecture: Architecture, topology: Topology) -> None:
    """Raise `ConfigurationError`, naming the legal values, when the model cannot be divided so."""
    heads, kv_heads, layers = architecture.num_heads, architecture.num_kv_heads, architecture.num_layers
    sizes = {"attention heads": heads, "key-value heads": kv_heads}
    if architecture.experts is None:
        sizes["feed-forward size"] = architecture.ffn_size
    _check(TENSOR, topology.tensor, sizes)
    _check(PIPELINE, topology.pipeline, {"layers": layers})
    if architecture.experts is not None:
        _check(EXPERT, topology.expert, {"experts": architecture.experts.count})
    elif topology.expert > 1:
        raise ConfigurationError(f"--{EXPERT} {topology.expert}: this model has no experts; leave it at 1")


def _check(option: str, size: int, sizes: dict[str, int]) -> None:
    if all(whole % size == 0 for whole in sizes.values()):
        return
    common = math.gcd(*sizes.values())
    legal = ", ".join(str(value) for value in range(1, common + 1) if common % value == 0)
    what = " and ".join(f"{whole} {name}" for name, whole in sizes.items())
    raise ConfigurationError(f"--{option} {size} does not divide this model's {what}; legal values: {legal}")
