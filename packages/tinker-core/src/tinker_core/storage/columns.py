"""Columns of the control database's tables: they hold the same on every database, and refuse the same."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import sqlalchemy as sa

from tinker_core.errors import InvalidRequestError


class UtcDateTime(sa.TypeDecorator[datetime]):
    """An aware datetime, stored in UTC also by databases that keep no time zone."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To UTC; raises `ValueError` for a naive datetime, which could mean any time zone."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"datetime {value!r} has no time zone; control records use aware UTC datetimes")
        utc = value.astimezone(UTC)
        return utc.replace(tzinfo=None) if dialect.name == "sqlite" else utc

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Aware, in UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class Text(sa.TypeDecorator[str]):
    """Text that every database can hold: Postgres has no NUL, and none has half a surrogate pair."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """The text as it is; raises `InvalidRequestError` for one that cannot be kept or looked for."""
        if value is not None and not is_storable(value):
            raise InvalidRequestError(
                f"text {value[:60]!r} cannot be stored or looked for; it must have no NUL and no lone surrogate"
            )
        return value


_NUMBER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
"""SQLite numbers rows only by a column of exactly this type, which has 64 bits there."""


def named_metadata() -> sa.MetaData:
    """Tables whose constraints have names, so that a later migration can address them on every database."""
    return sa.MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


def json_column(name: str, *, nullable: bool = False) -> sa.Column[object]:
    """A column of JSON, in which None is NULL."""
    return sa.Column(name, sa.JSON(none_as_null=True), nullable=nullable)


def number() -> sa.Column[int]:
    """Order of insertion: breaks ties between equal timestamps, so that pages never overlap."""
    return sa.Column("number", _NUMBER, primary_key=True, autoincrement=True)


def ownership() -> tuple[sa.Column[str], sa.Column[str]]:
    """Whose a row is."""
    return sa.Column("owner", Text, nullable=False, index=True), sa.Column("project_id", Text, index=True)


def is_storable(text: str) -> bool:
    """Whether a text has neither NUL nor lone surrogates."""
    return "\0" not in text and (text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text))


def to_json(value: object) -> str:
    """JSON for a column; raises `InvalidRequestError` for NaN and infinities, which JSON does not have."""
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError as error:
        raise InvalidRequestError(f"a value cannot be stored as JSON: {error}") from error
