"""One revision of sampler weights: where they are, who uses them, and whether they will come back."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import attrs


class Source(Protocol):
    """Files of weights that are somebody else's, and may go."""

    def open(self) -> AbstractAsyncContextManager[Path]:
        """A directory with the files for the length of a block; raises why they are not to be had."""

    async def is_there(self) -> bool:
        """Whether they still exist."""


def model_of_revision(name: str) -> str:
    """The model whose weights an ephemeral revision ``"<model_id>@<request_id>"`` holds."""
    return name.rpartition("@")[0]


@attrs.define(kw_only=True, eq=False)
class Revision:
    """An immutable name for weights."""

    name: str
    source: Source | None = None
    """Files that are somebody else's."""
    directory: Path | None = None
    """Where our own files are."""
    verified: bool = False
    """Whether our files were found undamaged since the start."""
    num_bytes: int = 0
    """Size of our files."""
    resident: bool = False
    users: int = 0
    publishers: int = 0
    """Calls that are about to publish it."""
    expected: bool = False
    """Whether a replay will publish it."""
    dropped: bool = False
    failure: str | None = None
    """Why it will not be published again."""
    settled: asyncio.Event = attrs.field(factory=asyncio.Event)
    """Set while it is known whether and where the weights are: resident, in files, or lost."""
    loading: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    """Held while it is loaded from files."""
    lock: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    """Held while it is published, evicted, written or removed."""

    @property
    def model_id(self) -> str:
        """The model that it is of, if it is ephemeral."""
        return model_of_revision(self.name)

    @property
    def is_there(self) -> bool:
        """Whether its weights exist."""
        return self.resident or self.has_files

    @property
    def has_files(self) -> bool:
        """Whether it can be made resident from files."""
        return self.directory is not None or self.source is not None

    @property
    def has_weights(self) -> bool:
        """Whether nothing may be published under this name."""
        return self.is_there or self.dropped

    @property
    def is_wanted(self) -> bool:
        """Whether it has to be remembered; not if it was never published at all."""
        return self.is_there or self.expected or self.dropped or bool(self.users or self.publishers)

    def is_idle(self) -> bool:
        """Whether it may be evicted; what was dropped leaves by itself."""
        return self.resident and self.users == 0 and not self.dropped

    def in_use(self) -> bool:
        """Whether somebody samples from it, or waits for it."""
        return self.users > 0

    def lose(self, reason: str) -> None:
        """Tell whoever waits for weights that are not there that they will not come."""
        if not self.is_there:
            self.failure = reason
            self.settled.set()

    def settle(self) -> None:
        """The weights are there, or, without them, expected."""
        if self.is_there:
            self.failure = None
            self.settled.set()
        elif self.failure is None:
            self.settled.clear()
