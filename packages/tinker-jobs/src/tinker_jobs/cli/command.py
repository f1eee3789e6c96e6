"""``tinker-server jobs``: submit and watch training jobs, add what they train on."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from tinker_jobs.cli.local import add_local_actions, run_local
from tinker_jobs.cli.parsing import Parser
from tinker_jobs.cli.remote import REMOTE_ACTIONS, add_remote_actions, run_remote


def make_jobs_parser() -> argparse.ArgumentParser:
    """The parser of ``tinker-server jobs``."""
    parser = Parser(
        prog="tinker-server jobs",
        description="Training jobs of a running server, and the datasets, capabilities, tasks and worlds of a data "
        "directory. Exit status: 0 when done; 1 when a job that was waited for failed or was cancelled; 2 when the "
        "command could not be carried out.",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_remote_actions(actions)
    add_local_actions(actions)
    return parser


def run_jobs(arguments: Sequence[str]) -> int:
    """Run the command; the exit status. Raises `JobsCommandError` for what could not be carried out."""
    given = vars(make_jobs_parser().parse_args(list(arguments)))
    return run_remote(given) if given["action"] in REMOTE_ACTIONS else run_local(given)
