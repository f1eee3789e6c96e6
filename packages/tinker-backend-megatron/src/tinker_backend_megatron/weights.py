"""Reads a Hugging Face model's weights into a rank's parameters, piece by piece: no rank ever holds all of it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tinker_backend_megatron.mapping import ModelMap, Piece
from tinker_backend_megatron.topology import Place
from tinker_core.errors import ConfigurationError

INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_FILE = "model.safetensors"


class CheckpointReader:
    """Reads ranges of the tensors of a directory of safetensors files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self._index = self._read_index()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _read_index(self) -> dict[str, str]:
        index = self._directory / INDEX_FILE
        try:
            if index.exists():
                names: dict[str, str] = json.loads(index.read_text())["weight_map"]
                return names
            return dict.fromkeys(self._open(WEIGHTS_FILE).keys(), WEIGHTS_FILE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ConfigurationError(f"the weights in {self._directory} cannot be read: {error}") from error

    def _open(self, name: str) -> Any:  # noqa: ANN401 - safetensors has no types
        if name not in self._files:
            self._files[name] = self._stack.enter_context(safe_open(self._directory / name, framework="pt"))
        return self._files[name]

    def read(self, piece: Piece) -> torch.Tensor:
        """A piece; raises `ConfigurationError` for a tensor that is missing or has another shape."""
        if piece.name not in self._index:
            raise ConfigurationError(f"the weights in {self._directory} lack {piece.name!r}")
        try:
            part = self._open(self._index[piece.name]).get_slice(piece.name)
            if tuple(part.get_shape()) != piece.shape:
                raise ConfigurationError(
                    f"{piece.name!r} in {self._directory} has shape {part.get_shape()}, "
                    f"config.json means {list(piece.shape)}"
                )
            where = (slice(None),) * piece.axis + (slice(piece.start, piece.stop),)
            found: torch.Tensor = part[where]
        except (OSError, SafetensorError) as error:
            raise ConfigurationError(f"{piece.name!r} in {self._directory} cannot be read: {error}") from error
        return found


@torch.no_grad()
def load_weights(root: nn.Module, model_map: ModelMap, place: Place, directory: Path) -> None:
    """Fill all parameters of a rank's root."""
    first_layer = model_map.topology.layers_of(place.pipeline, model_map.architecture.num_layers).start
    with CheckpointReader(directory) as reader:
        for name, parameter in root.named_parameters():
            for piece in model_map.pieces(name, first_layer, place):
                piece.put(parameter, reader.read(piece))
