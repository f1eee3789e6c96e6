"""The SDK's own ``tinker`` command, run in the test process."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from click.testing import CliRunner, Result
from tinker.cli.__main__ import main_cli
from tinker.cli.exceptions import TinkerCliError
from tinker.lib.internal_client_holder import sessionless_holder_cache


@attrs.frozen(kw_only=True)
class TinkerCommand:
    """``tinker`` with an environment that names a server and a key."""

    environment: dict[str, str | None]

    def run(self, *arguments: str, stdin: str | None = None) -> Result:
        """Run a command that may fail."""
        # A command is a process of its own, whose REST client looks at the environment afresh.
        sessionless_holder_cache._holders.clear()
        return CliRunner().invoke(main_cli, arguments, input=stdin, env=self.environment)

    def text(self, *arguments: str, stdin: str | None = None) -> str:
        """What a command that works prints."""
        result = self.run(*arguments, stdin=stdin)
        if result.exception is not None:
            raise AssertionError(f"tinker {' '.join(arguments)}: {result.output}") from result.exception
        return result.stdout

    def json(self, *arguments: str) -> Any:
        """The same as JSON."""
        return json.loads(self.text("--format", "json", *arguments))

    def error(self, *arguments: str, stdin: str | None = None) -> str:
        """What a command that is refused says."""
        error = self.run(*arguments, stdin=stdin).exception
        if not isinstance(error, TinkerCliError):
            pytest.fail(f"tinker {' '.join(arguments)} ended with {error!r}")
        return f"{error.message}\n{error.details or ''}"
