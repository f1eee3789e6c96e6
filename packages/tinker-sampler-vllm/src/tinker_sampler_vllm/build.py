"""Puts a sampler together out of what the server and the operator say."""

from __future__ import annotations

import os
import uuid
from functools import partial
from pathlib import Path

from tinker_core.errors import ConfigurationError
from tinker_core.interfaces import SamplerContext
from tinker_sampler_vllm.installation import check_installation
from tinker_sampler_vllm.keeper import EngineKeeper
from tinker_sampler_vllm.links.local import LocalLink
from tinker_sampler_vllm.links.plain import API_KEY_VARIABLE
from tinker_sampler_vllm.links.plain_server import PlainServer
from tinker_sampler_vllm.links.remote import RemoteLink
from tinker_sampler_vllm.options import VllmOptions
from tinker_sampler_vllm.protocol import ClaimCall, EngineSettings
from tinker_sampler_vllm.restarts import REMOTE_PAUSES, Restarts
from tinker_sampler_vllm.sampler import VllmSampler


def build_sampler(context: SamplerContext) -> VllmSampler:
    """A sampler that has not started; raises `ConfigurationError`."""
    options = VllmOptions.read(context.options, context.base_model.name, context.device)
    claim = ClaimCall(
        server=context.server_id or uuid.uuid4().hex,
        base_model=context.base_model.name,
        dtype=context.dtype,
        deterministic=context.deterministic,
    )
    if options.urls and context.deterministic:
        raise ConfigurationError(
            "--vllm-urls: plain vLLM servers cannot be held to equal bits; leave out --deterministic"
        )
    if options.num_engines:
        check_installation(options.device)
    settings = engine_settings(context, options)
    keepers = [
        EngineKeeper(
            name := f"engine {number} of {context.base_model.name!r}",
            partial(LocalLink.start, name, settings, Path(context.directory), claim, options.visible_devices),
        )
        for number in range(options.num_engines)
    ]
    for address in options.workers:
        assert options.secret is not None
        start = partial(RemoteLink.start, address, address, options.secret, claim)
        keepers.append(EngineKeeper(address, start, restarts=Restarts(REMOTE_PAUSES)))
    for url in options.urls:
        server = PlainServer(
            url,
            context.base_model,
            api_key=os.environ.get(API_KEY_VARIABLE),
            max_context_length=context.max_context_length,
        )
        restarts = Restarts(REMOTE_PAUSES)
        keepers.append(
            EngineKeeper(server.url, server.connect, takes_weights=False, check=server.check, restarts=restarts)
        )
    return VllmSampler(keepers, Path(context.memory_directory), context.max_decode_batch)


def engine_settings(context: SamplerContext, options: VllmOptions) -> EngineSettings:
    """What the engines of this machine are told."""
    return EngineSettings(
        base_model=context.base_model,
        device=options.device,
        dtype=context.dtype,
        max_revisions=context.max_revisions,
        max_lora_rank=context.max_lora_rank,
        lora_slots=options.lora_slots,
        max_context_length=context.max_context_length,
        max_decode_batch=context.max_decode_batch,
        deterministic=context.deterministic,
        tensor_parallel=options.tensor_parallel,
        memory_share=options.memory_share,
        kv_cache_bytes=options.kv_cache_bytes,
        eager=options.eager,
    )
