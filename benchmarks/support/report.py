"""How a benchmark ends: one JSON object on the last line."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping

import torch


def describe_machine(device: str) -> str:
    """The processor or GPU that the figures belong to."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, OMP_NUM_THREADS={threads}"


def report(benchmark: str, device: str, results: Mapping[str, object]) -> None:
    """Print the result line."""
    print(
        json.dumps(
            {
                "benchmark": benchmark,
                "machine": describe_machine(device),
                "python": platform.python_version(),
                "torch": torch.__version__,
                **results,
            }
        )
    )
