"""Checkpoint directories: adapter weights as PEFT reads them, optimizer state and gradient keyed per module.

Files: ``adapter_config.json`` and ``adapter_model.safetensors`` (float32), ``optimizer.safetensors``,
``gradient.safetensors``, and ``tinker.json`` (a `CheckpointManifest`), which is written last.
Tensor keys name the module, never an offset in a row, so that another backend can lay them out differently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import cattrs
import torch
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file

from tinker_core.encoding import make_converter
from tinker_core.errors import CheckpointMismatchError, StorageError
from tinker_core.training.adapters import AdapterLayout
from tinker_core.types import MANIFEST_FILE, CheckpointManifest

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
OPTIMIZER_FILE = "optimizer.safetensors"
GRADIENT_FILE = "gradient.safetensors"

_PEFT_PREFIX = "base_model.model."


def write_weights(directory: Path, layout: AdapterLayout, row: torch.Tensor, manifest: CheckpointManifest) -> None:
    """Write an adapter and its PEFT configuration; raises `StorageError`."""
    _write_row(directory / WEIGHTS_FILE, layout, {_PEFT_PREFIX: row})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": manifest.base_model,
        "r": layout.rank,
        "lora_alpha": manifest.lora_config.alpha,
        "target_modules": sorted({linear.name.rsplit(".", 1)[-1] for linear in layout.linears}),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    _write_text(directory / CONFIG_FILE, json.dumps(config, indent=2))


def read_weights(directory: Path, layout: AdapterLayout) -> torch.Tensor:
    """The float32 row on the CPU; raises `CheckpointMismatchError` for other modules or shapes."""
    return _rows_of(_load(directory / WEIGHTS_FILE), layout, (_PEFT_PREFIX,))[_PEFT_PREFIX]


def write_optimizer(directory: Path, layout: AdapterLayout, rows: Mapping[str, torch.Tensor]) -> None:
    """Write optimizer rows by name; no rows (before the first step) make an empty file."""
    _write_row(directory / OPTIMIZER_FILE, layout, {f"{name}.": row for name, row in rows.items()})


def read_optimizer(directory: Path, layout: AdapterLayout) -> dict[str, torch.Tensor]:
    """Optimizer rows by name; raises `CheckpointMismatchError` when the checkpoint was saved without them."""
    path = directory / OPTIMIZER_FILE
    if not path.exists():
        raise CheckpointMismatchError("the checkpoint has no optimizer state; load it without the optimizer")
    found = _load(path)
    names = {key.split(".", 1)[0] + "." for key in found}
    return {prefix[:-1]: row for prefix, row in _rows_of(found, layout, tuple(sorted(names))).items()}


def write_gradient(directory: Path, layout: AdapterLayout, row: torch.Tensor | None) -> None:
    """Write an accumulated gradient; None, when nothing is accumulated, makes an empty file."""
    _write_row(directory / GRADIENT_FILE, layout, {} if row is None else {"": row})


def read_gradient(directory: Path, layout: AdapterLayout) -> torch.Tensor | None:
    """An accumulated gradient, None when there was none; raises `CheckpointMismatchError` when it was not saved."""
    path = directory / GRADIENT_FILE
    if not path.exists():
        raise CheckpointMismatchError("the checkpoint has no accumulated gradient; load it without")
    found = _load(path)
    return _rows_of(found, layout, ("",))[""] if found else None


def write_manifest(directory: Path, manifest: CheckpointManifest) -> None:
    """Write ``tinker.json``."""
    _write_text(directory / MANIFEST_FILE, json.dumps(make_converter().unstructure(manifest), indent=2))


def read_manifest(directory: Path) -> CheckpointManifest:
    """Read ``tinker.json``; raises `StorageError` when it is missing and `CheckpointMismatchError` when unreadable."""
    path = directory / MANIFEST_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    try:
        manifest: CheckpointManifest = make_converter().structure(json.loads(text), CheckpointManifest)
    except (ValueError, TypeError, KeyError, cattrs.BaseValidationError, cattrs.ForbiddenExtraKeysError) as error:
        raise CheckpointMismatchError(f"{path} is not a checkpoint manifest of this version: {error}") from error
    return manifest


def _module_tensors(layout: AdapterLayout, row: torch.Tensor) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, (a, b) in layout.views(row).items():
        tensors[f"{name}.lora_A.weight"] = a
        tensors[f"{name}.lora_B.weight"] = b
    return tensors


def _write_row(path: Path, layout: AdapterLayout, rows: Mapping[str, torch.Tensor]) -> None:
    tensors = {
        prefix + key: tensor.to("cpu", torch.float32).numpy()
        for prefix, row in rows.items()
        for key, tensor in _module_tensors(layout, row).items()
    }
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot write {path}: {error}; check free space and permissions") from error


def _load(path: Path) -> dict[str, torch.Tensor]:
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"cannot read {path}: {error}") from error
    return tensors


def _rows_of(
    found: Mapping[str, torch.Tensor], layout: AdapterLayout, prefixes: tuple[str, ...]
) -> dict[str, torch.Tensor]:
    rows = {prefix: torch.zeros(layout.size, dtype=torch.float32) for prefix in prefixes}
    wanted = {prefix + key: view for prefix, row in rows.items() for key, view in _module_tensors(layout, row).items()}
    if wanted.keys() != found.keys():
        odd = sorted(wanted.keys() ^ found.keys())[0]
        raise CheckpointMismatchError(
            f"the checkpoint adapts other modules than the model: {odd!r} is on one side only"
        )
    for key, view in wanted.items():
        if view.shape != found[key].shape:
            raise CheckpointMismatchError(
                f"{key!r} has shape {list(found[key].shape)} in the checkpoint, {list(view.shape)} in the model"
            )
        if view.dtype != found[key].dtype:
            raise CheckpointMismatchError(f"{key!r} is {found[key].dtype} in the checkpoint; rows are {view.dtype}")
        view.copy_(found[key])
    return rows


def _write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; check free space and permissions") from error
