"""Rows of the table ``live``: requests that are not done with."""

from __future__ import annotations

import attrs

from tinker_core.storage.journal.checks import live_check
from tinker_core.storage.journal.schema import Value

LIVE_COLUMNS = "number, model_id, seq_id, grp, state, body, body_size, body_chk, chk"


@attrs.frozen
class LiveRow:
    """The columns of ``live`` but for the attempts, in their order."""

    number: int
    model_id: str | None
    seq_id: int | None
    group: str | None
    state: str
    body: int
    body_size: int
    body_check: int
    check: int

    @property
    def is_intact(self) -> bool:
        """Whether the checksum fits."""
        return live_check(self.number, attrs.astuple(self)[1:-1]) == self.check

    def stored(self) -> tuple[Value, ...]:
        """The row as the table has it, without attempts."""
        return (*attrs.astuple(self), 0)

    def changed(self, state: str, *, keep_body: bool) -> LiveRow:
        """The row in another state."""
        body = (self.body, self.body_size, self.body_check) if keep_body else (0, 0, 0)
        return live_row(self.number, self.model_id, self.seq_id, self.group, state, *body)


def live_row(
    number: int,
    model_id: str | None,
    seq_id: int | None,
    group: str | None,
    state: str,
    body: int,
    body_size: int,
    body_check: int,
) -> LiveRow:
    """A row of ``live`` with its checksum."""
    fields = (model_id, seq_id, group, state, body, body_size, body_check)
    return LiveRow(number, *fields, live_check(number, fields))
