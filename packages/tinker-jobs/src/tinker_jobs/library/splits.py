"""A dataset's folder: which file is which split, and which split is read when none is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.files import FileHashes
from tinker_jobs.library.folders import read_yaml
from tinker_jobs.refs import FrozenDataset

MANIFEST = "dataset.yaml"
SUFFIXES = (".jsonl", ".parquet")
WHOLE = "data"
"""Name of the one file of a dataset without splits."""
TRAIN = "train"
EVALUATION = ("eval", "validation", "valid", "val", "dev", "test")
"""Splits that are held out; the first that a dataset has is what a job evaluates on."""


def freeze_dataset(folder: Path, name: str, version: str, hashes: FileHashes) -> FrozenDataset:
    """A dataset as it is now. Raises `LibraryError`."""
    files = find_splits(folder, f"dataset {name}@{version}")
    splits = {split: hashes.freeze(path, f"dataset {name}@{version}: {path.name}") for split, path in files.items()}
    return FrozenDataset(name=name, version=version, splits=splits, default_split=default_split(splits))


def default_split(splits: Iterable[str]) -> str:
    """The only split, else ``train``, which the dataset need not have."""
    names = list(splits)
    return names[0] if len(names) == 1 else TRAIN


def evaluation_split(splits: Iterable[str]) -> str:
    """The only split, else the first of those that are held out, else ``train``."""
    names = list(splits)
    return next((name for name in EVALUATION if name in names), default_split(names))


def find_splits(folder: Path, what: str) -> dict[str, Path]:
    """Files by split, as the manifest says, else by their names. Raises `LibraryError` that begins with ``what``."""
    manifest = folder / MANIFEST
    stated = read_yaml(manifest, f"{what}: {MANIFEST}").get("splits") if manifest.exists() else None
    if stated is not None:
        return _stated_splits(folder, stated, f"{what}: {MANIFEST}")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix not in SUFFIXES or path.name.startswith("."):
            continue
        split = TRAIN if path.stem == WHOLE else path.stem
        if split in found:
            raise LibraryError(
                f"{what}: both {found[split].name} and {path.name} are split {split!r}; keep one of them"
            )
        found[split] = path
    if not found:
        raise LibraryError(f"{what} holds no .jsonl or .parquet file")
    return found


def _stated_splits(folder: Path, stated: object, what: str) -> dict[str, Path]:
    if not isinstance(stated, Mapping) or not stated:
        raise LibraryError(f"{what}: splits must map names to files, such as 'train: train.jsonl', got {stated!r:.60}")
    found = {}
    for split, file in stated.items():
        relative = PurePosixPath(file) if isinstance(file, str) and "\0" not in file else PurePosixPath("/")
        if relative.is_absolute() or ".." in relative.parts:
            raise LibraryError(f"{what}: split {split!r} must name a file in the dataset's folder, got {file!r:.60}")
        found[str(split)] = folder / relative
    return found
