"""The page docs/reference/jobs.md: the API of training jobs, each row with the tests that show it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import jobs_rows
from jobs_rows import EVERY_FIELD, Rows

from tinker_core.extensions import ServiceContext
from tinker_core.plugins import Plugins
from tinker_core.types import BaseModelSpec
from tinker_jobs import recipes, requests
from tinker_jobs.hooks import OPTIONS
from tinker_jobs.records import JobRecord, JobStatus, LogRecord
from tinker_jobs.refs import FrozenCapability, FrozenRefs
from tinker_jobs.service.answers import describe_job, describe_line
from tinker_jobs.service.catalog import describe_model
from tinker_jobs.service.queries import ProgressUpdate
from tinker_jobs.service.routes import JobRoutes
from tinker_jobs.service.tenancy import Tenancy

TESTS = Path(__file__).parents[1] / "tests" / "jobs"
_TYPES = {"Count": ("int", "≥ 1"), "Positive": ("float", "> 0"), "NotNegative": ("float", "≥ 0")}
_NOW = datetime(2026, 1, 1, tzinfo=UTC)

INTRODUCTION = """# Training jobs

`tinker-server` with the package `tinker-jobs` answers clients of hosted training jobs. Paths begin with
`{jobs}` = `/api/v1/org/{organization}/ws/{workspace}/training/jobs`, where organization and workspace are those of
`--jobs-organization` and `--jobs-workspace`, `local` and `default` by themselves. Bodies and answers are JSON; the key
of a server that has keys is sent as `X-API-Key`, and a job exists only for the owner of the key that it was submitted
with.

