"""Which device ``--device auto`` means, found out without loading torch into the server."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def choose_device(wanted: str, environment: Mapping[str, str], device_files: Path = Path("/dev")) -> str:
    """``wanted`` itself, or for ``"auto"`` cuda when an NVIDIA device is present and not hidden, else cpu."""
    if wanted != "auto":
        return wanted
    if environment.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "cpu"
    present = any(device_files.glob("nvidia[0-9]*")) or (device_files / "dxg").exists()
    return "cuda" if present else "cpu"
