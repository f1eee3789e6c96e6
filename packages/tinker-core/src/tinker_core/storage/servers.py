"""The servers that keep their records in one database."""

from __future__ import annotations

import sqlalchemy as sa

from tinker_core.errors import ConfigurationError
from tinker_core.storage.rows import Rows
from tinker_core.storage.tables import servers
from tinker_core.types import ServerRecord


class ServerStore(Rows):
    """Keeps servers for ever: what they made bears their ids."""

    async def register(self, record: ServerRecord, *, known: bool) -> None:
        """Note a server, and where it keeps checkpoints now.

        Raises `ConfigurationError` when it should be ``known`` here and is not: these are not its records.
        """
        found = servers.c.server_id == record.server_id
        row = self._row(record)
        present = await self._get(servers.c.server_id, record.server_id, ServerRecord)
        if present is not None and present.store == record.store:
            return
        if present is None and known:
            raise ConfigurationError(
                f"this data directory was used with another control database, for this one has no server "
                f"{record.server_id!r}; name that one with --database-url, or copy its records into this one with "
                "'tinker-server database copy'"
            )

        def work(connection: sa.Connection) -> None:
            changed = sa.update(servers).where(found).values(store=record.store)
            if not connection.execute(changed).rowcount:
                connection.execute(sa.insert(servers).values(row))

        await self._run(work)

    async def only(self) -> str | None:
        """The one server that ever used this database; None if there were several, or none."""
        query = sa.select(servers.c.server_id).limit(2)
        ids = await self._read(lambda connection: list(connection.execute(query).scalars()))
        return ids[0] if len(ids) == 1 else None

    async def shares(self, server_id: str) -> bool:
        """Whether another server keeps its checkpoints in the same remote store as this one."""
        both = sa.select(servers.c.store).where(servers.c.server_id.in_((server_id, self.server_id)))
        stores = await self._read(lambda connection: list(connection.execute(both).scalars()))
        return len(stores) == 2 and stores[0] is not None and stores[0] == stores[1]
