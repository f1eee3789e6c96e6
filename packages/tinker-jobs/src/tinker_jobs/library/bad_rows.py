"""Why a file cannot be read as rows."""

from __future__ import annotations


class UnreadableRowError(Exception):
    """A row, counted from 1, that cannot be read, or with None the whole file."""

    def __init__(self, number: int | None, reason: str) -> None:
        super().__init__(number, reason)
        self.number = number
        self.reason = reason

    def __str__(self) -> str:
        return self.reason if self.number is None else f"row {self.number}: {self.reason}"
