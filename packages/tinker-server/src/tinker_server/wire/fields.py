"""Reading JSON objects field by field: absent and null mean the same, wrong types are refused by name."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import TypeVar, overload

import orjson

from tinker_core.errors import InvalidRequestError
from tinker_server.wire.unknown import note_unknown

_T = TypeVar("_T")
_MISSING = object()

MAX_TEXT = 64 * 1024
"""Most characters of a text, such as a name or an id. What is data and not text has bounds of its own."""
MAX_METADATA = 256 * 1024
"""Most bytes of a client's own metadata, as JSON."""


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
            raise InvalidRequestError(f"{self._name(key)} must be {noun}, got {show(value)}")
        return value

    @overload
    def text(self, key: str) -> str: ...
    @overload
    def text(self, key: str, default: str) -> str: ...
    @overload
    def text(self, key: str, default: None) -> str | None: ...
    def text(self, key: str, default: object = _MISSING) -> str | None:
        """A string of at most `MAX_TEXT` characters, none of them NUL."""
        value = self._typed(key, str, "a string", default)
        if value is not None and (len(value) > MAX_TEXT or "\0" in value):
            raise InvalidRequestError(
                f"{self._name(key)} must be a string of at most {MAX_TEXT} characters without NUL, got {show(value)}"
            )
        return value

    @overload
    def integer(self, key: str) -> int: ...
    @overload
    def integer(self, key: str, default: int) -> int: ...
    @overload
    def integer(self, key: str, default: None) -> int | None: ...
    def integer(self, key: str, default: object = _MISSING) -> int | None:
        """An integer of 64 bits; true and 1.5 are not integers."""
        value = self._typed(key, int, "an integer", default)
        if value is not None and not -(2**63) <= value < 2**63:
            raise InvalidRequestError(f"{self._name(key)} must be an integer of 64 bits, got {value}")
        return value

    @overload
    def number(self, key: str) -> float: ...
    @overload
    def number(self, key: str, default: float) -> float: ...
    @overload
    def number(self, key: str, default: None) -> float | None: ...
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

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; absent means empty."""
        items = self.objects(key, [])
        found = tuple(item for item in items if isinstance(item, str))
        if len(found) != len(items):
            raise InvalidRequestError(f"{self._name(key)} must be a list of strings")
        return found

    @overload
    def mapping(self, key: str) -> dict[str, object]: ...
    @overload
    def mapping(self, key: str, default: None) -> dict[str, object] | None: ...
    def mapping(self, key: str, default: object = _MISSING) -> dict[str, object] | None:
        """An object, as a plain dict."""
        return self._typed(key, dict, "an object", default)

    def metadata(self, key: str) -> dict[str, object] | None:
        """An object of the client's own that is stored and shown again, of at most `MAX_METADATA` bytes of JSON."""
        value = self.mapping(key, None)
        try:
            fits = value is None or len(orjson.dumps(value)) <= MAX_METADATA
        except TypeError:  # too deep
            fits = False
        if not fits:
            raise InvalidRequestError(
                f"{self._name(key)} must be at most {MAX_METADATA} bytes of JSON, not deeply nested"
            )
        return value

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
        """Note keys never read, unless they are null, false, 0 or empty: logged once, and counted."""
        for key in self._unknown():
            note_unknown(self._name(key))


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60
_SHORT.maxlevel = 3


def show(value: object) -> str:
    """A value in an error message: short, and short work, whatever its size and depth."""
    return f"{type(value).__name__} {_SHORT.repr(value)}"


def as_object(value: object, where: str) -> Fields:
    """The fields of an element of a list."""
    if not isinstance(value, dict):
        raise InvalidRequestError(f"{where} must be an object, got {show(value)}")
    return Fields(value, where)
