"""Checks of the machine: devices, memory, open files, clock, port."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tinker_core.errors import ConfigurationError
from tinker_server.config import ServerConfig
from tinker_server.doctor.findings import Finding, fail, ok, warn
from tinker_server.serving import FEW_FILES, OWN_FILES, WANTED_FILES, open_socket

_GIB = 1024**3
_LITTLE_MEMORY = 4 * _GIB
_DEVICE_SECONDS = 120
_ASK_TORCH = (
    "import torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(torch.__version__, n, *{torch.cuda.get_device_name(i) for i in range(n)}, sep='|')"
)


def check_device(device: str, num_ranks: int) -> Iterator[Finding]:
    """That the device is there. torch is asked in a process of its own."""
    if device == "cpu":
        yield ok("device", f"cpu, {os.cpu_count()} cores")
        return
    try:
        asked = subprocess.run(
            [sys.executable, "-P", "-c", _ASK_TORCH],
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEVICE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        yield fail("device", f"torch does not say within {_DEVICE_SECONDS} s what it sees", "check the driver")
        return
    if asked.returncode != 0:
        reason = asked.stderr.strip().rpartition("\n")[2]
        yield fail("device", f"torch cannot be loaded: {reason}", "pip install 'tinker-core[torch]'")
        return
    version, number, *names = asked.stdout.strip().split("|")
    if int(number) < num_ranks:
        yield fail(
            "device",
            f"torch {version} sees {number} CUDA devices; the {num_ranks} ranks of a base model need one each",
            "install a torch with CUDA and its driver, check CUDA_VISIBLE_DEVICES, or choose --device cpu",
        )
        return
    yield ok("device", f"torch {version}, {number} x {', '.join(names)}")


def check_memory(meminfo: Path = Path("/proc/meminfo")) -> Iterator[Finding]:
    """How much memory is free."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        yield warn("memory", "this system does not say how much memory is free", "make sure that the models fit")
        return
    amounts = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    total, free = amounts["MemTotal"], amounts["MemAvailable"]
    text = f"{free / _GIB:.1f} of {total / _GIB:.1f} GiB available"
    if free < _LITTLE_MEMORY:
        yield warn("memory", text, "use a smaller model or a larger machine, or bound --body-memory and --max-models")
    else:
        yield ok("memory", text)


def check_files(max_connections: int) -> Iterator[Finding]:
    """How many files a server may open; it raises its soft limit by itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard >= max_connections + OWN_FILES:
        shown = "unlimited" if hard == resource.RLIM_INFINITY else str(hard)
        yield ok("open files", f"{shown} may be open, --max-connections is {max_connections}")
        return
    text = f"only {hard} may be open, --max-connections is {max_connections}"
    level = fail if hard < FEW_FILES else warn
    yield level("open files", text, f"ulimit -Hn {WANTED_FILES}, or LimitNOFILE={WANTED_FILES} in the systemd unit")


def check_clock(data_dir: Path) -> Iterator[Finding]:
    """That time has not gone back: tokens, links and expiries rely on it."""
    newest = max((path.stat().st_mtime for path in data_dir.glob("*") if path.is_file()), default=0.0)
    ahead = newest - time.time()
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if ahead > 60:
        yield fail("clock", f"{now}, but a file in the data directory is from {ahead:.0f} s later", "set the clock")
    elif time.time() < 1.7e9:
        yield fail("clock", f"{now} cannot be", "set the clock")
    else:
        yield ok("clock", now)


def check_port(config: ServerConfig, is_running: bool) -> Iterator[Finding]:
    """That the port is free, or this server's own."""
    where = f"{config.host} port {config.port}"
    try:
        open_socket(config.host, config.port).close()
    except ConfigurationError as error:
        if is_running:
            yield ok("port", f"{where} is in use, as it should be while the server runs")
        else:
            yield fail("port", str(error), "choose another --host or --port, or stop what listens there")
        return
    yield ok("port", f"{where} is free")
