"""What a job reads of its datasets: exactly what they held when it was submitted, row by row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from tinker_jobs.errors import JobFailedError
from tinker_jobs.library.bad_rows import UnreadableRowError
from tinker_jobs.library.files import digest
from tinker_jobs.library.jsonl import read_jsonl
from tinker_jobs.library.parquet import MAGIC, read_parquet
from tinker_jobs.refs import FrozenDataset, FrozenFile
from tinker_jobs.rows import (
    CONVERSATION_FORMS,
    PROMPT_FORMS,
    BadRowError,
    Conversation,
    PromptRow,
    read_conversation,
    read_prompt,
)

NO_CONVERSATIONS = "Training inputs did not produce any usable conversations."
NO_PROMPTS = "No RL rollouts were generated for training:"
_MAX_KEYS = 20
Made = TypeVar("Made")


def read_rows(dataset: FrozenDataset, split: str | None = None) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Row numbers from 1 and rows; the rows of JSONL are its lines. Memory does not grow with the dataset.

    Raises `JobFailedError` that names dataset, file and row for what cannot be read, and for a file that has changed
    since the job was submitted.
    """
    where = _where(dataset, split)
    with _open(_file(dataset, split), where) as stream:
        try:
            yield from read_stream(stream)
        except UnreadableRowError as error:
            raise JobFailedError(f"{where}: {error}") from error


def read_conversations(
    dataset: FrozenDataset, split: str | None = None, *, nothing: str = NO_CONVERSATIONS
) -> Iterator[tuple[int, Conversation | None]]:
    """Row numbers and conversations to imitate; None for a row in no known form.

    Raises `JobFailedError` as `read_rows` does, for a row with values of the wrong type, and at the end when no row
    was a conversation: that error begins with ``nothing`` and says which keys the rows have.
    """
    return _read(dataset, split, read_conversation, nothing, CONVERSATION_FORMS)


def read_prompts(
    dataset: FrozenDataset, split: str | None = None, *, nothing: str = NO_PROMPTS
) -> Iterator[tuple[int, PromptRow | None]]:
    """Row numbers and prompts to answer; None for a row without one. Raises `JobFailedError` as above."""
    return _read(dataset, split, read_prompt, nothing, PROMPT_FORMS)


def _read(
    dataset: FrozenDataset,
    split: str | None,
    make: Callable[[Mapping[str, Any]], Made | None],
    nothing: str,
    forms: str,
) -> Iterator[tuple[int, Made | None]]:
    where, keys = _where(dataset, split), dict[str, None]()
    is_used, number = False, 0
    for number, row in read_rows(dataset, split):
        try:
            made = make(row)
        except BadRowError as error:
            raise JobFailedError(f"{where}: row {number}: {error}") from error
        is_used = is_used or made is not None
        if not is_used and len(keys) < _MAX_KEYS:
            keys.update(dict.fromkeys(row))
        yield number, made
    if not is_used:
        has = ", ".join(list(keys)[:_MAX_KEYS]) or "no keys"
        why = "it has no rows" if number == 0 else f"rows must have {forms}; these have {has}"
        raise JobFailedError(f"{nothing} {where}: {why}")


def _file(dataset: FrozenDataset, split: str | None) -> FrozenFile:
    name = dataset.default_split if split is None else split
    file = dataset.splits.get(name)
    if file is None:
        raise JobFailedError(f"dataset {dataset} has no split {name!r} (known splits: {', '.join(dataset.splits)})")
    return file


def _where(dataset: FrozenDataset, split: str | None) -> str:
    return f"dataset {dataset}, {Path(_file(dataset, split).path).name}"


def read_stream(stream: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of an open JSONL or Parquet file, whichever it is. Raises `UnreadableRowError`."""
    magic = stream.read(len(MAGIC))
    stream.seek(0)
    return read_parquet(stream) if magic == MAGIC else read_jsonl(stream)


@contextmanager
def _open(file: FrozenFile, what: str) -> Iterator[BinaryIO]:
    try:
        stream = Path(file.path).open("rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise JobFailedError(f"{what}: gone since the job was submitted: {error.strerror}") from error
    with stream:
        if digest(stream) != (file.size_bytes, file.sha256):
            raise JobFailedError(f"{what}: changed since the job was submitted; submit the job again to train on it")
        stream.seek(0)
        yield stream
