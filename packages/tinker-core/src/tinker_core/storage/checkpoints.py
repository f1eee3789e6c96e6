"""Checkpoints as sets of files: written to a local directory, sealed, published whole under a location of their own."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import secrets
import uuid
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tinker_core.errors import ConfigurationError, StorageError
from tinker_core.storage.checkpoint_files import FileStore, check_names, is_allowed, link_files, local_sizes
from tinker_core.storage.local_checkpoints import LocalFiles
from tinker_core.storage.local_files import reported
from tinker_core.storage.sealed import make_directory, remove, seal
from tinker_core.types import CheckpointRecord, CheckpointType, TinkerPath, check_checkpoint_name

log = logging.getLogger(__name__)

_UNSAFE = re.compile(rb"[^A-Za-z0-9_-]")
_LONGEST_PLAIN = 200
_VERSIONS = "versions"


def safe_directory_name(model_id: str) -> str:
    """A file name for a model id; different ids never share one, and it never begins with a dot."""
    raw = model_id.encode("utf-8", "surrogatepass")
    name = _UNSAFE.sub(lambda match: b"%%%02X" % match.group()[0], raw).decode("ascii")
    if 0 < len(name) <= _LONGEST_PLAIN:
        return name
    # "%-" is no escape of a byte, so that a shortened name cannot equal a plain one.
    return f"{name[:100]}%-{hashlib.sha256(raw).hexdigest()}"


def new_version() -> str:
    """A name for what one save writes, which nothing else ever has: so no save touches another's files."""
    return secrets.token_hex(8)


def location_of(path: TinkerPath, version: str | None) -> str:
    """Where the files of a save lie below a store's root; without a version, where an older release put them."""
    # A TinkerPath can be made without `parse`, so its parts are checked here, at the last door before the store.
    run, kind, name = safe_directory_name(path.run_id), CheckpointType(path.kind), check_checkpoint_name(path.name)
    if version is None:
        return f"{run}/{kind.value}/{name}"
    return f"{run}/{_VERSIONS}/{kind.value}/{name}/{version}"


def location_of_record(record: CheckpointRecord) -> str:
    """Where the files of a checkpoint lie below its store's root."""
    return location_of(record.path, record.version)


def open_checkpoint_store(url: str | None, data_dir: Path, max_cache_bytes: int, server_id: str) -> CheckpointStore:
    """The store at a URL, which other servers may use too; in the data directory without one.

    ``server_id`` is a file name that tells this server from the others. Asks nothing of the network.

    Raises `ConfigurationError` for a URL that cannot be one.
    """
    if url is None:
        return CheckpointStore(LocalFiles(data_dir / "checkpoints"))
    parts = urlsplit(url)
    if parts.scheme == "file":
        if parts.netloc or not parts.path.startswith("/"):
            raise ConfigurationError(f"--checkpoint-store {url!r} must be file:///absolute/path")
        return CheckpointStore(LocalFiles(Path(unquote(parts.path)), server_id))
    from tinker_core.storage.remote_checkpoints import RemoteFiles

    return CheckpointStore(RemoteFiles(url, data_dir / "cache" / "checkpoints", max_cache_bytes))


class CheckpointStore:
    """Writes, reads and removes the files of checkpoints. Which of them count is said by the control records.

    A save is `begin`, writing files into the directory that it returns, `seal`, `publish`, and in any case `end`. Every
    method raises `StorageError`, with the reason, when the store refuses.
    """

    def __init__(self, files: FileStore) -> None:
        self._files = files
        self._readers: Counter[str] = Counter()

    async def open(self) -> None:
        """Clear up what a crash has left of this server's own; to be called once, before anything else."""
        await self._files.open()

    # --- saving -------------------------------------------------------------------------------------------------------

    async def begin(self) -> Path:
        """A new empty local directory for the files of a checkpoint."""
        directory = self._files.work_directory / uuid.uuid4().hex
        await asyncio.to_thread(make_directory, directory)
        return directory

    async def seal(self, directory: Path, location: str) -> int:
        """Checksum and flush what was written for a location; returns the size in bytes, without the checksums."""
        return await asyncio.to_thread(_seal, self._own(directory), location)

    async def publish(self, directory: Path, location: str) -> None:
        """Put sealed files where they belong, durably. After a failure a part of them may be there."""
        await self._files.publish(self._own(directory), location)

    async def end(self, directory: Path) -> None:
        """Remove what is left of a directory of `begin`."""
        try:
            await asyncio.to_thread(remove, self._own(directory))
        except StorageError as error:
            log.error("an unfinished save stays on disk until the next start: %s", error)

    async def remove(self, location: str) -> None:
        """Remove the files at a location, which nobody reads; none there is fine."""
        await self._files.remove(location)

    # --- reading ------------------------------------------------------------------------------------------------------

    def is_read(self, location: str) -> bool:
        """Whether somebody reads the files of a location now."""
        return self._readers[location] > 0

    async def sizes(self, location: str) -> dict[str, int]:
        """Bytes of a checkpoint's files by name, in order of name."""
        found = await self._files.sizes(location)
        sizes = {name: size for name, size in found.items() if is_allowed(name)}
        if not sizes:
            raise StorageError(f"the files of checkpoint {location} are gone from {self._files}")
        return sizes

    @asynccontextmanager
    async def reading(self, location: str, *, verify: bool = True) -> AsyncIterator[Path]:
        """A local directory with a checkpoint's files for the length of a block; they must not be changed.

        Raises `DamagedRecordError`, naming the file, for files that are not what was saved. Without ``verify``, that is
        noticed of remote files only.
        """
        self._readers[location] += 1
        try:
            async with self._files.reading(location, verify=verify) as directory:
                yield directory
        finally:
            self._readers[location] -= 1
            if not self._readers[location]:
                del self._readers[location]

    async def link(self, source: Path, directory: Path) -> None:
        """Put the files of a checkpoint that is being read into a directory of `begin`."""
        await asyncio.to_thread(_link, source, self._own(directory))

    def _own(self, directory: Path) -> Path:
        if directory.parent != self._files.work_directory:
            raise ValueError(f"{directory} was not made by begin()")
        return directory


def _seal(directory: Path, location: str) -> int:
    with reported("read", f"the files of a checkpoint in {directory}"):
        names = local_sizes(directory)
    if not names:
        raise StorageError(f"nothing was written for checkpoint {location}; report this to the trainer's author")
    check_names(names, location)
    return seal(directory, location)


def _link(source: Path, directory: Path) -> None:
    with reported("copy", f"the files of a checkpoint in {source}"):
        link_files(source, directory)


def files_of(directory: Path) -> dict[str, int]:
    """Bytes of the files of a checkpoint in a local directory by name. Blocking. Raises `StorageError`."""
    with reported("read", f"the files of a checkpoint in {directory}"):
        return {name: size for name, size in local_sizes(directory).items() if is_allowed(name)}
