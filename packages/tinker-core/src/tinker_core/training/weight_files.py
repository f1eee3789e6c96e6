"""Weights in directories as Hugging Face writes them: safetensors files of bounded size and an index of their tensors.

Neither reading nor writing holds a whole model: ranges of tensors are read, and files are written one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tinker_core.errors import CheckpointMismatchError, StorageError

SHARD_BYTES = 2 << 30
"""Size of a file, and of what is held in memory while it fills. A larger tensor has a file of its own."""


def _index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


class WeightFiles:
    """Reads ranges of the tensors of a directory; a context manager."""

    def __init__(self, directory: Path, *, stem: str = "model", device: torch.device | str = "cpu") -> None:
        """Ranges go to ``device`` without a copy of the whole tensor. Raises `StorageError` for no or broken files."""
        self.directory = directory
        self._stem, self._device = stem, str(device)
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        self._file_of = self._read_index()

    def __enter__(self) -> WeightFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> frozenset[str]:
        """All tensors."""
        return frozenset(self._file_of)

    def _read_index(self) -> dict[str, str]:
        index, single = self.directory / _index_name(self._stem), f"{self._stem}.safetensors"
        if not index.exists():
            if not (self.directory / single).exists():
                raise StorageError(f"there is neither {single} nor {index.name} in {self.directory}")
            return dict.fromkeys(self._open(single).keys(), single)
        try:
            found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            file_of = {str(name): str(file) for name, file in found.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StorageError(f"{index} is not an index of safetensors files: {error!r}") from error
        outside = sorted(file for file in set(file_of.values()) if Path(file).name != file)
        if outside:
            raise StorageError(f"{index} names {outside[0]!r}, which is not a file beside it")
        return file_of

    def _open(self, file: str) -> Any:  # noqa: ANN401 - safetensors has no types
        if file not in self._files:
            try:
                opened = safe_open(self.directory / file, framework="pt", device=self._device)
            except (OSError, SafetensorError) as error:
                raise StorageError(f"{self.directory / file} cannot be read, or is damaged: {error}") from error
            self._files[file] = self._stack.enter_context(opened)
        return self._files[file]

    def read(
        self, name: str, shape: tuple[int, ...], axis: int = 0, start: int = 0, stop: int | None = None
    ) -> torch.Tensor:
        """The range ``start:stop`` of an axis of a tensor that must have this whole shape, in the type it is saved in.

        Raises `CheckpointMismatchError` for a tensor that is missing or has another shape, `StorageError` for a file
        that cannot be read.
        """
        if name not in self._file_of:
            raise CheckpointMismatchError(f"the weights in {self.directory} lack {name!r}")
        file = self._open(self._file_of[name])
        try:
            part = file.get_slice(name)
            saved = tuple(part.get_shape())
            if saved != shape:
                raise CheckpointMismatchError(
                    f"{name!r} in {self.directory / self._file_of[name]} has shape {list(saved)}, not {list(shape)}"
                )
            where = (slice(None),) * axis + (slice(start, shape[axis] if stop is None else stop),)
            found: torch.Tensor = part[where]
        except (OSError, SafetensorError) as error:
            raise StorageError(f"{name!r} in {self.directory / self._file_of[name]} cannot be read: {error}") from error
        return found


class WeightFilesWriter:
    """Writes tensors into ``stem.safetensors``, or ``stem-00001-of-0000n.safetensors`` and an index when they are many.

    Until `finish` the files have other names, so that what is not finished is never read.
    """

    def __init__(self, directory: Path, *, stem: str = "model", shard_bytes: int = SHARD_BYTES) -> None:
        self._directory, self._stem, self._shard_bytes = directory, stem, shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._total_bytes = 0
        self._shards: list[tuple[str, ...]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a contiguous tensor on the CPU, which the caller no longer changes. Raises `StorageError`."""
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += tensor.nbytes

    def finish(self) -> None:
        """Write what waits, and name the files. Raises `StorageError`."""
        if self._waiting or not self._shards:
            self._write()
        count = len(self._shards)
        try:
            if count == 1:
                self._part(0).rename(self._directory / f"{self._stem}.safetensors")
                return
            weight_map = {}
            for number, names in enumerate(self._shards):
                file = f"{self._stem}-{number + 1:05d}-of-{count:05d}.safetensors"
                self._part(number).rename(self._directory / file)
                weight_map.update(dict.fromkeys(names, file))
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            path = self._directory / _index_name(self._stem)
            path.write_text(json.dumps(index, indent=2), encoding="utf-8")
        except OSError as error:
            raise self._error(self._directory, error) from error

    def _part(self, number: int) -> Path:
        return self._directory / f"{self._stem}-{number + 1:05d}.part"

    def _write(self) -> None:
        path = self._part(len(self._shards))
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise self._error(path, error) from error
        self._shards.append(tuple(self._waiting))
        self._total_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = {}, 0

    @staticmethod
    def _error(path: Path, error: Exception) -> StorageError:
        return StorageError(f"cannot write {path}: {error}; check free space and permissions")


def save_tensors(
    tensors: Iterable[tuple[str, torch.Tensor]],
    directory: Path | None,
    *,
    stem: str = "model",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write what an iterable yields; ``directory`` is None in ranks whose iterable only sends. Raises `StorageError`.

    The iterable is always run to its end, also when writing fails: other ranks may be sending.
    """
    writer = None if directory is None else WeightFilesWriter(directory, stem=stem, shard_bytes=shard_bytes)
    failure: StorageError | None = None
    for name, tensor in tensors:
        if writer is None or failure is not None:
            continue
        try:
            writer.add(name, tensor)
        except StorageError as error:
            failure = error
    if failure is not None:
        raise failure
    if writer is not None:
        writer.finish()
