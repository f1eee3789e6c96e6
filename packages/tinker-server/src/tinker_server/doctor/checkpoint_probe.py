"""Whether the checkpoint store takes, gives back and removes what is put there."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinker_core.errors import ConfigurationError
from tinker_server.doctor.findings import Finding, fail, ok

_CHECK = "checkpoints"
_PROBE = b"written by tinker-server doctor; safe to delete\n"


def check_checkpoints(url: str | None, data_dir: Path) -> Iterator[Finding]:
    """Write, read and delete an object of its own in the store."""
    name = f".doctor-{secrets.token_hex(8)}"
    if url is None:
        yield from _check_directory(data_dir / "checkpoints", name)
    elif urlsplit(url).scheme == "file":
        yield from _check_directory(Path(unquote(urlsplit(url).path)), name)
    else:
        yield from _check_store(url, name)


def _check_directory(directory: Path, name: str) -> Iterator[Finding]:
    directory = next(path for path in (directory, *directory.parents) if path.is_dir())
    path = directory / name
    try:
        with path.open("xb") as file:
            file.write(_PROBE)
            os.fsync(file.fileno())
        intact = path.read_bytes() == _PROBE
        path.unlink()
    except OSError as error:
        yield fail(_CHECK, f"{directory}: {error.strerror or error}", "let the server's user write there")
        return
    if intact:
        yield ok(_CHECK, f"{directory}: wrote, read and deleted a file")
    else:
        yield fail(_CHECK, f"{directory}: a file did not read as it was written", "check the disk")


def _check_store(url: str, name: str) -> Iterator[Finding]:
    import obstore
    from obstore.exceptions import BaseError

    from tinker_core.storage.remote_checkpoints import open_store, reason_of

    try:
        store = open_store(url)
        obstore.put(store, name, _PROBE)
        intact = bytes(obstore.get(store, name).bytes()) == _PROBE
        obstore.delete(store, name)
    except ConfigurationError as error:
        yield fail(_CHECK, str(error), "correct --checkpoint-store")
        return
    except (BaseError, OSError) as error:
        reason = reason_of(error)
        yield fail(_CHECK, f"{url}: {reason}", "check --checkpoint-store, the bucket and its credentials")
        return
    if intact:
        yield ok(_CHECK, f"{url}: wrote, read and deleted an object")
    else:
        yield fail(_CHECK, f"{url}: an object did not read as it was written", "check the store")
