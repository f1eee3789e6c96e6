"""Access tokens in the control database."""

from __future__ import annotations

from datetime import datetime

import sqlalchemy as sa

from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import access_tokens
from tinker_core.types import AccessTokenRecord


class AccessTokenStore(Rows):
    """Keeps records of tokens, never tokens."""

    async def add(self, record: AccessTokenRecord) -> None:
        """Keep a new token's record."""
        await self._insert(access_tokens, record)

    async def find(self, token_hash: str) -> AccessTokenRecord | None:
        """The record of a token, or None."""
        return await self._get(access_tokens.c.token_hash, token_hash, AccessTokenRecord)

    async def list(self) -> list[AccessTokenRecord]:
        """All records, oldest first."""
        query = sa.select(access_tokens).order_by(access_tokens.c.number)
        rows = await self._read(lambda connection: list(connection.execute(query).mappings()))
        return [self._record(row, AccessTokenRecord) for row in rows]

    async def revoke(self, token_id: str, at: datetime) -> AccessTokenRecord | None:
        """End a token, or None when there is none of this id; the first time stays."""
        found = access_tokens.c.token_id == token_id
        end = sa.update(access_tokens).where(found, access_tokens.c.revoked_at.is_(None)).values(revoked_at=at)
        await self._run(lambda connection: connection.execute(end))
        return await self._get(access_tokens.c.token_id, token_id, AccessTokenRecord)
