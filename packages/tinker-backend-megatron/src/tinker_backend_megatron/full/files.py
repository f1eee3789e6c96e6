"""Checkpoints of all parameters: directories as Hugging Face writes them, and the same for optimizer and gradient.

Ranks put one tensor after the other together in rank 0, which writes them at once: nobody ever holds the whole model.
Files of a checkpoint: ``model`` (float32), ``optimizer`` (names begin with that of the optimizer's row) and
``gradient``, each ``.safetensors`` or shards with an index, and ``tinker.json``, which is written last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path

import torch

from tinker_backend_megatron.full.layout import FullLayout
from tinker_backend_megatron.weight_export import export_weights
from tinker_core.errors import CheckpointMismatchError, StorageError, TinkerError
from tinker_core.training.model_files import copy_model_files
from tinker_core.training.peft_format import write_manifest
from tinker_core.training.weight_files import WeightFiles, save_tensors
from tinker_core.types import CheckpointManifest

MODEL, OPTIMIZER, GRADIENT = "model", "optimizer", "gradient"
"""Stems of files."""


class Spool:
    """A temporary directory of rank 0 that a checkpoint is written into before anybody says where it goes."""

    def __init__(self, layout: FullLayout) -> None:
        self._layout = layout
        self._failure: TinkerError | None = None
        self._directory = self._make() if layout.world.rank == 0 else None

    def _make(self) -> tempfile.TemporaryDirectory[str] | None:
        try:
            return tempfile.TemporaryDirectory(prefix="tinker-full-")
        except OSError as error:
            self._fail(error)
        return None

    def _fail(self, error: OSError | TinkerError) -> None:
        found = StorageError(
            f"cannot write the model's weights into {tempfile.gettempdir()}, where they wait for their place: {error}; "
            "make room there, or set TMPDIR to a directory with room"
        )
        self._failure = self._failure or found

    def add(self, stem: str, rows: Mapping[str, torch.Tensor]) -> None:
        """Write rows, by the prefix of their tensors' names; a collective. Without rows there is an empty file."""
        layout = self._layout

        def tensors() -> Iterator[tuple[str, torch.Tensor]]:
            exports: Iterable[Iterator[tuple[str, torch.Tensor]]] = (
                export_weights(layout.named(row), layout.model_map, layout.world, prefix=prefix)
                for prefix, row in rows.items()
            )
            return chain.from_iterable(exports)

        directory = None if self._directory is None else Path(self._directory.name)
        try:
            save_tensors(tensors(), directory, stem=stem)
        except StorageError as error:
            self._fail(error)

    def agree(self) -> None:
        """Raise `StorageError` in all ranks when rank 0 could not write."""
        self._layout.world.fail_together(self._failure)

    def move_to(self, target: Path) -> None:
        """Move all files into an existing directory; raises `StorageError`. For rank 0; others have nothing to move."""
        if self._directory is None:
            return
        with self._directory as source:
            for path in sorted(Path(source).iterdir()):
                try:
                    # Onto the name itself: moving into a directory that is not there would make a file of its name.
                    shutil.move(path, target / path.name)
                except OSError as error:
                    raise StorageError(
                        f"cannot write {target / path.name}: {error.strerror}; check free space and permissions"
                    ) from error


def finish_checkpoint(spool: Spool, directory: str, manifest: CheckpointManifest) -> None:
    """Put what waits in a spool in place."""
    spool.move_to(Path(directory))
    write_manifest(Path(directory), manifest)


def finish_model(spool: Spool, directory: str, manifest: CheckpointManifest, base: Path, dtype: torch.dtype) -> None:
    """As `finish_checkpoint`, with what makes a model of the weights: configuration and tokenizer of the base model."""
    spool.move_to(Path(directory))
    copy_model_files(base, Path(directory), dtype, json_only=True)
    write_manifest(Path(directory), manifest)


# --- reading ----------------------------------------------------------------------------------------------------------


class _Float32Files(WeightFiles):
    """Files that hold float32 and nothing else."""

    def read(
        self, name: str, shape: tuple[int, ...], axis: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        found = super().read(name, shape, axis, start, stop)
        if found.dtype is not torch.float32:
            raise CheckpointMismatchError(f"{name!r} is {found.dtype} in the checkpoint; rows are float32")
        return found


def read_rows(layout: FullLayout, directory: Path, stem: str) -> dict[str, torch.Tensor]:
    """This rank's part of saved rows, float32 on the CPU, by the prefix of their tensors' names.

    Raises `CheckpointMismatchError` for other tensors than the model's, and `StorageError`.
    """
    with _Float32Files(directory, stem=stem) as files:
        prefixes = {""} if stem != OPTIMIZER else {name.split(".", 1)[0] + "." for name in files.names}
        if len(files.names) not in (0, len(prefixes) * layout.num_tensors):
            raise CheckpointMismatchError(
                f"the checkpoint has {len(files.names)} tensors in {stem!r}, {layout.num_tensors} are the model's"
            )
        rows: dict[str, torch.Tensor] = {}
        for prefix in sorted(prefixes) if files.names else ():
            rows[prefix] = torch.zeros(layout.size, dtype=torch.float32)
            layout.read(rows[prefix], files, prefix=prefix)
    return rows


def has_files(directory: Path, stem: str) -> bool:
    """Whether a part was saved."""
    return any((directory / f"{stem}.safetensors{end}").exists() for end in ("", ".index.json"))


def read_model(layout: FullLayout, directory: Path, row: torch.Tensor) -> None:
    """Fill a row of any type with the weights of a model's directory, whatever type they are in.

    Raises `CheckpointMismatchError` and `StorageError`.
    """
    with WeightFiles(directory) as files:
        layout.read(row, files)
