"""The log of every process: lines for people or JSON objects for machines, with what they are about.

An object has ``time``, ``level``, ``logger``, ``process`` and ``message``, ``exception`` where one was caught, and
those of `FIELDS` that are known: from ``extra`` of the call, or else from the `log_context` that it happens in. What
clients send to be trained on or sampled from is never logged, and neither are keys, tokens and signatures.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import TextIO

LOG_FORMATS = ("text", "json")
LOG_FORMAT_VARIABLE = "TINKER_LOG_FORMAT"
"""Tells worker processes how to write their log."""

FIELDS = (
    "request_id",
    "model_id",
    "sampling_session_id",
    "session_id",
    "base_model",
    "owner",
    "client",
    "method",
    "path",
    "status",
    "seconds",
)
"""What a line may say besides its message."""

_CHATTY = ("uvicorn", "alembic", "httpx")
_context: ContextVar[dict[str, object] | None] = ContextVar("log_context", default=None)


@contextmanager
def log_context(**fields: object) -> Iterator[None]:
    """Everything logged in the block, and in tasks that begin in it, is about this."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def note_in_log(**fields: object) -> None:
    """From now on everything logged in the innermost `log_context` is about this too; None adds nothing."""
    current = _context.get()
    if current is not None:
        current.update((name, value) for name, value in fields.items() if value is not None)


def log_fields(record: logging.LogRecord) -> dict[str, object]:
    """What a record is about, as far as it is known where it is written."""
    known = _context.get() or {}
    found = {name: getattr(record, name, known.get(name)) for name in FIELDS}
    return {name: value for name, value in found.items() if value is not None}


class JsonFormatter(logging.Formatter):
    """One JSON object a record."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The object, on one line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
            **log_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


class _Handler(logging.StreamHandler[TextIO]):
    """The one that `configure_logging` puts in place, and replaces."""


def configure_logging(log_format: str, *, process: str = "server") -> None:
    """Write the log of this process to standard error, in one of `LOG_FORMATS`.

    Where somebody else has set up logging already, it stays as it is.
    """
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    if root.handlers:
        return
    name = "" if process == "server" else f"{process} "
    handler = _Handler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter(process))
    else:
        handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {name}%(name)s %(message)s"))
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)
