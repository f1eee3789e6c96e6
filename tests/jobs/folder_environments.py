"""A provider of environments: folders of this machine, in which a policy's replies are shell commands."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tinker_core import hookimpl
from tinker_core.rewards import CommandResult, EnvironmentPlugin, Observation

OPENED: list[Folder] = []


class Folder:
    """Keeps what it was opened with, the threads that used it, and how often it was closed."""

    def __init__(self, task: Mapping[str, object], inputs: Mapping[str, object], seconds: float) -> None:
        if inputs.get("broken"):
            raise OSError("no space left")
        self.inputs, self.seconds = inputs, seconds
        self.num_closed = 0
        self.threads = {threading.get_ident()}
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name)
        (self.path / "begin.txt").write_text(str(inputs.get("word", "")))
        check = self.path / "check.sh"
        check.write_text("#!/bin/sh\ntest -s said.txt\n")
        check.chmod(0o755)
        OPENED.append(self)

    def act(self, message: str) -> Observation:
        self.threads.add(threading.get_ident())
        if message == "crash":
            raise ConnectionError("container is gone")
        (self.path / "said.txt").write_text("" if message.endswith("# no trace") else message)
        done = subprocess.run(["sh", "-c", message], cwd=self.path, capture_output=True, text=True)
        return Observation(text=done.stdout + done.stderr, finished=message.startswith("exit"))

    def run(self, command: Sequence[str], timeout: float) -> CommandResult:
        self.threads.add(threading.get_ident())
        try:
            done = subprocess.run(command, cwd=self.path, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        return CommandResult(exit_code=done.returncode, output=done.stdout)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        self.num_closed += 1
        self._folder.cleanup()


@hookimpl
def tinker_register_environment(register: Callable[[EnvironmentPlugin], None]) -> None:
    register(EnvironmentPlugin(name="folder", open=Folder))
