"""How commands report what cannot work: one line and an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec

from tinker_core.errors import ConfigurationError, StorageError, TinkerError

_P = ParamSpec("_P")


def reporting_failures(command: Callable[_P, int]) -> Callable[_P, int]:
    """A command that answers deliberate errors with 2 for settings that cannot work, and 1 otherwise."""

    @functools.wraps(command)
    def run(*args: _P.args, **kwargs: _P.kwargs) -> int:
        try:
            return command(*args, **kwargs)
        except TinkerError as error:
            sys.stderr.write(f"tinker-server: {error}\n")
            return 2 if isinstance(error, ConfigurationError | StorageError) else 1

    return run
