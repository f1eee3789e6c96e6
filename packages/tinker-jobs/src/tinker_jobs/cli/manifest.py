"""A job's request from a YAML or JSON file, and from flags."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import yaml

from tinker_jobs.cli.flags import KINDS, apply_flags
from tinker_jobs.cli.parsing import JobsCommandError

STANDARD_INPUT = "-"


def make_request(source: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The request of ``source``, a kind of job or a manifest, with the fields that flags set in place of its own.

    Whether it describes a job is for the server to say. Raises `JobsCommandError` for a manifest that cannot be read.
    """
    if source in KINDS:
        backend, trainer_type = KINDS[source]
        return apply_flags({"backend": backend, "trainer_type": trainer_type, "config": {}}, given)
    return apply_flags(read_manifest(source), given)


def read_manifest(source: str) -> dict[str, Any]:
    """A manifest, which is an object in YAML, and so perhaps in JSON; raises `JobsCommandError`."""
    try:
        text = sys.stdin.read() if source == STANDARD_INPUT else Path(source).read_text(encoding="utf-8")
        manifest = yaml.safe_load(text)
    except FileNotFoundError as error:
        kinds = ", ".join(KINDS)
        raise JobsCommandError(f"there is no manifest {source!r}; give a file, {STANDARD_INPUT}, or {kinds}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise JobsCommandError(f"cannot read the manifest {source!r}: {error}") from error
    if not isinstance(manifest, dict):
        raise JobsCommandError(f"the manifest {source!r} must be an object with backend, trainer_type, config and more")
    try:
        orjson.dumps(manifest)
    except orjson.JSONEncodeError as error:
        raise JobsCommandError(f"the manifest {source!r} holds a value that JSON has no form for: {error}") from error
    return manifest
