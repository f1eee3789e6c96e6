"""Where the control database is: URLs that are checked before use, and shown without what they keep secret."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa

from tinker_core.errors import ConfigurationError

_DRIVERS = {"sqlite": "pysqlite", "postgresql": "psycopg"}
"""The databases that the stores are tested on, each with the one driver that is used."""
_ALIASES = {"postgres": "postgresql"}


def database_url(data_dir: Path) -> str:
    """Where a data directory keeps its control database unless it is told otherwise."""
    return f"sqlite:///{data_dir / 'control.sqlite'}"


def parse_url(url: str) -> sa.URL:
    """A URL with the driver that will be used, such as ``postgresql+psycopg`` for ``postgresql``.

    Raises `ConfigurationError`, which never repeats the URL: who mistyped it may have put the password anywhere.
    """
    try:
        parsed = sa.make_url(url)
    except (sa.exc.ArgumentError, ValueError):
        # What the parser says of a URL that it cannot read may be a part of the password.
        raise ConfigurationError(
            "the control database URL cannot be read; write postgresql://user@host:5432/name, with special characters "
            "of a password as %XX, or sqlite:////absolute/path"
        ) from None
    backend, _, driver = parsed.drivername.partition("+")
    backend = _ALIASES.get(backend, backend)
    wanted = _DRIVERS.get(backend)
    if wanted is None or driver not in ("", wanted):
        raise ConfigurationError(
            f"control database {shown(parsed)!r} cannot be used: {parsed.drivername!r} is none of "
            f"{', '.join(f'{name}+{of}' for name, of in _DRIVERS.items())}"
        )
    return parsed.set(drivername=f"{backend}+{wanted}")


def shown(url: sa.URL) -> str:
    """A URL for messages: without its password, and without its options, which may hold one too."""
    return sa.URL.create(url.drivername, url.username, None, url.host, url.port, url.database).render_as_string()
