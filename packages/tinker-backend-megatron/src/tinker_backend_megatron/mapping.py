"""Which part of which Hugging Face tensor a rank's parameters are made of, in both directions.

A parameter of Megatron-Core holds one or several pieces: query, key and value in one, gate and up in one.  A piece is a
range of one axis of a Hugging Face tensor, and a view of the parameter.
"""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import torch

from tinker_backend_megatron.architecture import Architecture
from tinker_backend_megatron.rows import LinearShard
from tinker_backend_megatron.topology import Place, Topology
from tinker_core.lora_targets import ATTENTION_TARGETS, MLP_TARGETS
from tinker_core.training.adapters import LinearSpec
from tinker_core.training.lora import LoraPart, Section


@attrs.frozen(kw_only=True)
class Piece:
    """A part of a Hugging Face tensor that lies in a parameter of this rank."""

    name: str
    """The Hugging Face tensor."""
    shape: tuple[int, ...]
    """Its whole shape."""
    axis: int = 0
    start: int = 0
    stop: int = 0
    """Range of ``axis``."""
    section: Section | None = None
    """Where it lies in axis 0 of the parameter; None means that it is all of the parameter's beginning."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        shape = list(self.shape)
        shape[self.axis] = self.stop - self.start
        return tuple(shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is the whole tensor."""
        return self.stop - self.start == self.shape[self.axis]

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Its elements in a parameter; reshape it to `local_shape`."""
        if self.section is None:
            return parameter[: self.local_shape[0]]
        return self.section.of(parameter, axis=0)

    def put(self, parameter: torch.Tensor, values: torch.Tensor) -> None:
        """Copy ``local_shape`` values into a parameter."""
        view = self.view(parameter)
        view.copy_(values.view(view.shape))

    def take(self, parameter: torch.Tensor) -> torch.Tensor:
        """A contiguous copy ``local_shape``."""
        return self.view(parameter).reshape(self.local_shape).clone()


@attrs.frozen(kw_only=True)
class StackedPiece:
    """A matrix of an expert in the other form that Hugging Face models have on disk: one tensor for all experts."""

    name: str
    shape: tuple[int, int, int]
    expert: int
    start: int
    """First of its rows; gate and up are one above the other."""


@attrs.frozen(kw_only=True)
class ModelMap:
    """A model's names and shapes in every rank of a world."""

    architecture: Architecture
    topology: Topology

    # --- linears that adapters may change -----------------------------------------------------------------------------

    def linears(self) -> tuple[LinearSpec, ...]:
        """All of them whole, in the order of the Hugging Face model."""
        model = self.architecture
        found = [spec for layer in range(model.num_layers) for spec in self._layer_linears(layer)]
        return (*found, self._linear("lm_head"))

    def _layer_linears(self, layer: int) -> Iterator[LinearSpec]:
        prefix = f"model.layers.{layer}."
        for name in ATTENTION_TARGETS:
            yield self._linear(f"{prefix}self_attn.{name}")
        experts = self.architecture.experts
        blocks = ("mlp",) if experts is None else tuple(f"mlp.experts.{expert}" for expert in range(experts.count))
        for block in blocks:
            for name in MLP_TARGETS:
                yield self._linear(f"{prefix}{block}.{name}")

    def _linear(self, name: str) -> LinearSpec:
        """A linear by its name."""
        model = self.architecture
        kind = name.rsplit(".", 1)[-1]
        hidden, queries, keys = model.hidden_size, model.num_heads * model.head_size, model.num_kv_heads
        keys *= model.head_size
        ffn = model.experts.ffn_size if model.experts is not None else model.ffn_size
        if kind in ("o_proj", "down_proj"):
            inputs, outputs = (queries if kind == "o_proj" else ffn), hidden
        else:
            sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys, "lm_head": model.vocab_size}
            inputs, outputs = hidden, sizes.get(kind, ffn)
        return LinearSpec(name=name, in_features=inputs, out_features=outputs)

    def shards_of(self, rank: int) -> tuple[LinearShard, ...]:
        """The parts of all linears that a rank holds."""
        place = self.topology.place(rank)
        layers = self.topology.layers_of(place.pipeline, self.architecture.num_layers)
        last = place.pipeline == self.topology.pipeline - 1
        wanted = [spec for layer in layers for spec in self._layer_linears(layer)]
        if last:
            wanted.append(self._linear("lm_head"))
        return tuple(shard for spec in wanted if (shard := self._shard(spec, place)) is not None)

    def _shard(self, spec: LinearSpec, place: Place) -> LinearShard | None:
        inputs, outputs = (0, spec.in_features), (0, spec.out_features)
        kind = spec.name.rsplit(".", 1)[-1]
        if ".experts." in spec.name:
            expert = int(spec.name.split(".experts.")[1].split(".")[0])
            mine = expert in self.experts_of(place)
            return LinearShard(spec=spec, inputs=inputs, outputs=outputs, expert=True) if mine else None
        if kind in ("o_proj", "down_proj"):
            inputs = _share(spec.in_features, place.tensor, self.topology.tensor)
        else:
            outputs = _share(spec.out_features, place.tensor, self.topology.tensor)
        return LinearShard(spec=spec, inputs=inputs, outputs=outputs)

    def experts_of(self, place: Place) -> range:
        """The experts of a rank."""
        assert self.architecture.experts is not None
        each = self.architecture.experts.count // self.topology.expert
        return range(place.expert * each, (place.expert + 1) * each)

    # --- fused linears ------------------------------------------------------------------------------------------------

    def lora_parts(self, module_name: str, first_layer: int, place: Place) -> tuple[LoraPart, ...]:
        """The linears in a fused linear of Megatron-Core, by its qualified name in the root of the rank at a place."""
        fused = self._fused(module_name, first_layer, place)
        return tuple(LoraPart(name=name, section=section) for name, section in fused.items())

    def _fused(self, module_name: str, first_layer: int, place: Place) -> dict[str, Section]:
        """Hugging Face name and place in the output of each linear in a fused one."""
        words = module_name.split(".")
        prefix = f"model.layers.{int(words[2]) + first_layer}."
        model, tensor = self.architecture, self.topology.tensor
        if words[-1] == "linear_qkv":
            return self._fused_attention(prefix + "self_attn.")
        if words[-1] == "linear_proj":
            return {prefix + "self_attn.o_proj": Section.whole(model.hidden_size)}
        prefix, half = prefix + "mlp.", model.ffn_size // tensor
        if model.experts is not None:
            assert words[-3] == "local_experts"
            expert = self.experts_of(place)[int(words[-2])]
            prefix, half = f"{prefix}experts.{expert}.", model.experts.ffn_size
        if words[-1] == "linear_fc2":
            return {prefix + "down_proj": Section.whole(model.hidden_size)}
        assert words[-1] == "linear_fc1"
        return {
            prefix + "gate_proj": Section(groups=1, width=2 * half, start=0, stop=half),
            prefix + "up_proj": Section(groups=1, width=2 * half, start=half, stop=2 * half),
        }

    def _fused_attention(self, prefix: str) -> dict[str, Section]:
        model = self.architecture
        size, queries = model.head_size, model.query_heads_per_group
        groups, width = model.num_kv_heads // self.topology.tensor, (queries + 2) * size
        ends = {"q_proj": (0, queries), "k_proj": (queries, queries + 1), "v_proj": (queries + 1, queries + 2)}
        return {
            prefix + name: Section(groups=groups, width=width, start=start * size, stop=stop * size)
            for name, (start, stop) in ends.items()
        }

    # --- parameters ---------------------------------------------------------------------------------------------------

    def pieces(self, parameter_name: str, first_layer: int, place: Place) -> tuple[Piece, ...]:
        """What a parameter of a rank's root consists of."""
        model = self.architecture
        words = parameter_name.split(".")
        vocabulary = (model.vocab_size, model.hidden_size)
        if words[0] == "embedding":
            return (self._rows("model.embed_tokens.weight", vocabulary, place),)
        if words[0] == "output_layer":
            name = "model.embed_tokens.weight" if model.ties_embeddings else "lm_head.weight"
            return (self._rows(name, vocabulary, place),)
        if words[1] == "final_layernorm":
            return (_whole("model.norm.weight", (model.hidden_size,)),)
        if "layernorm" in words[-2]:
            return (self._norm(int(words[2]) + first_layer, words[-2]),)
        if words[-2] == "router":
            assert model.experts is not None
            name = f"model.layers.{int(words[2]) + first_layer}.mlp.gate.weight"
            return (_whole(name, (model.experts.count, model.hidden_size)),)
        return tuple(self._linear_pieces(".".join(words[:-1]), words[-1], first_layer, place))

    def _norm(self, layer: int, name: str) -> Piece:
        names = {
            "input_layernorm": ("input_layernorm", self.architecture.hidden_size),
            "pre_mlp_layernorm": ("post_attention_layernorm", self.architecture.hidden_size),
            "q_layernorm": ("self_attn.q_norm", self.architecture.head_size),
            "k_layernorm": ("self_attn.k_norm", self.architecture.head_size),
        }
        theirs, size = names[name]
        return _whole(f"model.layers.{layer}.{theirs}.weight", (size,))

    def _linear_pieces(self, module_name: str, kind: str, first_layer: int, place: Place) -> Iterator[Piece]:
        for name, section in self._fused(module_name, first_layer, place).items():
            shard = self._shard(self._linear(name), place)
            assert shard is not None
            whole = (shard.spec.out_features, shard.spec.in_features)
            start, stop = shard.inputs if shard.splits_inputs else shard.outputs
            if kind == "bias":
                yield Piece(name=f"{name}.bias", shape=whole[:1], start=start, stop=stop, section=section)
                continue
            axis = 1 if shard.splits_inputs else 0
            yield Piece(name=f"{name}.weight", shape=whole, axis=axis, start=start, stop=stop, section=section)

    def stacked(self, piece: Piece) -> StackedPiece | None:
        """Where else a piece may be; None for what is no expert's."""
        experts, hidden = self.architecture.experts, self.architecture.hidden_size
        prefix, found, rest = piece.name.partition(".experts.")
        if experts is None or not found:
            return None
        expert, kind, _ = rest.split(".")
        if kind == "down_proj":
            name, rows, columns, start = "down_proj", hidden, experts.ffn_size, 0
        else:
            name, rows, columns = "gate_up_proj", 2 * experts.ffn_size, hidden
            start = 0 if kind == "gate_proj" else experts.ffn_size
        shape = (experts.count, rows, columns)
        return StackedPiece(name=f"{prefix}.experts.{name}", shape=shape, expert=int(expert), start=start)

    def _rows(self, name: str, shape: tuple[int, int], place: Place) -> Piece:
        start, stop = _share(shape[0], place.tensor, self.topology.tensor)
        return Piece(name=name, shape=shape, start=start, stop=stop)


def _whole(name: str, shape: tuple[int, ...]) -> Piece:
    return Piece(name=name, shape=shape, stop=shape[0])


def _share(size: int, index: int, count: int) -> tuple[int, int]:
    """A rank's range of something; the last ranks have less when it cannot be divided evenly."""
    each = -(-size // count)
    return min(size, index * each), min(size, (index + 1) * each)
