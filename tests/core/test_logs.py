"""What a line of the log says besides its message."""

from __future__ import annotations

import asyncio
import json
import logging
import sys

import pytest

from tinker_core.logs import JsonFormatter, configure_logging, log_context, log_fields, note_in_log


def record(message: str = "said", **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("acme", logging.WARNING, __file__, 1, message, None, None)
    made.__dict__.update(extra)
    return made


def test_fields_come_from_the_call_or_else_from_the_context() -> None:
    with log_context(owner="ann", path="/x"):
        note_in_log(request_id="r-1", model_id=None)
        assert log_fields(record(owner="ben", secret="s")) == {"owner": "ben", "path": "/x", "request_id": "r-1"}
        with log_context(path="/y"):
            assert log_fields(record())["path"] == "/y"
        assert log_fields(record())["path"] == "/x"
    note_in_log(request_id="r-2")  # about nothing
    assert log_fields(record()) == {}


def test_tasks_keep_the_context_that_they_began_in() -> None:
    async def run() -> dict[str, object]:
        with log_context(owner="ann"):
            task = asyncio.create_task(asyncio.to_thread(log_fields, record()))
        return await task

    assert asyncio.run(run()) == {"owner": "ann"}


def test_an_object_is_one_line_even_with_an_exception() -> None:
    try:
        raise ValueError("first line\nsecond line")
    except ValueError:
        made = record("it\nfailed")
        made.exc_info = sys.exc_info()
    line = JsonFormatter("rank0").format(made)
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["process"] == "rank0"
    assert (parsed["level"], parsed["logger"], parsed["message"]) == ("WARNING", "acme", "it\nfailed")
    assert "second line" in parsed["exception"]


def test_logging_that_somebody_else_has_set_up_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    before = list(logging.getLogger().handlers)
    configure_logging("json")
    assert logging.getLogger().handlers == before
    assert caplog.handler in before
