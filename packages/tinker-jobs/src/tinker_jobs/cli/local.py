"""The actions of ``tinker-server jobs`` that work on a data directory, whether or not a server runs on it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from tinker_jobs.cli.parsing import JobsCommandError, add_library_flags, data_dir_of, render_rows
from tinker_jobs.errors import LibraryError
from tinker_jobs.library.library import Library

_COLUMNS = {
    "datasets": ("name", "version", "splits"),
    "capabilities": ("name", "version", "prompt"),
    "tasks": ("name", "version", "instruction", "verification"),
    "worlds": ("world_id", "server_url", "goal", "runtimes"),
}
_WIDTH = 60
"""Characters of a long text that a table shows."""


def add_local_actions(actions: argparse._SubParsersAction[Any]) -> None:
    """``add-dataset`` and its like, and their listings."""
    dataset = actions.add_parser("add-dataset", help="copy rows into the data directory", allow_abbrev=False)
    dataset.add_argument("ref", metavar="NAME@VERSION", help="what jobs will call it; a version never changes")
    dataset.add_argument(
        "files", nargs="+", metavar="FILE|SPLIT=FILE", help="JSONL or Parquet: one file, or one for each split"
    )
    for kind, source in (("capability", "a folder, or one file with the prompt"), ("task", "a folder, or task.yaml")):
        adding = actions.add_parser(f"add-{kind}", help=f"copy a {kind} into the data directory", allow_abbrev=False)
        adding.add_argument("ref", metavar="NAME@VERSION", help="what jobs will call it; a version never changes")
        adding.add_argument("source", metavar="PATH", help=source)
        add_library_flags(adding)
    world = actions.add_parser("add-world", help="copy a world's file into the data directory", allow_abbrev=False)
    world.add_argument("ref", metavar="ID", help="the world_manifest_id of jobs")
    world.add_argument("source", metavar="FILE", help="YAML with server_url and more")
    for action in (dataset, world):
        add_library_flags(action)
    for kind in _COLUMNS:
        add_library_flags(actions.add_parser(kind, help=f"list the {kind} of the data directory", allow_abbrev=False))


def run_local(given: Mapping[str, Any]) -> int:
    """Carry out one of them; the exit status. Raises `JobsCommandError`."""
    library = Library(data_dir_of(given["data_dir"]))
    kind, work = _ACTIONS[given["action"]]
    try:
        records = work(library, given)
    except LibraryError as error:
        raise JobsCommandError(str(error)) from error
    rows = [attrs.asdict(record) for record in records]
    columns = _COLUMNS[kind]
    if given["format"] == "table":
        rows = [{name: _short(value) for name, value in row.items()} for row in rows]
        if any(row["error"] for row in rows):
            columns = (*columns, "error")
    sys.stdout.write(render_rows(rows, columns, given["format"]))
    return 0


def split_files(files: Sequence[str]) -> dict[str | None, Path]:
    """Files by split; None for one that names none. Raises `JobsCommandError` for a split that is given twice."""
    found: dict[str | None, Path] = {}
    for text in files:
        split, equals, path = text.partition("=")
        # A file of that whole name is meant where there is one.
        key = split if equals and not Path(text).exists() else None
        if key in found:
            what = "one file alone can go without a split" if key is None else f"split {key!r} is given twice"
            raise JobsCommandError(f"{text}: {what}")
        found[key] = Path(path if key is not None else text)
    return found


def _add_dataset(library: Library, given: Mapping[str, Any]) -> list[Any]:
    return [library.add_dataset(given["ref"], split_files(given["files"]))]


_ACTIONS: dict[str, tuple[str, Callable[[Library, Mapping[str, Any]], Sequence[Any]]]] = {
    "add-dataset": ("datasets", _add_dataset),
    "add-capability": (
        "capabilities",
        lambda library, given: [library.add_capability(given["ref"], Path(given["source"]))],
    ),
    "add-task": ("tasks", lambda library, given: [library.add_task(given["ref"], Path(given["source"]))]),
    "add-world": ("worlds", lambda library, given: [library.add_world(given["ref"], Path(given["source"]))]),
    "datasets": ("datasets", lambda library, given: library.list_datasets()),
    "capabilities": ("capabilities", lambda library, given: library.list_capabilities()),
    "tasks": ("tasks", lambda library, given: library.list_tasks()),
    "worlds": ("worlds", lambda library, given: library.list_worlds()),
}
"""What an action lists at its end, and what it does."""


def _short(value: object) -> str | None:
    """A field as a table shows it: on one line, and no longer than is useful there."""
    if isinstance(value, Mapping):
        value = ", ".join(f"{name} ({_rows(split)})" for name, split in value.items())
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = ", ".join(value)
    if not value:
        return None
    text = " ".join(str(value).split())
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…"


def _rows(split: Mapping[str, Any]) -> str:
    return f"{split['size_bytes']} bytes" if split["num_rows"] is None else f"{split['num_rows']} rows"
