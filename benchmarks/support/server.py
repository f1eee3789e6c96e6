"""A real ``tinker-server`` process for the length of a block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_READY = re.compile(r"tinker-server ready on (\S+)")


@contextmanager
def running_server(model: Path, data_dir: Path, *flags: str, name: str | None = None) -> Iterator[str]:
    """Start a server for one base model and yield its URL once it is ready."""
    spec = f"{name}={model}" if name else str(model)
    command = [_script("tinker-server"), "--base-model", spec, "--port", "0", "--data-dir", str(data_dir), *flags]
    with running(command, _READY) as url:
        yield url


@contextmanager
def running(command: Sequence[str], ready: re.Pattern[str]) -> Iterator[str]:
    """Run a command; yield what ``ready`` captures from its standard error, and stop it afterwards."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := ready.search(line):
                break
        else:
            raise RuntimeError(f"{command[0]} did not start:\n{''.join(lines[-30:])}")
        threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
        yield found.group(1)
    finally:
        process.terminate()
        process.wait(timeout=60)


def _pass_on(process: subprocess.Popen[str]) -> None:
    """Keep the pipe empty; show warnings and errors only."""
    assert process.stderr is not None
    for line in process.stderr:
        if "WARNING" in line or "ERROR" in line:
            sys.stderr.write(line)


def _script(name: str) -> str:
    return str(Path(sys.executable).parent / name)
