"""The actions of ``tinker-server jobs`` that talk to a server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tinker_jobs.cli.client import JobsClient
from tinker_jobs.cli.flags import KINDS, add_request_flags
from tinker_jobs.cli.following import follow, open_display, render_entry
from tinker_jobs.cli.manifest import STANDARD_INPUT, make_request
from tinker_jobs.cli.parsing import (
    JobsCommandError,
    add_server_flags,
    render_json,
    render_record,
    render_rows,
    short_time,
)
from tinker_jobs.records import FILTERS

_COLUMNS = ("id", "status", "kind", "name", "model", "created_at", "completed_at")
_KIND_NAMES = {key: kind for kind, key in KINDS.items()}
_FILTERS = ("status", "backend", "trainer_type", "project_ref", "page", "page_size")
INTERRUPTED = 130


def add_remote_actions(actions: argparse._SubParsersAction[Any]) -> None:
    """``submit``, ``list``, ``show``, ``logs``, ``cancel``, ``retry``, ``artifacts``."""
    submit = actions.add_parser("submit", help="submit a job", allow_abbrev=False)
    submit.add_argument(
        "source",
        metavar="|".join((*KINDS, "MANIFEST", STANDARD_INPUT)),
        help="a kind of job, whose fields are flags; or a request as a YAML or JSON file, whose fields flags replace; "
        f"{STANDARD_INPUT} is standard input",
    )
    add_request_flags(submit)
    submit.add_argument("--follow", action="store_true", help="show the log until the job ends")
    submit.add_argument("--wait", action="store_true", help="return when the job ends")
    listing = actions.add_parser("list", help="list jobs, the newest first", allow_abbrev=False)
    listing.add_argument("--status", choices=FILTERS, help="where the jobs are")
    listing.add_argument("--backend", choices=_values(0), help="backend of the jobs")
    listing.add_argument("--trainer-type", choices=_values(1), help="trainer_type of the jobs")
    listing.add_argument("--project-ref", metavar="TEXT", help="the project_ref that they were submitted with")
    listing.add_argument("--page", type=int, metavar="N", help="from 1 (default: 1)")
    listing.add_argument("--page-size", type=int, metavar="N", help="jobs on a page (default: 20)")
    show = actions.add_parser("show", help="show a job with settings, metrics and artifacts", allow_abbrev=False)
    logs = actions.add_parser("logs", help="print a job's log", allow_abbrev=False)
    logs.add_argument("--follow", action="store_true", help="go on until the job ends")
    cancel = actions.add_parser("cancel", help="stop a job after its current step", allow_abbrev=False)
    cancel.add_argument("--yes", "-y", action="store_true", help="do not ask")
    retry = actions.add_parser("retry", help="run a failed or cancelled job again from the start", allow_abbrev=False)
    artifacts = actions.add_parser("artifacts", help="list what a job has made", allow_abbrev=False)
    artifacts.add_argument("--save-plots", metavar="DIR", help="write its plots into this directory")
    for action in (show, logs, cancel, retry, artifacts):
        action.add_argument("job_id", metavar="ID", help="as 'list' shows it")
    for action in (submit, listing, show, logs, cancel, retry, artifacts):
        add_server_flags(action)


def _values(place: int) -> tuple[str, ...]:
    """The backends, or the trainer types, that there are."""
    return tuple(sorted({key[place] for key in KINDS.values()}))


def run_remote(given: Mapping[str, Any]) -> int:
    """Carry out one of them; the exit status. Raises `JobsCommandError`."""
    action = _ACTIONS[given["action"]]
    client = JobsClient(
        url=given["url"],
        api_key=given["api_key"],
        organization=given["organization"],
        workspace=given["workspace"],
    )
    with client:
        return action(client, given)


def _submit(client: JobsClient, given: Mapping[str, Any]) -> int:
    job = client.submit(make_request(given["source"], given))
    if not given["follow"] and not given["wait"]:
        sys.stdout.write(_render_jobs([job], given["format"]))
        return 0
    sys.stderr.write(f"submitted job {job['id']}\n")
    return _await(client, job["id"], given, is_shown=given["follow"])


def _list(client: JobsClient, given: Mapping[str, Any]) -> int:
    page = client.list_jobs({name: given[name] for name in _FILTERS})
    sys.stdout.write(_render_jobs(page["items"], given["format"]))
    rest = page["total"] - len(page["items"])
    if rest > 0 and given["format"] == "table":
        sys.stderr.write(f"page {page['page']}: {len(page['items'])} of {page['total']} jobs; more with --page\n")
    return 0


def _show(client: JobsClient, given: Mapping[str, Any]) -> int:
    sys.stdout.write(render_record(client.get(given["job_id"]), given["format"]))
    return 0


def _logs(client: JobsClient, given: Mapping[str, Any]) -> int:
    if given["follow"]:
        job = client.get(given["job_id"])
        return _await(client, job["id"], given, is_shown=True)
    entries = client.logs(given["job_id"])
    if given["format"] == "json":
        sys.stdout.write(render_json(entries))
    else:
        sys.stdout.write("".join(render_entry(entry, "table") for entry in entries))
    return 0


def _cancel(client: JobsClient, given: Mapping[str, Any]) -> int:
    if not given["yes"]:
        if not sys.stdin.isatty():
            raise JobsCommandError("cancelling asks first, and nobody is there to answer; say --yes")
        if not _agrees(f"Cancel training job {given['job_id']}? [y/N] "):
            sys.stderr.write("not cancelled\n")
            return 0
    sys.stdout.write(_render_jobs([client.cancel(given["job_id"])], given["format"]))
    return 0


def _agrees(question: str) -> bool:
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _retry(client: JobsClient, given: Mapping[str, Any]) -> int:
    sys.stdout.write(_render_jobs([client.retry(given["job_id"])], given["format"]))
    return 0


def _artifacts(client: JobsClient, given: Mapping[str, Any]) -> int:
    artifacts = client.artifacts(given["job_id"])
    sys.stdout.write(render_record(artifacts, given["format"]))
    if given["save_plots"] is not None:
        _save_plots(client, given["job_id"], artifacts, Path(given["save_plots"]))
    return 0


def _save_plots(client: JobsClient, job_id: str, artifacts: Mapping[str, Any], directory: Path) -> None:
    names = artifacts.get("plots", [])
    if not names:
        raise JobsCommandError(f"job {job_id} has no plots; they are drawn when a job completes")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name in names:
            # A name alone: what a server says must not lead out of the directory.
            (directory / Path(name).name).write_bytes(client.file(job_id, name))
    except OSError as error:
        raise JobsCommandError(f"cannot write the plots into {str(directory)!r}: {error}") from error


def _await(client: JobsClient, job_id: str, given: Mapping[str, Any], *, is_shown: bool) -> int:
    """Follow a job to its end; 0 when it completes, 1 when it does not."""
    try:
        if is_shown:
            with open_display(given["format"]) as display:
                job = follow(client, job_id, display)
        else:
            job = follow(client, job_id, None)
    except KeyboardInterrupt:
        stop = f"'tinker-server jobs cancel {job_id}' stops it"
        sys.stderr.write(f"\njob {job_id} goes on; {stop}\n")
        return INTERRUPTED
    sys.stdout.write(_render_jobs([job], given["format"]))
    if job["error"] is not None:
        sys.stderr.write(f"the job failed: {job['error']}\n")
    return 0 if job["status"] == "completed" else 1


def _render_jobs(jobs: list[dict[str, Any]], output_format: str) -> str:
    if output_format == "json":
        return render_json(jobs)
    rows = [
        {
            **job,
            "kind": _KIND_NAMES[job["backend"], job["trainer_type"]],
            **{name: job[name] and short_time(job[name]) for name in ("created_at", "completed_at")},
        }
        for job in jobs
    ]
    return render_rows(rows, _COLUMNS, output_format)


_ACTIONS = {
    "submit": _submit,
    "list": _list,
    "show": _show,
    "logs": _logs,
    "cancel": _cancel,
    "retry": _retry,
    "artifacts": _artifacts,
}
REMOTE_ACTIONS = frozenset(_ACTIONS)
