"""``tinker-server database``: move the control records from one database to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tinker_core.errors import ConfigurationError, UserError
from tinker_core.storage.copying import copy_database
from tinker_server.commands.parsing import FORMATS, Parser, render

_COLUMNS = ("table", "records")


def make_database_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server database``."""
    parser = Parser(
        prog="tinker-server database",
        description="Control records of a server, such as its keys, sessions and lists of checkpoints. Stop the server "
        "first.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="copy")
    copy = actions.add_parser("copy", help="copy all records into an empty database", allow_abbrev=False)
    copy.add_argument(
        "--from", dest="source", required=True, metavar="URL", help="such as sqlite:////data/control.sqlite"
    )
    copy.add_argument(
        "--to", dest="target", required=True, metavar="URL", help="such as postgresql+psycopg://user@host/name"
    )
    copy.add_argument("--format", choices=FORMATS, default="table", help="how to print (default: table)")
    return parser


def run_database(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Raises `ConfigurationError` for arguments that cannot work."""
    given = vars(make_database_parser().parse_args(list(arguments)))
    try:
        copied = copy_database(given["source"], given["target"])
    except UserError as error:
        raise ConfigurationError(f"a record cannot be copied: {error}") from error
    rows: list[dict[str, object]] = [{"table": table, "records": number} for table, number in copied.items()]
    sys.stdout.write(render(rows, _COLUMNS, given["format"]))
    return 0
