"""Arguments, tables and failures: what the actions of ``tinker-server jobs`` have in common."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import orjson

from tinker_core.errors import ConfigurationError

FORMATS = ("table", "json")


class JobsCommandError(ConfigurationError):
    """A command that was not carried out: wrong arguments, no server, or a server that refuses."""


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as `JobsCommandError`."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        raise JobsCommandError(message)


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """Which server, as whom."""
    parser.add_argument(
        "--url",
        default=os.environ.get("TINKER_BASE_URL") or "http://127.0.0.1:8000",
        help="address of the server (default: TINKER_BASE_URL, else http://127.0.0.1:8000)",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get("TINKER_API_KEY"),
        metavar="KEY",
        help="API key (default: TINKER_API_KEY); none is needed for a server without keys",
    )
    parser.add_argument(
        "--organization", default="local", metavar="NAME", help="the server's --jobs-organization (default: local)"
    )
    parser.add_argument(
        "--workspace", default="default", metavar="NAME", help="the server's --jobs-workspace (default: default)"
    )
    add_format_flag(parser)


def add_library_flags(parser: argparse.ArgumentParser) -> None:
    """Which data directory."""
    parser.add_argument(
        "--data-dir",
        default="~/.tinker-server",
        metavar="DIR",
        help="data directory of the server (default: ~/.tinker-server)",
    )
    add_format_flag(parser)


def add_format_flag(parser: argparse.ArgumentParser) -> None:
    """``--format``."""
    parser.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: table)")


def data_dir_of(text: str) -> Path:
    """The data directory, as the server would find it."""
    return Path(text).expanduser().resolve()


def render_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], output_format: str) -> str:
    """Rows for the terminal: a table of some columns, or all fields as JSON."""
    if output_format == "json":
        return render_json(rows)
    table = [[column.replace("_", " ").upper() for column in columns]]
    table += [[_cell(row[column]) for column in columns] for row in rows]
    return _align(table)


def render_record(record: Mapping[str, Any], output_format: str) -> str:
    """One record: a table of its fields by dotted name without those that are not set, or JSON.

    Of a series of numbers the table shows the last one.
    """
    if output_format == "json":
        return render_json(record)
    return _align([["FIELD", "VALUE"], *([name, text] for name, text in _fields(record))])


def render_json(value: object) -> str:
    """Any JSON value, indented."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2).decode() + "\n"


def _fields(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for name, value in record.items():
        if isinstance(value, Mapping) and value.keys() == {"name", "version"}:
            found.append((prefix + name, f"{value['name']}@{value['version']}"))
        elif isinstance(value, Mapping):
            found += _fields(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(one is None or isinstance(one, int | float) for one in value):
            found.append((prefix + name, f"{_cell(value[-1])} (last of {len(value)})"))
        elif isinstance(value, list) and all(isinstance(one, str) for one in value):
            found += [(prefix + name, one) for one in value]
        elif value is not None:
            found.append((prefix + name, _cell(value)))
    return found


def short_time(timestamp: str) -> str:
    """A time in ISO 8601 to the second."""
    return datetime.fromisoformat(timestamp).isoformat(timespec="seconds")


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else orjson.dumps(value).decode()


def _align(table: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table)
    return "\n".join(lines) + "\n"
