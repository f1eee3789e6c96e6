"""Tinker paths: ``tinker://<run>/<kind>/<name>``."""

from __future__ import annotations

import re

import attrs

from tinker_core.errors import InvalidRequestError, InvalidTinkerPathError
from tinker_core.types.enums import CheckpointType

_SCHEME = "tinker://"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+@-]{0,254}")


def check_checkpoint_name(name: str) -> str:
    """The name itself, or `InvalidRequestError` when it could not be one path segment."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequestError(
            f"checkpoint name {name!r} is not allowed; use 1 to 255 letters, digits and ._=+@- without '..', "
            "beginning with a letter, a digit or _"
        )
    return name


@attrs.frozen(kw_only=True)
class TinkerPath:
    """The address of a checkpoint."""

    run_id: str
    """The id of the model that was saved."""
    kind: CheckpointType
    name: str

    @property
    def checkpoint_id(self) -> str:
        """``kind/name``, unique within a run."""
        return f"{self.kind.value}/{self.name}"

    def __str__(self) -> str:
        return f"{_SCHEME}{self.run_id}/{self.checkpoint_id}"

    @classmethod
    def parse(cls, text: str) -> TinkerPath:
        """Parse a path; raises `InvalidTinkerPathError` that says what is wrong with it."""
        if not text.startswith(_SCHEME):
            raise InvalidTinkerPathError(text, f"it must begin with {_SCHEME}")
        segments = text.removeprefix(_SCHEME).split("/")
        if len(segments) != 3 or not all(segments):
            raise InvalidTinkerPathError(text, "it must have three segments, tinker://<run>/<kind>/<name>")
        run_id, kind, name = segments
        kinds = [known.value for known in CheckpointType]
        if kind not in kinds:
            raise InvalidTinkerPathError(text, f"kind {kind!r} is not one of {', '.join(kinds)}")
        try:
            check_checkpoint_name(name)
        except InvalidRequestError as error:
            raise InvalidTinkerPathError(text, str(error)) from error
        return cls(run_id=run_id, kind=CheckpointType(kind), name=name)
