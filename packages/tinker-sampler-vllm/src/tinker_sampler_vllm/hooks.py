"""Registers the sampler ``vllm``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import SamplerPlugin
from tinker_core.types import Placement
from tinker_sampler_vllm.options import OPTIONS

if TYPE_CHECKING:
    from tinker_core.interfaces import Sampler, SamplerContext


def _build(context: SamplerContext) -> Sampler:
    from tinker_sampler_vllm.build import build_sampler

    return build_sampler(context)


@hookimpl
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register ``vllm``: engines in processes of their own, on this machine or on others."""
    register(SamplerPlugin(name="vllm", placement=Placement.OWN, build=_build, options=OPTIONS))
