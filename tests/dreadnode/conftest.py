"""The unmodified dreadnode client, in its own environment, against a real server with the service ``jobs``."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import pytest

from tests.e2e.conftest import run_server
from tests.models import write_tiny_model
from tinker_server.cli import main

MODEL = "local/tiny"
CAPABILITY = "helper@1.0.0"
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@attrs.frozen
class Dreadnode:
    """The client and the server that it is told about."""

    python: Path
    url: str

    def command(self, *arguments: str, status: int = 0) -> str:
        """What ``dreadnode train …`` prints, on one line."""
        command = [str(self.python.parent / "dreadnode"), "train", *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=self._environment(), timeout=600
        )
        assert done.returncode == status, (arguments, done.stdout, done.stderr)
        return " ".join(_COLOUR.sub("", done.stdout + done.stderr).split())

    def json(self, *arguments: str) -> Any:
        """The same with ``--json``."""
        return json.loads(self.command(*arguments, "--json"))

    def calls(self, *calls: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What calls of the SDK give, in order, made in one process."""
        script = Path(__file__).with_name("client_calls.py")
        done = subprocess.run(
            [str(self.python), str(script)],
            input=json.dumps(calls),
            capture_output=True,
            text=True,
            check=False,
            env=self._environment(),
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        answers: list[dict[str, Any]] = json.loads(done.stdout)
        return answers

    def results(self, *calls: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The same for calls that all work."""
        answers = self.calls(*calls)
        assert [answer for answer in answers if "error" in answer] == []
        return [answer["result"] for answer in answers]

    def _environment(self) -> dict[str, str]:
        return {
            **{name: value for name, value in os.environ.items() if not name.startswith("DREADNODE_")},
            "DREADNODE_SERVER": self.url,
            "DREADNODE_API_KEY": "tml-local",
            "DREADNODE_ORGANIZATION": "local",
            "DREADNODE_WORKSPACE": "default",
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }


def call(method: str, *positional: str, request: Mapping[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """One call for `Dreadnode.calls`."""
    made = {} if request is None else {"request": request}
    return {"method": method, "positional": positional, "arguments": arguments, **made}


@pytest.fixture(scope="session")
def dreadnode_python() -> Path:
    found = os.environ.get("TINKER_DREADNODE_PYTHON")
    if not found:
        pytest.skip("no environment with the dreadnode client: run nox -s dreadnode, or set TINKER_DREADNODE_PYTHON")
    return Path(found)


@pytest.fixture(scope="session")
def dreadnode(dreadnode_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dreadnode]:
    root = tmp_path_factory.mktemp("dreadnode")
    model = write_tiny_model(root / "tiny", "llama", tie=True, max_context=512)
    data = root / "data"
    _add_data(root, data)
    flags = ["--base-model", f"{MODEL}={model}", "--data-dir", str(data), "--backend", "fsdp"]
    with run_server(*flags, "--jobs-max-running", "1") as url:
        yield Dreadnode(dreadnode_python, url)


def _add_data(root: Path, data: Path) -> None:
    rows = [{"prompt": f"What is {n} and 1?", "answer": str(n + 1)} for n in range(8)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "prompt.md").write_text("Answer briefly.\n")
    (root / "task.yaml").write_text("instruction: Say a number.\n")
    for arguments in (
        ("add-dataset", "sums@1.0.0", str(root / "rows.jsonl")),
        ("add-capability", CAPABILITY, str(root / "prompt.md")),
        ("add-task", "counting@1.0.0", str(root / "task.yaml")),
    ):
        assert main(["jobs", *arguments, "--data-dir", str(data)]) == 0


def options(**values: Any) -> Sequence[str]:
    """Flags of the command."""
    return [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
