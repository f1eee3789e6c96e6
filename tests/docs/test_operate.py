"""The page for operators names what there is."""

from __future__ import annotations

import re
from pathlib import Path

from tinker_core.logs import FIELDS, JsonFormatter
from tinker_server.config import flag_of, settings
from tinker_server.doctor.findings import Finding
from tinker_server.metric_families import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs/how-to/operate.md").read_text()


def test_every_metric_of_the_page_is_served() -> None:
    served = {family.shown_name for family in FAMILIES}
    served |= {f"{family.name}_count" for family in FAMILIES if family.kind == "histogram"}
    named = set(re.findall(r"\btinker_[a-z_]+\b", PAGE)) - {"tinker_server", "tinker_core", "tinker_sampler_vllm"}
    assert len(named) > 10
    assert named <= served


def test_every_alarm_is_explained_and_none_else() -> None:
    defined = re.findall(r"- alert: (\w+)", PAGE)
    explained = re.findall(r"^\| `(Tinker\w+)` \|", PAGE, re.MULTILINE)
    assert defined == explained


def test_every_field_of_the_log_is_explained() -> None:
    section = PAGE.split("## Read the log")[1].split("\n## ")[0]
    assert set(FIELDS) <= set(re.findall(r"`(\w+)`", section))
    assert JsonFormatter.__doc__


def test_every_flag_of_the_page_exists() -> None:
    known = {flag_of(name) for name in settings()}
    known |= {"--base-model", "--no-supervisor", "--systemd", "--json", "--help", "--now", "--upgrade"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", PAGE)) <= known


def test_findings_have_the_levels_that_the_page_names() -> None:
    assert all(f"`{level}`" in PAGE for level in ("ok", "warn", "fail"))
    assert Finding.__doc__
