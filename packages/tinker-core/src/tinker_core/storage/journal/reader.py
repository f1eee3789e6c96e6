"""Reading the journal, beside the thread that writes it."""

from __future__ import annotations

import asyncio
import logging
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from tinker_core.errors import DamagedRecordError
from tinker_core.storage.journal.checks import BODY, RESULT, blob_check, head_check
from tinker_core.storage.journal.records import Recovered
from tinker_core.storage.journal.recovery import recover
from tinker_core.storage.journal.schema import IN_FILE, connect
from tinker_core.storage.journal.side_files import SideFile, SideFiles
from tinker_core.storage.journal.transaction import scope_hash

log = logging.getLogger(__name__)

_T = TypeVar("_T")
_THREADS = 2

_SQL = {
    BODY: (
        "SELECT live.body, live.body_size, live.body_chk, bodies.data FROM live LEFT JOIN bodies USING (number) "
        "WHERE live.number = ? AND live.body > 0"
    ),
    RESULT: (
        "SELECT stored, size, chk, payloads.data FROM results LEFT JOIN payloads USING (number) "
        "WHERE results.number = ?"
    ),
}
_WORDS = {BODY: "body of request", RESULT: "result of request"}


class Reader:
    """A few threads with a connection each; reads never wait for a commit."""

    def __init__(self, path: Path, files: SideFiles) -> None:
        self._path = path
        self._files = files
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="journal-read", initializer=self._connect)

    def _connect(self) -> None:
        connection = connect(self._path)
        connection.execute("PRAGMA query_only=1")
        self._local.connection = connection
        self._connections.append(connection)

    async def head(self, number: int) -> bytes | None:
        """The head of a request; None if there is none."""
        return await self._run(lambda: self._head(number))

    async def answered(self, scope: str, places: range) -> list[bytes]:
        """Heads of the requests of a scope that have results, in order of number; a damaged one is named in the log."""
        return await self._run(lambda: self._answered(scope, places))

    async def blob(self, kind: bytes, number: int) -> bytes | None:
        """A body or a result; None if there is none."""
        return await self._run(lambda: self._blob(kind, number))

    async def recover(self) -> Recovered:
        """Everything that is not done with, without bodies."""
        return await self._run(lambda: recover(self._local.connection, self._path))

    def close(self) -> None:
        """End the threads; blocks."""
        self._threads.shutdown()
        for connection in self._connections:
            connection.close()

    async def _run(self, work: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._named, work)

    def _named(self, work: Callable[[], _T]) -> _T:
        try:
            return work()
        except sqlite3.DatabaseError as error:
            raise DamagedRecordError(f"the journal {str(self._path)!r} cannot be read: {error}") from error

    def _head(self, number: int) -> bytes | None:
        sql = "SELECT scope, place, owner, chk, head FROM requests WHERE number = ?"
        row = self._local.connection.execute(sql, (number,)).fetchone()
        if row is None:
            return None
        scope, place, owner, check, head = row
        if head_check(number, scope, place, owner, head) != check:
            raise DamagedRecordError(f"request {number} in {str(self._path)!r} is damaged: its checksum does not fit")
        return bytes(head)

    def _answered(self, scope: str, places: range) -> list[bytes]:
        sql = (
            "SELECT requests.number, scope, place, requests.owner, requests.chk, head FROM requests "
            "JOIN results USING (number) WHERE scope_hash = ? AND place >= ? AND place < ? ORDER BY requests.number"
        )
        heads = []
        for number, found, place, owner, check, head in self._local.connection.execute(
            sql, (scope_hash(scope), places.start, places.stop)
        ):
            if head_check(number, found, place, owner, head) != check:
                log.error("request %d in %r is damaged: its checksum does not fit", number, str(self._path))
            elif found == scope:
                heads.append(bytes(head))
        return heads

    def _blob(self, kind: bytes, number: int) -> bytes | None:
        row = self._local.connection.execute(_SQL[kind], (number,)).fetchone()
        if row is None:
            return None
        stored, size, check, data = row
        place = self._path
        if stored == IN_FILE:
            file = SideFile(kind, number)
            place = self._files.path(file)
            try:
                data = self._files.read(file)
            except OSError as error:
                if self._local.connection.execute(_SQL[kind], (number,)).fetchone() is None:
                    return None
                raise DamagedRecordError(f"the {_WORDS[kind]} {number} cannot be read: {error}") from error
        if not isinstance(data, bytes) or len(data) != size or blob_check(kind, number, data) != check:
            raise DamagedRecordError(
                f"the {_WORDS[kind]} {number} in {str(place)!r} is damaged: its checksum does not fit"
            )
        return data
