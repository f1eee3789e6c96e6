"""A server's identity: which records in a control database, that it may share with others, are its own."""

from __future__ import annotations

import asyncio
import os
import secrets
from datetime import datetime
from pathlib import Path
from urllib.parse import urlsplit

from tinker_core.engine.config import EngineConfig
from tinker_core.errors import StorageError
from tinker_core.storage.control import ControlStore
from tinker_core.storage.database import database_url
from tinker_core.storage.local_files import sync
from tinker_core.types import ServerRecord

ID_FILE = "server-id"


async def open_control(config: EngineConfig, now: datetime) -> ControlStore:
    """Open the control database as the server that the data directory is.

    Raises `ConfigurationError` for a database that is not the one which this data directory was used with.
    """
    known = await asyncio.to_thread(read_server_id, config.data_dir)
    control = await ControlStore.open(config.database_url or database_url(config.data_dir))
    try:
        # A database in the data directory is this server's, also when it was restored without the file.
        own = await control.servers.only() if known is None and config.database_url is None else known
        server_id = own or f"srv-{secrets.token_hex(8)}"
        control = control.of_server(server_id)
        record = ServerRecord(server_id=server_id, created_at=now, store=shared_store(config.checkpoint_store))
        await control.servers.register(record, known=known is not None)
        if known is None:
            await asyncio.to_thread(_keep_server_id, config.data_dir, server_id)
    except BaseException:
        await control.close()
        raise
    return control


def read_server_id(data_dir: Path) -> str | None:
    """The identity of a data directory; None for one that no server has used. Raises `StorageError`."""
    path = data_dir / ID_FILE
    try:
        return path.read_text(encoding="ascii").strip() or None
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"cannot read the server's identity {path}: {error}") from error


def shared_store(url: str | None) -> str | None:
    """The name of a checkpoint store that several servers can reach, without credentials; None for local files."""
    if url is None or urlsplit(url).scheme == "file":
        return None
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}"


def _keep_server_id(data_dir: Path, server_id: str) -> None:
    """Whole or not at all, and for good: without it the server would not know its own checkpoints."""
    temporary = data_dir / f"{ID_FILE}.new"
    try:
        with temporary.open("w", encoding="ascii") as file:
            file.write(f"{server_id}\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(data_dir / ID_FILE)
        sync(data_dir)
    except OSError as error:
        raise StorageError(f"cannot write the server's identity {data_dir / ID_FILE}: {error.strerror}") from error
