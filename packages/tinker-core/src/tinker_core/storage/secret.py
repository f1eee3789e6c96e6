"""The server's own secret, from which every key that it signs with is made."""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from pathlib import Path

from tinker_core.errors import StorageError

SECRET_FILE = "secret"
_LENGTH = 32


def load_secret(data_dir: Path) -> bytes:
    """32 random bytes in the data directory, for its owner's eyes only; made by whoever asks first.

    Raises `StorageError` when it cannot be read or written, or is not what this function writes.
    """
    path = data_dir / SECRET_FILE
    try:
        if not path.exists():
            _create(path)
        secret = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read or write the secret {path}: {error.strerror or error}") from error
    if len(secret) != _LENGTH:
        raise StorageError(f"the secret {path} is damaged; remove it, and what was signed with it is no longer valid")
    return secret


def _create(path: Path) -> None:
    """The file appears whole or not at all, and the first of several processes wins."""
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(_LENGTH))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
    finally:
        temporary.unlink()


def derive_key(secret: bytes, purpose: str) -> bytes:
    """A key of its own for each purpose, so that what is signed for one proves nothing to another."""
    return hmac.new(secret, purpose.encode(), hashlib.sha256).digest()
