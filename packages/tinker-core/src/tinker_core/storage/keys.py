"""API keys in the control database."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from tinker_core.errors import UnknownKeyError
from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import api_keys
from tinker_core.types import ApiKeyRecord


class KeyStore(Rows):
    """Keeps API keys for ever, revoked ones too: a server that had keys once never again accepts just any."""

    async def add(self, record: ApiKeyRecord) -> None:
        """Keep a new key."""
        await self._insert(api_keys, record)

    async def list(self) -> list[ApiKeyRecord]:
        """All keys, oldest first."""
        query = sa.select(api_keys).order_by(api_keys.c.number)
        rows = await self._read(lambda connection: list(connection.execute(query).mappings()))
        return [self._record(row, ApiKeyRecord) for row in rows]

    async def number_of(self, key_id: str) -> int:
        """The key's place in the order of creation, which never changes. Raises `UnknownKeyError`."""
        query = sa.select(api_keys.c.number).where(api_keys.c.key_id == key_id)
        number = await self._read(lambda connection: connection.execute(query).scalar())
        if number is None:
            raise UnknownKeyError(key_id)
        return int(number)

    async def extend(self, key_id: str, expires_at: datetime) -> None:
        """Set when a key expires. Raises `UnknownKeyError`."""
        statement = sa.update(api_keys).where(api_keys.c.key_id == key_id).values(expires_at=expires_at)
        await self._change(statement, UnknownKeyError(key_id))

    async def revoke(self, key_id: str, at: datetime) -> ApiKeyRecord:
        """Make a key useless from now on; a second time changes nothing. Raises `UnknownKeyError`."""
        found = api_keys.c.key_id == key_id

        def work(connection: sa.Connection) -> sa.RowMapping | None:
            connection.execute(sa.update(api_keys).where(found, api_keys.c.revoked_at.is_(None)).values(revoked_at=at))
            return connection.execute(sa.select(api_keys).where(found)).mappings().first()

        row = await self._run(work)
        if row is None:
            raise UnknownKeyError(key_id)
        return self._record(row, ApiKeyRecord)
