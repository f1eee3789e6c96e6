"""Why a request about jobs is refused, and why a job fails."""

from __future__ import annotations

from collections.abc import Sequence

import attrs

from tinker_core.errors import InvalidRequestError, UserError


@attrs.frozen(kw_only=True)
class Mistake:
    """One thing that is wrong with a request."""

    loc: tuple[str | int, ...]
    """Where, such as ``("body", "config", "dataset_ref")``."""
    msg: str
    type: str = "value_error"
    """In pydantic's words; this one is what a rule of our own has."""

    @classmethod
    def in_body(cls, msg: str, *path: str | int) -> Mistake:
        """Something wrong at a path of the request's body."""
        return cls(loc=("body", *path), msg=msg)

    @classmethod
    def in_config(cls, msg: str, *path: str | int) -> Mistake:
        """Something wrong at a path of the trainer's settings."""
        return cls.in_body(msg, "config", *path)


class JobRequestError(InvalidRequestError):
    """A request that describes no job that could run here; answered with 422 and every mistake."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("; ".join(f"{'.'.join(map(str, one.loc))}: {one.msg}" for one in mistakes))
        self.mistakes = tuple(mistakes)

    def __reduce__(self) -> tuple[type[JobRequestError], tuple[Sequence[Mistake]]]:
        return type(self), (self.mistakes,)


class LibraryError(UserError):
    """What the data directory lacks or cannot take: a dataset, capability, task or world, or a part of one."""


class UnknownJobError(UserError, LookupError):
    """A job that does not exist, or belongs to somebody else."""

    def __init__(self) -> None:
        super().__init__("Training job not found")


class JobStateError(UserError):
    """Something that a job's status does not allow; answered with 409."""


class JobFailedError(UserError):
    """Why a job cannot go on, in words for whoever submitted it; raised in the job's process."""


class CancelledJobError(Exception):
    """Raised in the job's process at the next step after it was asked to stop."""
