"""Reading JSON objects field by field: absent and null mean the same, wrong types are refused by name."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import TypeVar, overload

from tinker_core.errors import InvalidRequestError

_LOGGER = logging.getLogger(__name__)
_T = TypeVar("_T")
_MISSING = object()


class Fields:
    """One JSON object. Every read marks its key as known; `refuse_unknown` and `log_unknown` deal with the rest."""

    def __init__(self, values: Mapping[str, object], where: str) -> None:
        self._values = values
        self._where = where
        self._known: set[str] = {"type"}

    def _name(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key

    def has(self, key: str) -> bool:
        """Whether a key has a value other than null."""
        return self._values.get(key) is not None

    def contains(self, key: str) -> bool:
        """Whether a key is present, null included."""
        return key in self._values

    def raw(self, key: str) -> object:
        """The value as it is, None when absent."""
        self._known.add(key)
        return self._values.get(key)

    def _typed(self, key: str, kind: type[_T], noun: str, default: object) -> _T | None:
        value = self.raw(key)
        if value is None:
            if default is _MISSING:
                raise InvalidRequestError(f"{self._name(key)} is required; send {noun}")
            return default  # type: ignore[return-value]
        if kind is float and type(value) is int:
            return float(value)  # type: ignore[return-value]
        if type(value) is not kind:
            raise InvalidRequestError(f"{self._name(key)} must be {noun}, got {_show(value)}")
        return value

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: str) -> str: ...
    @overload
    def text(self, key: str, default: None) -> str | None: ...
    def text(self, key: str, default: object = _MISSING) -> str | None:
        """A string."""
        return self._typed(key, str, "a string", default)

    @overload
    def integer(self, key: str) -> int: ...
    @overload
    def integer(self, key: str, default: int) -> int: ...
    @overload
    def integer(self, key: str, default: None) -> int | None: ...
    def integer(self, key: str, default: object = _MISSING) -> int | None:
        """An integer; true and 1.5 are not integers."""
        return self._typed(key, int, "an integer", default)

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: float) -> float: ...
    def number(self, key: str, default: object = _MISSING) -> float | None:
        """A float or an integer."""
        return self._typed(key, float, "a number", default)

    @overload
    def boolean(self, key: str) -> bool: ...
    @overload
    def boolean(self, key: str, default: bool) -> bool: ...
    def boolean(self, key: str, default: object = _MISSING) -> bool | None:
        """True or false."""
        return self._typed(key, bool, "true or false", default)

    @overload
    def objects(self, key: str) -> list[object]: ...
    @overload
    def objects(self, key: str, default: list[object]) -> list[object]: ...
    @overload
    def objects(self, key: str, default: None) -> list[object] | None: ...
    def objects(self, key: str, default: object = _MISSING) -> list[object] | None:
        """A list of anything."""
        return self._typed(key, list, "a list", default)

    @overload
    def mapping(self, key: str) -> dict[str, object]: ...
    @overload
    def mapping(self, key: str, default: None) -> dict[str, object] | None: ...
    def mapping(self, key: str, default: object = _MISSING) -> dict[str, object] | None:
        """An object, as a plain dict."""
        return self._typed(key, dict, "an object", default)

    def nested(self, key: str) -> Fields:
        """An object whose fields are read in turn; absent means empty."""
        return Fields(self.mapping(key, None) or {}, self._name(key))

    def _unknown(self) -> list[str]:
        return [key for key, value in self._values.items() if key not in self._known and value]

    def refuse_unknown(self) -> None:
        """Raise `InvalidRequestError` for keys never read, unless they are null, false, 0 or empty."""
        unknown = self._unknown()
        if unknown:
            names = ", ".join(repr(name) for name in sorted(unknown))
            known = ", ".join(sorted(self._known - {"type"}))
            raise InvalidRequestError(f"{self._where or 'the request'} has unknown fields {names}; known are {known}")

    def log_unknown(self) -> None:
        """Log keys never read, once each per process."""
        for key in self._unknown():
            _log_once(self._name(key))


def _show(value: object) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 80 else text[:77] + '...'}"


@functools.lru_cache(maxsize=1024)
def _log_once(name: str) -> None:
    _LOGGER.warning("clients send the field %s, which this server does not know; it has no effect", name)


def as_object(value: object, where: str) -> Fields:
    """The fields of an element of a list."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object, got {_show(value)}")
    return Fields(value, where)
