"""What the commands' flags have in common."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import orjson

from tinker_core.errors import ConfigurationError
from tinker_core.storage import database_url

_T = TypeVar("_T")

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days"}
_LONGEST = timedelta(days=36500)
FORMATS = ("table", "json")


class Parser(argparse.ArgumentParser):
    """A parser that reports mistakes as `ConfigurationError`."""

    def error(self, message: str) -> NoReturn:
        """Raise instead of ending the process."""
        raise ConfigurationError(message)


def add_common_flags(parser: argparse.ArgumentParser) -> None:
    """``--data-dir``, ``--database-url`` and ``--format``."""
    parser.add_argument(
        "--data-dir",
        default="~/.tinker-server",
        metavar="DIR",
        help="data directory of the server (default: ~/.tinker-server)",
    )
    parser.add_argument(
        "--database-url", metavar="URL", help="control database of the server, if it runs with --database-url"
    )
    parser.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: table)")


def data_dir_of(text: str) -> Path:
    """The data directory, as the server would find it."""
    return Path(text).expanduser().resolve()


def control_url_of(given: Mapping[str, Any], *, create: bool = False) -> str:
    """The control database that `add_common_flags` names; ``create`` makes the data directory if it is not there.

    Raises `ConfigurationError` when there is no such data directory.
    """
    if given["database_url"] is not None:
        return str(given["database_url"])
    data_dir = data_dir_of(given["data_dir"])
    if create:
        data_dir.mkdir(parents=True, exist_ok=True)
    elif not data_dir.is_dir():
        raise ConfigurationError(
            f"there is no data directory {data_dir}; name the server's with --data-dir, or its --database-url"
        )
    return database_url(data_dir)


def checked(what: str, parse: Callable[[str], _T], accept: Callable[[_T], bool]) -> Callable[[str], _T]:
    """A type for a flag: what ``parse`` makes of the text, if ``accept`` agrees."""

    def convert(text: str) -> _T:
        try:
            value = parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from error
        if not accept(value):
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}")
        return value

    return convert


def duration(text: str) -> timedelta:
    """``30d``, ``12h``, ``90m`` or ``3600s``."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhd])", text)
    value = timedelta(**{_UNITS[found[2]]: int(found[1])}) if found is not None else None
    if value is None or value > _LONGEST:
        raise argparse.ArgumentTypeError(
            f"must be a number with s, m, h or d, such as 30d, of at most a hundred years, got {text!r}"
        )
    return value


def render(rows: Sequence[dict[str, object]], columns: Sequence[str], output_format: str) -> str:
    """Rows for the terminal: a table of some columns, or all fields as JSON."""
    if output_format == "json":
        return orjson.dumps(rows, option=orjson.OPT_INDENT_2).decode() + "\n"
    lines = [[column.replace("_", " ").upper() for column in columns]]
    lines += [["-" if row[column] is None else str(row[column]) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)
    return "\n".join(text) + "\n"
