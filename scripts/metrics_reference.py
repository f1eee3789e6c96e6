"""The page of docs/reference/ about metrics, from the code."""

from __future__ import annotations

from tinker_server.metric_families import FAMILIES
from tinker_server.metrics import PATH


def page() -> str:
    """Every metric with its type and labels."""
    lines = ["# Metrics", "", f"`GET {PATH}` answers in the text format of Prometheus.", ""]
    lines += ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        labels = ", ".join(f"`{label}`" for label in family.labels)
        lines.append(f"| `{family.shown_name}` | {family.kind} | {labels} | {family.text} |")
    lines += [
        "",
        "The `process_…` metrics of the Prometheus client library (memory, CPU time, open files) are served beside",
        "them.",
        "",
        "No label says anything about a user: there are base models, types of requests, templates of routes, and the",
        "names of unknown fields, of which only the first 100 that look like names are told apart. They are totals",
        "of all users together. A server that has API keys demands one here too, as `X-API-Key` or as a bearer token.",
        "",
    ]
    return "\n".join(lines)
