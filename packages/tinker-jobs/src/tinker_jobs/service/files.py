"""Files that a job made for people to look at, such as plots."""

from __future__ import annotations

import mimetypes
import os
import stat
from pathlib import Path

from starlette.responses import FileResponse, Response

from tinker_core.errors import UserError
from tinker_jobs.protocol import FILES

_HEADERS = {
    # An SVG may hold scripts, and trainers of plugins may draw what others wrote.
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
    "x-content-type-options": "nosniff",
}


class UnknownFileError(UserError, LookupError):
    """A file that a job does not have."""

    def __init__(self) -> None:
        super().__init__("Training job file not found")


def send_file(directory: Path, name: str) -> Response:
    """A regular file of a job's folder; raises `UnknownFileError` for everything else, links among it."""
    if name in ("", ".", "..") or "/" in name or "\0" in name or os.sep in name:
        raise UnknownFileError
    path = directory / FILES / name
    try:
        found = path.lstat()
    except (OSError, ValueError) as error:
        raise UnknownFileError from error
    if not stat.S_ISREG(found.st_mode):
        raise UnknownFileError
    kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
    return FileResponse(path, stat_result=found, media_type=kind, headers=_HEADERS)
