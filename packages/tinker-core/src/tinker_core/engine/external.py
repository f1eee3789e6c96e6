"""Adapters for use outside: the files that PEFT reads, encrypted with age if asked."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pyrage  # type: ignore[import-untyped]

from tinker_core.errors import InvalidRequestError, StorageError
from tinker_core.types import MANIFEST_FILE

MAX_RECIPIENTS = 10
MAX_RECIPIENT_LENGTH = 8192
"""Characters; the longest SSH keys in use need a tenth of that."""
AGE_SUFFIX = ".age"


def parse_recipients(texts: tuple[str, ...]) -> list[Any]:
    """age recipients; raises `InvalidRequestError` for too many and for one that is none."""
    if len(texts) > MAX_RECIPIENTS:
        raise InvalidRequestError(f"age_encryption_recipients: at most {MAX_RECIPIENTS}, got {len(texts)}")
    return [_parse(index, text) for index, text in enumerate(texts)]


def _parse(index: int, text: str) -> Any:  # noqa: ANN401
    name = f"age_encryption_recipients[{index}]"
    if len(text) > MAX_RECIPIENT_LENGTH:
        raise InvalidRequestError(f"{name} is longer than {MAX_RECIPIENT_LENGTH} characters")
    kind = pyrage.x25519 if text.startswith("age1") else pyrage.ssh
    try:
        return kind.Recipient.from_str(text)
    except pyrage.RecipientError as error:
        raise InvalidRequestError(
            f"{name} is neither a native age recipient (age1…) nor an SSH public key (ssh-ed25519 … or ssh-rsa …): "
            f"{error}"
        ) from error


async def finish_export(directory: Path, recipients: list[Any]) -> None:
    """Leave what PEFT reads, each file encrypted to all recipients if there are any.

    Raises `StorageError` when a file cannot be read or written.
    """
    try:
        await asyncio.to_thread(_finish_export, directory, recipients)
    except OSError as error:
        raise StorageError(f"cannot write external weights: {error.strerror}; check free space") from error


def _finish_export(directory: Path, recipients: list[Any]) -> None:
    (directory / MANIFEST_FILE).unlink(missing_ok=True)
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    if not files:
        raise StorageError("the trainer exported no files for use outside")
    if not recipients:
        return
    for plain in files:
        # encrypt_io goes through Python for every piece and so lets other threads run; encrypt_file stops them all.
        with plain.open("rb") as source, plain.with_name(plain.name + AGE_SUFFIX).open("wb") as target:
            pyrage.encrypt_io(source, target, recipients)
        plain.unlink()
