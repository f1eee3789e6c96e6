"""Writes docs/reference/cookbook.md from benchmarks/results/cookbook.json; ``--check`` fails if it would change."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "cookbook.json"
PAGE = ROOT / "docs" / "reference" / "cookbook.md"
NOTICE = "<!-- Written by scripts/generate_cookbook_table.py from benchmarks/results/cookbook.json; do not edit. -->"

INTRODUCTION = """\
What was run of the recipes of `tinker-cookbook` {cookbook}, unmodified, against one `tinker-server` process with the
FSDP backend, and whether it learned. [How to use the cookbook](../how-to/use-the-cookbook.md) says how to repeat it.

{model}, float32, on the CPU: {machine}.
With {versions}.

Seconds are those of a driver's run beside whatever else the machine was doing. The trainers pass no seed for adapters
and samples, so figures differ a little from run to run; the data are the same in every run. Learning rates and sizes
are chosen for a small model and a few minutes: the checks show that a recipe learns through this server, not how well.
"""

NOT_RUN = {
    "`sl_basic`, `rl_basic`, `chat_sl`, `preference/dpo`, `distillation`, `prompt_distillation`, `sdft`": """\
trainers of the table with other data, which these recipes load from the Hugging Face hub or make with a large model""",
    "`preference/rlhf`": "preference data from the hub; three trainings in a row with trainers of the table",
    "`multiplayer_rl`, `rl_numerics_check`": """\
not tried: many turns per episode take long on this processor; some want further packages or a second model""",
    "`rubric`, `forecasting`": "a model as judge, or data from the hub",
    "`code_rl`, `harbor_rl`, `search_tool`, `verifiers_rl`": "sandboxes, a search index or further packages",
    "`vlm_classifier`": "images; the served model takes text only",
    "`audio`, and the renderers of Inkling and Kimi K3.1": "`tml-renderers` 0.4.1 is not on the package index",
}
"""Folders and files of tinker_cookbook/recipes, and why they are not in the table."""


def check_row(report: dict[str, Any], check: dict[str, Any], first: bool) -> str:
    """One line of the table; recipe, verdict and seconds stand only in the first line of a recipe."""
    figures = f"{check['before']:.3f} → {check['after']:.3f}"
    head = [f"`{report['recipe']}`", report["runs"]] if first else ["", ""]
    tail = [f"**{report['verdict']}**", str(report["seconds"])] if first else ["", ""]
    return " | ".join(["", *head, check["what"], figures, check["needs"], *tail, ""]).strip()


def report_rows(report: dict[str, Any]) -> list[str]:
    """The lines of one recipe; a recipe that failed has its last line of output instead of figures."""
    if "checks" not in report:
        error = " ".join(report["error"]).replace("|", "\\|")
        return [f"| `{report['driver']}` | {error} | | | | **{report['verdict']}** | {report['seconds']} |"]
    return [check_row(report, check, index == 0) for index, check in enumerate(report["checks"])]


def earlier_attempts(reports: list[dict[str, Any]]) -> list[str]:
    """A section with what was run again after the whole run, what it gave at first, and why."""
    attempts = [attempt for report in reports for attempt in report.get("earlier", [])]
    if not attempts:
        return []
    lines = ["", "## Run again", "", "These rows replace earlier ones of the whole run:", ""]
    for attempt in attempts:
        figures = "; ".join(
            f"{check['what']} {check['before']:.3f} → {check['after']:.3f}, {check['needs']}"
            for check in attempt.get("checks", [])
        )
        lines.append(f"- `{attempt['recipe']}`, {attempt['verdict']}: {figures}. {attempt['reason']}")
    return lines


def make_page() -> str:
    """The whole page."""
    results = json.loads(RESULTS.read_text())
    versions = dict(results["versions"])
    cookbook = versions.pop("tinker-cookbook")
    lines = [NOTICE, "", "# Recipes of the cookbook", ""]
    lines += [
        INTRODUCTION.format(
            cookbook=cookbook,
            model=results["model"],
            machine=results["machine"],
            versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        ),
        "| recipe | what ran | learning check | before → after | asked | verdict | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for report in results["recipes"]:
        lines += report_rows(report)
    lines += earlier_attempts(results["recipes"])
    lines += ["", "## Not run", "", "| recipe | why |", "| --- | --- |"]
    lines += [f"| {recipe} | {why} |" for recipe, why in NOT_RUN.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail if the page is not what would be written")
    parser.add_argument("--strict", action="store_true", help="write the page, and fail if a recipe did not pass")
    args = parser.parse_args()
    page = make_page()
    if not args.check:
        PAGE.write_text(page)
    elif not PAGE.exists() or PAGE.read_text() != page:
        sys.exit(f"{PAGE.relative_to(ROOT)} is out of date; run python scripts/generate_cookbook_table.py")
    reports = json.loads(RESULTS.read_text())["recipes"]
    failed = [report["driver"] for report in reports if report["verdict"] != "passed"]
    if args.strict and failed:
        sys.exit(f"these did not pass: {', '.join(failed)}; see {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
