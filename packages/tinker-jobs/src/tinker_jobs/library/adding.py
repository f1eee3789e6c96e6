"""What is put into the library: copied, checked as a job would read it, and only then there for jobs."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tinker_jobs.errors import LibraryError
from tinker_jobs.library.bad_rows import UnreadableRowError
from tinker_jobs.library.capabilities import PROMPT, freeze_capability
from tinker_jobs.library.datasets import read_stream
from tinker_jobs.library.folders import VersionFolders
from tinker_jobs.library.names import check_name, split_ref
from tinker_jobs.library.parquet import MAGIC
from tinker_jobs.library.publishing import copy_tree, published_file, published_folder
from tinker_jobs.library.splits import MANIFEST, TRAIN, WHOLE
from tinker_jobs.library.tasks import TASK, freeze_task
from tinker_jobs.library.worlds import read_world
from tinker_jobs.rows import (
    CONVERSATION_FORMS,
    PROMPT_FORMS,
    BadRowError,
    read_conversation,
    read_prompt,
)


def add_dataset(folders: VersionFolders, name: str, version: str, files: Mapping[str | None, Path]) -> None:
    """Copy files, each a split, or with None the only one. Raises `LibraryError` for a row of no use."""
    if not files:
        raise LibraryError("a dataset needs at least one file")
    if None in files and len(files) > 1:
        raise LibraryError("a dataset of several files needs a split for each, such as train=… and test=…")
    what = f"dataset {name}@{version}"
    with published_folder(folders.root, folders.root / name / version, what) as folder:
        splits, num_rows = dict[str, str](), dict[str, int]()
        for split, source in files.items():
            stem = WHOLE if split is None else check_name(split, "a split")
            path = _copy_rows(source, folder, stem)
            splits[split or TRAIN] = path.name
            num_rows[split or TRAIN] = _check_rows(path, str(source))
        (folder / MANIFEST).write_text(yaml.safe_dump({"splits": splits, "num_rows": num_rows}, sort_keys=False))


def add_capability(folders: VersionFolders, name: str, version: str, source: Path) -> None:
    """Copy a capability's folder, or one file that is its prompt. Raises `LibraryError`."""
    _add_version(folders, name, version, source, PROMPT)


def add_task(folders: VersionFolders, name: str, version: str, source: Path) -> None:
    """Copy a task's folder, or its one file. Raises `LibraryError`."""
    _add_version(folders, name, version, source, TASK)


def add_world(root: Path, world_id: str, source: Path) -> None:
    """Copy a world's file. Raises `LibraryError`."""
    target = root / f"{check_name(world_id, 'a world')}.yaml"
    _must_be_file(source)
    with published_file(target, f"world {world_id}") as path:
        shutil.copyfile(source, path)
        read_world(path, str(source))


def version_of(ref: str, kind: str) -> tuple[str, str]:
    """Name and version of something to add. Raises `LibraryError`."""
    name, version = split_ref(ref, kind)
    return check_name(name, f"a {kind}'s name"), check_name(version, f"a {kind}'s version")


def _add_version(folders: VersionFolders, name: str, version: str, source: Path, only_file: str) -> None:
    with published_folder(folders.root, folders.root / name / version, f"{folders.kind} {name}@{version}") as folder:
        if source.is_dir():
            copy_tree(source, folder)
        else:
            _must_be_file(source)
            shutil.copyfile(source, folder / only_file)
        if not any(folder.iterdir()):
            raise LibraryError(f"{source} is empty")
        check = {"capability": freeze_capability, "task": freeze_task}[folders.kind]
        check(folder, name, version)


def _must_be_file(source: Path) -> None:
    if not source.is_file():
        raise LibraryError(f"{source} does not exist, or is no file")


def _copy_rows(source: Path, folder: Path, stem: str) -> Path:
    _must_be_file(source)
    with source.open("rb") as stream:
        suffix = ".parquet" if stream.read(len(MAGIC)) == MAGIC else ".jsonl"
    path = folder / f"{stem}{suffix}"
    shutil.copyfile(source, path)
    return path


def _check_rows(path: Path, source: str) -> int:
    """Number of rows, each of which some job can use."""
    num_rows = 0
    try:
        with path.open("rb") as stream:
            for number, row in read_stream(stream):
                _check_row(row, number)
                num_rows += 1
    except UnreadableRowError as error:
        raise LibraryError(f"{source}: {error} (datasets are JSONL or Parquet)") from error
    if num_rows == 0:
        raise LibraryError(f"{source} has no rows")
    return num_rows


def _check_row(row: Mapping[str, Any], number: int) -> None:
    reason = f"it must have {CONVERSATION_FORMS}, or {PROMPT_FORMS}; it has {', '.join(row) or 'no keys'}"
    for read in (read_prompt, read_conversation):
        try:
            if read(row) is not None:
                return
        except BadRowError as error:
            reason = str(error)
    raise UnreadableRowError(number, reason)