Refusals are `{"detail": …}`: a text with 401, 404 (what does not exist, or is somebody else's) and 409 (what the job's
status does not allow), and with 422 the list of all mistakes of the request, each with `loc`, `msg` and `type`. Fields
that nobody knows are mistakes. References are resolved when a job is submitted and stay what they were then; one that
cannot be resolved is a mistake of the request. On each row stand the tests that show it.
"""


def page() -> str:
    """The whole page. Raises `LookupError` for a field without a row, a row without a field, or a test that is none."""
    parts = [
        INTRODUCTION,
        *_section("Endpoints", ("endpoint", "takes, answers"), _endpoints(), jobs_rows.ENDPOINTS),
        *_request_section("Request", requests._CreateJobRequest, jobs_rows.REQUEST, every=None),
        *_section("References in it", ("model", "fields"), dict.fromkeys(jobs_rows.REFERENCES), jobs_rows.REFERENCES),
        *_request_section("TinkerSFTJobConfig", requests.TinkerSFTJobConfig, jobs_rows.SFT),
        *_request_section("TinkerRLJobConfig", requests.TinkerRLJobConfig, jobs_rows.RL),
        *_request_section("RayGRPOJobConfig", requests.RayGRPOJobConfig, jobs_rows.GRPO),
        *_section("Rules", ("message", "of trainer"), _messages(), jobs_rows.RULES),
        "Reward recipes: " + ", ".join(f"`{recipe.name}`" for recipe in recipes.BUILT_IN) + ", and those of plugins.",
        "",
        *_section("Job", ("field", "meaning"), describe_job(_job(), _TENANCY), jobs_rows.JOB),
        *_section("Line of a log", ("field", "meaning"), describe_line(_line()), jobs_rows.LINE),
        *_section("Model of the catalog", ("field", "meaning"), _model(), jobs_rows.CATALOG_MODEL),
        *_request_section("Progress of a worker", ProgressUpdate, jobs_rows.PROGRESS, every=None),
    ]
    return "\n".join(parts)


# --- tables -----------------------------------------------------------------------------------------------------------


def _section(title: str, heads: tuple[str, str], fields: Collection[str], rows: Rows) -> list[str]:
    _check(title, fields, rows)
    lines = [f"## {title}", "", f"| {heads[0]} | {heads[1]} | tests |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {_cell(meaning)} | {_links(tests)} |" for name, (meaning, *tests) in rows.items()]
    return [*lines, ""]


def _request_section(title: str, model: type[Any], rows: Rows, every: str | None = EVERY_FIELD) -> list[str]:
    fields = _fields(model)
    _check(title, fields, rows)
    lines = [f"## {title}", "", "| field | type | default | constraint | meaning | tests |", f"|{' --- |' * 6}"]
    for name, (kind, default, constraint) in fields.items():
        meaning, *tests = rows[name]
        links = _links([*([every] if every else []), *tests])
        cells = (f"`{name}`", f"`{_cell(kind)}`", default, constraint, _cell(meaning), links)
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _check(title: str, fields: Collection[str], rows: Rows) -> None:
    if set(fields) != set(rows):
        raise LookupError(f"scripts/jobs_rows.py, {title}: {sorted(set(fields) ^ set(rows))} on one side only")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _links(tests: Sequence[str]) -> str:
    return ", ".join(_link(test) for test in dict.fromkeys(tests))


def _link(test: str) -> str:
    file, _, name = test.partition(":")
    path = TESTS / f"test_jobs_{file}.py"
    if name not in _tests_of(path):
        raise LookupError(
            f"scripts/jobs_rows.py names {test}, which is no test of {path.relative_to(TESTS.parents[1])}"
        )
    return f"[`{name}`](../../tests/jobs/{path.name})"


@cache
def _tests_of(path: Path) -> frozenset[str]:
    return frozenset(re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE))


# --- fields -----------------------------------------------------------------------------------------------------------


def _fields(model: type[Any]) -> dict[str, tuple[str, str, str]]:
    """Type, default and constraint by field, as the source has them."""
    found: dict[str, tuple[str, str, str]] = {}
    (definition,) = ast.parse(inspect.getsource(model)).body
    assert isinstance(definition, ast.ClassDef)
    for statement in definition.body:
        if isinstance(statement, ast.AnnAssign):
            kind, constraint = ast.unparse(statement.annotation).replace("'", '"'), ""
            for alias, (plain, bound) in _TYPES.items():
                if re.search(rf"\b{alias}\b", kind):
                    kind, constraint = re.sub(rf"\b{alias}\b", plain, kind), bound
            found[ast.unparse(statement.target)] = (kind, _default(statement.value), constraint)
    if model is requests._CreateJobRequest:
        for request in requests.REQUEST_KINDS.values():
            for name, (shown, default, _) in _fields(request).items():
                so_far = found.get(name, (shown,))[0]
                found[name] = (so_far if shown in so_far else f"{so_far} | {shown}", default, "")
    return found


def _default(value: ast.expr | None) -> str:
    if value is None:
        return "required"
    text = ast.unparse(value).replace("'", '"')
    made = {"Field(default_factory=list)": "[]", "Field(default_factory=dict)": "{}", "None": "null"}
    return f"`{made.get(text, text)}`"


def _messages() -> list[str]:
    source = ast.parse(inspect.getsource(requests))
    texts = [node.value for node in ast.walk(source) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [text for text in texts if re.search(r" (require|is required|must be 1)", text)]


# --- examples ---------------------------------------------------------------------------------------------------------

_TENANCY = Tenancy(organization="local", workspace="default")


def _job() -> JobRecord:
    capability = FrozenCapability(name="c", version="1", prompt=None, runtime_digest="sha256:00")
    return JobRecord(
        job_id="1",
        owner="me",
        key_id=None,
        server_id="s",
        status=JobStatus.QUEUED,
        request={"model": "m", "backend": "tinker", "trainer_type": "sft", "config": {}},
        refs=FrozenRefs(capability=capability),
        base_model="m",
        created_at=_NOW,
    )


def _line() -> LogRecord:
    return LogRecord(number=1, timestamp=_NOW, level="info", message="m", data={})


def _model() -> Mapping[str, Any]:
    return describe_model(BaseModelSpec(name="m", path=str(TESTS)), is_sampleable=True, context_length=None)


def _endpoints() -> list[str]:
    nothing: Any = None
    context = ServiceContext(
        data_dir=Path("unused"),
        plugins=Plugins.load("core"),
        caller_of=nothing,
        read_body=nothing,
        until_stopping=nothing,
        options={option.name: option.default for option in OPTIONS},
    )
    scope = "/api/v1/org/{organization}/ws/{workspace}/training/jobs"
    routes: list[Any] = list(JobRoutes(context, nothing, nothing, nothing).routes())
    return [
        f"{method} {route.path.replace(scope, '{jobs}')}" for route in routes for method in route.methods - {"HEAD"}
    ]
