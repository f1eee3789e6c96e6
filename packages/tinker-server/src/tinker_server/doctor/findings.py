"""What a check found."""

from __future__ import annotations

from typing import Literal

import attrs

Level = Literal["ok", "warn", "fail"]


@attrs.frozen
class Finding:
    """One line of the report."""

    level: Level
    check: str
    text: str
    fix: str = ""
    """What to do about it; empty for what is fine."""


def ok(check: str, text: str) -> Finding:
    """All is well."""
    return Finding("ok", check, text)


def warn(check: str, text: str, fix: str) -> Finding:
    """It works, but not as well as it could, or not for ever."""
    return Finding("warn", check, text, fix)


def fail(check: str, text: str, fix: str) -> Finding:
    """A server would not start, or would lose something."""
    return Finding("fail", check, text, fix)
