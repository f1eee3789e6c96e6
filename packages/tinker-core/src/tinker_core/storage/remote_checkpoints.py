"""Checkpoints in an object store such as S3."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError
from obstore.store import ObjectStore, from_url

from tinker_core.errors import ConfigurationError, DamagedRecordError, StorageError
from tinker_core.storage.checkpoint_cache import CheckpointCache
from tinker_core.storage.checkpoint_files import check_names, is_allowed, is_sealed, local_sizes
from tinker_core.storage.local_checkpoints import check_sealed
from tinker_core.storage.sealed import SEAL_FILE, remove

log = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "az")
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")

_CLIENT = {
    "connect_timeout": timedelta(seconds=5),
    "read_timeout": timedelta(seconds=20),  # of one piece of an upload or download, and of every answer
    "timeout": timedelta(days=1),  # of whole downloads, which may be slow as long as they go on
}
_RETRY = {
    "max_retries": 5,
    "retry_timeout": timedelta(seconds=5),
    "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=1), "base": 2},
}
"""A store that is gone fails a save within half a minute, whether it refuses connections or swallows them."""

_PART = 5 * 1024 * 1024
_PARTS_AT_ONCE = 4
"""With `_CLIENT`: a connection must carry a megabyte per second."""
_PIECE = 4 * 1024 * 1024


def open_store(url: str) -> ObjectStore:
    """The object store at a URL such as ``s3://bucket/prefix``; credentials come from the environment.

    Asks nothing of the network. Raises `ConfigurationError`.
    """
    scheme = urlsplit(url).scheme
    if scheme not in SCHEMES:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise ConfigurationError(f"--checkpoint-store {url!r} must begin with {known} or file://")
    endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), "")
    options: Any = {**_CLIENT, "allow_http": endpoint.startswith("http://")}
    retries: Any = _RETRY
    try:
        return from_url(url, client_options=options, retry_config=retries)
    except (BaseError, ValueError) as error:
        raise ConfigurationError(
            f"--checkpoint-store {url!r} cannot be used: {reason_of(error)}; write s3://bucket/prefix"
        ) from error


class RemoteFiles:
    """Implements `FileStore` with one object per file. What is read is fetched into a local cache first.

    The objects of a checkpoint become one by the record that names their location; before that nobody looks for them.
    """

    def __init__(self, url: str, cache_directory: Path, max_cache_bytes: int) -> None:
        self._url = url
        self._store = open_store(url)
        self._directory = cache_directory.resolve()
        self._cache = CheckpointCache(self._directory / "fetched", max_cache_bytes, self._fetch)

    def __str__(self) -> str:
        return self._url

    @property
    def work_directory(self) -> Path:
        """Below the cache."""
        return self._directory / "saving"

    async def open(self) -> None:
        """Empty the local directory; the store itself is not asked."""
        await asyncio.to_thread(remove, self._directory)

    async def publish(self, directory: Path, location: str) -> None:
        """Upload all files, the seal last."""
        for name in (*await asyncio.to_thread(local_sizes, directory), SEAL_FILE):
            with self._reported("write", f"{location}/{name}"):
                await obstore.put_async(
                    self._store,
                    f"{location}/{name}",
                    directory / name,
                    chunk_size=_PART,
                    max_concurrency=_PARTS_AT_ONCE,
                )

    async def remove(self, location: str) -> None:
        """Delete all objects of a location."""
        await self._cache.forget(location)
        with self._reported("remove", location):
            found = await self._list(location)
            if found:
                await obstore.delete_async(self._store, [f"{location}/{name}" for name in found])

    async def sizes(self, location: str) -> dict[str, int]:
        """What the store lists."""
        with self._reported("read", location):
            found = await self._list(location)
        found.pop(SEAL_FILE, None)
        return dict(sorted(found.items()))

    @asynccontextmanager
    async def reading(self, location: str, *, verify: bool) -> AsyncIterator[Path]:
        """The files in the cache; they were verified when they arrived."""
        del verify
        async with self._cache.reading(location) as directory:
            yield directory

    async def _list(self, location: str) -> dict[str, int]:
        return {
            item["path"].removeprefix(f"{location}/"): item["size"]
            async for batch in obstore.list(self._store, location)
            for item in batch
        }

    async def _fetch(self, location: str, directory: Path) -> None:
        with self._reported("read", location):
            names = list(await self._list(location))
        if not names:
            raise StorageError(f"cannot read checkpoint {location}: its files are gone from {self}")
        if is_sealed(location):
            check_names(names, location)
        else:
            names = [name for name in names if is_allowed(name)]
        for name in names:
            with self._reported("read", f"{location}/{name}"):
                await self._download(f"{location}/{name}", directory / name)
        if is_sealed(location):
            try:
                await asyncio.to_thread(check_sealed, directory, location)
            except DamagedRecordError as error:
                # What is damaged is there, and not the copy here, which is about to go.
                raise DamagedRecordError(str(error).replace(str(directory), f"{self}/{location}")) from error

    async def _download(self, name: str, target: Path) -> None:
        result = await obstore.get_async(self._store, name)
        await asyncio.to_thread(target.parent.mkdir, parents=True, exist_ok=True)
        with await asyncio.to_thread(target.open, "wb") as file:
            async for piece in result.stream(min_chunk_size=_PIECE):
                await asyncio.to_thread(file.write, piece)

    @contextlib.contextmanager
    def _reported(self, verb: str, what: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            log.error("%s: cannot %s %s: %s", self, verb, what, _full_reason(error))
            raise StorageError(f"cannot {verb} checkpoint {what} in {self}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The store's own words, short and without addresses and keys, and what to do."""
    text = _full_reason(error)
    status = re.search(r"status code: (\d{3}[A-Za-z ]*)", text)
    said = [found[1] for tag in ("Code", "Message") if (found := re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL))]
    words = ": ".join([status[1].strip(), *said]) if status else text.rpartition(" - ")[2][:200]
    return f"{words.rstrip('.')}; {_fix(error, words)}"


def _fix(error: Exception, words: str) -> str:
    if words.startswith(("401", "403")):
        return "check the credentials in the server's environment and what they may do"
    if "NoSuchBucket" in words:
        return "create the bucket, or change --checkpoint-store"
    if isinstance(error, OSError) and error.errno is not None:
        return "check free space and permissions of the data directory"
    return "check that the store can be reached and works, then try again"


def _full_reason(error: Exception) -> str:
    return str(error).partition("\n\nDebug source")[0].strip()
