"""Checks of what must survive: data directory, control database, journal, checkpoints."""

from __future__ import annotations

import os
import secrets
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from tinker_core.engine.lock import is_locked
from tinker_core.errors import TinkerError
from tinker_core.storage import database_url
from tinker_core.storage.database import look_at_database
from tinker_core.storage.journal.inspection import inspect_journal
from tinker_core.storage.schema import CONTROL
from tinker_server.config import ServerConfig
from tinker_server.doctor.findings import Finding, fail, ok, warn

_GIB = 1024**3
_LITTLE_SPACE = 10 * _GIB
_NO_SPACE = _GIB
_SLOW_SYNC = 0.020
"""Seconds. Every accepted request waits for one, together with what arrives meanwhile."""
_SYNCS = 21
_REMOTE = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse", "ceph", "glusterfs", "lustre")
_FLEETING = ("tmpfs", "ramfs", "overlay")


def check_data_dir(data_dir: Path) -> Iterator[Finding]:
    """That it is there, or can be made, and on what."""
    if not data_dir.is_dir():
        parent = next(path for path in data_dir.parents if path.is_dir())
        if os.access(parent, os.W_OK):
            yield ok("data directory", f"{data_dir} will be made when the server starts")
        else:
            yield fail("data directory", f"{data_dir} does not exist, nor may it be made", "choose another --data-dir")
        return
    try:
        yield from _check_disk(data_dir)
    except OSError as error:
        yield fail("data directory", f"{data_dir}: {error.strerror or error}", "let the server's user write there")


def _check_disk(data_dir: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(data_dir).free
    text = f"{data_dir} has {free / _GIB:.1f} GiB of room"
    if free < _NO_SPACE:
        yield fail("disk", text, "make room: with a full disk no request is accepted and no checkpoint saved")
    elif free < _LITTLE_SPACE:
        yield warn(
            "disk", text, "make room, or bound checkpoints with --keep-last and the journal with --journal-bytes"
        )
    else:
        yield ok("disk", text)
    kind = file_system_of(data_dir)
    if kind.partition(".")[0] in _REMOTE:
        yield warn("file system", f"{kind}: SQLite's locks and syncs may not hold there", "use a local disk")
    elif kind in _FLEETING:
        yield warn("file system", f"{kind}: it may not outlive this machine or container", "use a disk or a volume")
    else:
        yield ok("file system", kind)
    seconds = sync_seconds(data_dir)
    text = f"{1000 * seconds:.1f} ms to make 4 KiB durable"
    if seconds > _SLOW_SYNC:
        yield warn("fsync", text, "use a disk with a faster flush: every request waits for one")
    else:
        yield ok("fsync", text)


def file_system_of(directory: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that a directory is on; ``unknown`` where the system does not say."""
    if not mounts.exists():
        return "unknown"
    found = ("", "unknown")
    for line in mounts.read_text().splitlines():
        point, kind = line.split()[1:3]
        point = point.replace("\\040", " ")
        if directory.resolve().is_relative_to(point) and len(point) >= len(found[0]):
            found = (point, kind)
    return found[1]


def sync_seconds(directory: Path) -> float:
    """Median time that a small write takes to become durable."""
    path = directory / f".doctor-{secrets.token_hex(4)}"
    times = []
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for _ in range(_SYNCS):
            os.write(descriptor, bytes(4096))
            started = time.perf_counter()
            os.fsync(descriptor)
            times.append(time.perf_counter() - started)
    finally:
        os.close(descriptor)
        path.unlink()
    return statistics.median(times)


def check_lock(data_dir: Path) -> Iterator[Finding]:
    """Whether a server uses the directory now."""
    if is_locked(data_dir):
        yield ok("lock", "a server is running on this data directory")
    else:
        yield ok("lock", "no server is running on this data directory")


def check_database(config: ServerConfig, data_dir: Path) -> Iterator[Finding]:
    """That the control database answers and has a schema that this version knows."""
    if config.database_url is None and not (data_dir / "control.sqlite").exists():
        yield ok("control database", "none yet; it will be made when the server starts")
        return
    try:
        present = look_at_database(config.database_url or database_url(data_dir))
    except TinkerError as error:
        yield fail("control database", str(error), "start the database, or correct --database-url")
        return
    newest = CONTROL.revisions()[-1]
    if present not in (None, *CONTROL.revisions()):
        text = f"schema {present}, which this version does not know"
        yield fail("control database", text, "upgrade tinker-core, or restore a backup from before the upgrade")
    elif present != newest:
        yield ok("control database", f"schema {present or 'empty'}; it will become {newest} when the server starts")
    else:
        yield ok("control database", f"schema {present}")


def check_journal(data_dir: Path) -> Iterator[Finding]:
    """That the journal can be read, and how much is in it."""
    directory = data_dir / "journal"
    try:
        report = inspect_journal(directory)
    except TinkerError as error:
        yield fail("journal", str(error), "see docs/how-to/operate.md, 'A damaged journal'")
        return
    if report is None:
        yield ok("journal", "none yet; it will be made when the server starts")
        return
    text = (
        f"format {report.version}, {report.pending} requests without a result, {report.results} results, "
        f"{report.models} models, {report.num_bytes / 1024**2:.1f} MiB"
    )
    if report.damaged:
        lines = "; ".join(report.damaged[:3])
        yield fail("journal", f"{text}; damaged: {lines}", "see docs/how-to/operate.md, 'A damaged journal'")
    else:
        yield ok("journal", f"{text}; their heads are intact, bodies are checked when they are read")
