"""CPUs only, a last resort: lets Megatron-Core run where it asks for a CUDA device by name.

Megatron-Core writes ``device=torch.cuda.current_device()`` and ``device="cuda"`` into the exchange between pipeline
stages, sequence parallelism and mixtures of experts.  Here the modules that do so get a ``torch`` of their own, in
which these mean the CPU; everything else in it is torch itself.  torch is not changed: other code, torch's own
included, finds ``torch.cuda`` as it was.  Only `loading` imports this module, and only for a world that needs it.
"""

from __future__ import annotations

import importlib
import logging
from types import ModuleType
from typing import Any

import torch

from tinker_core.errors import ConfigurationError

log = logging.getLogger(__name__)

CPU_MODULES = (
    "megatron.core.pipeline_parallel.p2p_communication",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.tensor_parallel.mappings",
    "megatron.core.utils",
)
"""Those of Megatron-Core that see the CPU as their CUDA device."""


class _CpuCuda(ModuleType):
    """``torch.cuda`` with the CPU as its current device."""

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever torch has there
        return getattr(torch.cuda, name)

    @staticmethod
    def current_device() -> torch.device:
        return torch.device("cpu")

    @staticmethod
    def synchronize(device: object = None) -> None:
        """Nothing runs behind the caller's back on a CPU."""


class _CpuTorch(ModuleType):
    """``torch`` with such a ``cuda``."""

    cuda = _CpuCuda("torch.cuda")

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever torch has there
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **settings: Any) -> torch.Tensor:  # noqa: ANN401 - torch's own arguments
        return torch.zeros(*size, device="cpu" if device == "cuda" else device, **settings)


def install(reason: str, *, announce: bool) -> None:
    """Give Megatron-Core's modules that torch, for as long as the process lives; a second call does nothing.

    For good and not only around some calls: backward runs the same modules from wherever autograd is started.
    Raises `ConfigurationError` where CUDA exists.
    """
    if torch.cuda.is_available():
        raise ConfigurationError(
            f"{reason} on CPUs needs a replacement of torch.cuda, which is refused on a machine that has CUDA; "
            "use --device cuda, or set CUDA_VISIBLE_DEVICES= to hide the devices"
        )
    modules = [importlib.import_module(name) for name in CPU_MODULES]
    if all(isinstance(module.torch, _CpuTorch) for module in modules):
        return
    cpu_torch = _CpuTorch("torch")
    for module in modules:
        module.torch = cpu_torch  # type: ignore[attr-defined]
    if announce:
        log.warning("%s: Megatron-Core takes the CPU for its CUDA device (cpu_shim); for tests, not for speed", reason)
