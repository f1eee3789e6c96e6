"""What clients say to plugins in words that only the plugin knows: passed on as it is, within bounds."""

from __future__ import annotations

from collections.abc import Mapping

from tinker_core.errors import InvalidRequestError
from tinker_core.types import SettingValue
from tinker_server.wire.fields import show

_MAX_INTEGER = 2**63 - 1
_MAX_SETTINGS = 64


def check_plain(values: Mapping[str, object], where: str) -> dict[str, SettingValue]:
    """The numbers, texts and booleans; null and empty values say nothing, any other is refused by name."""
    if len(values) > _MAX_SETTINGS:
        raise InvalidRequestError(f"{where} has {len(values)} fields; at most {_MAX_SETTINGS} are allowed")
    found: dict[str, SettingValue] = {}
    for key, value in values.items():
        if value is None or value == [] or value == {}:
            continue
        if not isinstance(value, bool | int | float | str):
            raise InvalidRequestError(f"{where}.{key} must be a number, a text or a boolean, got {show(value)}")
        if isinstance(value, int) and abs(value) > _MAX_INTEGER:
            raise InvalidRequestError(f"{where}.{key} must be an integer of 64 bits, got one of {value.bit_length()}")
        found[key] = value
    return found
