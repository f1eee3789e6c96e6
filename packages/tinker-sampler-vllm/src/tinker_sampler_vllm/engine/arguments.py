"""Our settings as the arguments of a vLLM engine."""

from __future__ import annotations

from typing import Any

from tinker_core.errors import ConfigurationError
from tinker_sampler_vllm.protocol import EngineSettings

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The greatest ranks that vLLM can be started with; adapters of lower rank fit too."""
MAX_TOPK = 64
_CPU_KV_CACHE_BYTES = 1024**3


def rank_limit(wanted: int) -> int:
    """The smallest limit of vLLM's that covers a rank; raises `ConfigurationError` beyond the greatest."""
    for limit in LORA_RANKS:
        if limit >= wanted:
            return limit
    raise ConfigurationError(f"vLLM serves adapters up to rank {LORA_RANKS[-1]}; lower --max-lora-rank from {wanted}")


def engine_arguments(settings: EngineSettings) -> Any:  # noqa: ANN401 - vLLM is not typed
    """``vllm.AsyncEngineArgs`` of an engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    on_cpu = settings.device == "cpu"
    optional: dict[str, Any] = {}
    if settings.memory_share is not None:
        optional["gpu_memory_utilization"] = settings.memory_share
    kv_cache_bytes = settings.kv_cache_bytes or (_CPU_KV_CACHE_BYTES if on_cpu else None)
    if kv_cache_bytes is not None:
        optional["kv_cache_memory_bytes"] = kv_cache_bytes
    if settings.max_context_length is not None:
        optional["max_model_len"] = settings.max_context_length
    return AsyncEngineArgs(
        model=settings.base_model.path,
        served_model_name=settings.base_model.name,
        dtype=settings.dtype,
        seed=0,
        skip_tokenizer_init=True,
        generation_config="vllm",  # the model's own defaults for temperature and the like are not the client's
        logprobs_mode="raw_logprobs",
        max_logprobs=MAX_TOPK,
        enable_lora=True,
        max_loras=min(settings.lora_slots, settings.max_revisions),
        max_cpu_loras=settings.max_revisions,
        max_lora_rank=rank_limit(settings.max_lora_rank),
        max_num_seqs=1 if settings.deterministic else settings.max_decode_batch,
        enable_prefix_caching=not settings.deterministic,
        enforce_eager=on_cpu if settings.eager is None else settings.eager,
        tensor_parallel_size=settings.tensor_parallel,
        worker_extension_cls="tinker_sampler_vllm.engine.extension.WorkerExtension",
        disable_log_stats=True,
        **optional,
    )
