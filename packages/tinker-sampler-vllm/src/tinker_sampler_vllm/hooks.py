"""Registers the sampler ``vllm``. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from tinker_core.hookspecs import hookimpl
from tinker_core.interfaces import SamplerPlugin
from tinker_core.types import Placement
from tinker_sampler_vllm.options import OPTIONS, VllmOptions

if TYPE_CHECKING:
    from tinker_core.interfaces import OptionValue, Sampler, SamplerContext
    from tinker_core.types import BaseModelSpec


def _build(context: SamplerContext) -> Sampler:
    from tinker_sampler_vllm.build import build_sampler

    return build_sampler(context)


def _check(base_model: BaseModelSpec, device: str, values: Mapping[str, OptionValue]) -> None:
    from tinker_sampler_vllm.installation import check_installation

    options = VllmOptions.read(values, base_model.name, device)
    if options.num_engines:
        check_installation(options.device)


@hookimpl
def tinker_register_sampler(register: Callable[[SamplerPlugin], None]) -> None:
    """Register ``vllm``: engines in processes of their own, on this machine or on others."""
    register(SamplerPlugin(name="vllm", placement=Placement.OWN, build=_build, options=OPTIONS, check=_check))
