"""The releases of the tinker SDK under test, each unpacked in a directory of its own that PYTHONPATH selects."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".cache" / "sdk"
HASHES: dict[str, str] = dict(
    line.split()
    for line in (Path(__file__).parent / "releases.txt").read_text().splitlines()
    if not line.startswith("#")
)
"""SHA-256 of each release's wheel, oldest release first."""
RELEASES = tuple(HASHES)

SMOKE = ("0.3.0", "0.16.1", "0.18.2", "0.24.1", "0.25.0", "0.38.0")
"""Where the wire changed most; part of the default test command."""

REPRESENTATIVE = (
    "0.3.0",
    "0.8.1",
    "0.16.1",
    "0.18.2",
    "0.22.0",
    "0.24.1",
    "0.25.0",
    "0.27.2",
    "0.33.1",
    "0.36.0",
    "0.38.0",
)
"""One release for every way of talking that there has been."""

_INSTALLING = threading.Lock()


def directory(release: str) -> Path:
    """Where a release's packages lie once installed."""
    return INSTALLED / release


def install(release: str) -> Path:
    """Unpack one release's wheel, without its dependencies, unless it is there; pip checks the hash."""
    with _INSTALLING:
        return _install(release)


def _install(release: str) -> Path:
    target = directory(release)
    if target.exists():
        return target
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=INSTALLED) as scratch:
        requirement = Path(scratch) / "requirement.txt"
        requirement.write_text(f"tinker=={release} --hash=sha256:{HASHES[release]}\n")
        fresh = Path(scratch) / "fresh"
        options = ["--quiet", "--no-deps", "--no-cache-dir", "--require-hashes", "--only-binary=:all:"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(fresh), "-r", str(requirement)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"cannot install release {release} of the SDK:\n{done.stderr}")
        fresh.rename(target)
    return target
