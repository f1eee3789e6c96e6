"""Fills a rank's parameters from a Hugging Face directory, range by range: no rank ever holds all of a model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from tinker_backend_megatron.mapping import ModelMap, Piece
from tinker_backend_megatron.topology import Place
from tinker_core.errors import CheckpointMismatchError, ConfigurationError, StorageError
from tinker_core.training.weight_files import WeightFiles


def load_weights(root: nn.Module, model_map: ModelMap, place: Place, directory: Path) -> None:
    """Fill all parameters of a rank's root; raises `ConfigurationError` that names what is missing or broken."""
    device = next(root.parameters()).device
    try:
        with WeightFiles(directory, device=device) as files:
            read_weights(root.named_parameters(), model_map, place, files)
    except (CheckpointMismatchError, StorageError) as error:
        raise ConfigurationError(
            f"base model {str(directory)!r} cannot be loaded: {error}; {_fix(directory)}"
        ) from error


@torch.no_grad()
def read_weights(
    parameters: Iterable[tuple[str, torch.Tensor]],
    model_map: ModelMap,
    place: Place,
    files: WeightFiles,
    *,
    prefix: str = "",
) -> None:
    """Fill tensors in the layout of a rank's parameters, by their names in its root: `export_weights` backwards.

    Values are converted to the tensors' own type; ``prefix`` is that of the tensors in the files.
    Raises `CheckpointMismatchError` and `StorageError`, after which the tensors are partly filled.
    """
    first_layer = model_map.topology.layers_of(place.pipeline, model_map.architecture.num_layers).start
    for name, tensor in parameters:
        for piece in model_map.pieces(name, first_layer, place):
            if piece.stop > piece.start:
                piece.put(tensor, _read(files, piece, model_map, prefix))


def _read(files: WeightFiles, piece: Piece, model_map: ModelMap, prefix: str) -> torch.Tensor:
    stacked = model_map.stacked(piece)
    if stacked is None or prefix + piece.name in files or prefix + stacked.name not in files:
        return files.read(prefix + piece.name, piece.shape, piece.axis, piece.start, piece.stop)
    of_expert = files.read(prefix + stacked.name, stacked.shape, 0, stacked.expert, stacked.expert + 1)
    return of_expert[0, stacked.start : stacked.start + piece.shape[0]]


def _fix(directory: Path) -> str:
    if not any(directory.glob("*.safetensors")) and any(directory.glob("*.bin")):
        return (
            "its weights are pickles (.bin), which are not read: convert them with "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    return "download it again, or give a directory whose safetensors files fit its config.json"
