"""The environment variables of an engine process and its children."""

from __future__ import annotations

from collections.abc import Mapping

from tinker_core.logs import LOG_FORMAT_VARIABLE
from tinker_sampler_vllm.engine.in_vllm import ENGINE_VARIABLE

_ALWAYS = {
    "HF_HUB_OFFLINE": "1",  # base models are directories; whoever names a hub model has it in the cache
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    # The answers about prompts hook into this runner; it runs on every device.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}
_LOOPBACK = {"VLLM_HOST_IP": "127.0.0.1", "VLLM_LOOPBACK_IP": "127.0.0.1"}
"""Its own sockets stay on this machine."""
_CPU = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    # Without it the first sample waits tens of seconds for a compiler, and gains nothing.
    "TORCHDYNAMO_DISABLE": "1",
}
_OURS_TO_SAY = ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_WORKER_MULTIPROC_METHOD")


def engine_environment(device: str, inherited: Mapping[str, str]) -> dict[str, str]:
    """All variables of an engine process: what the operator has set goes before our defaults."""
    defaults = _ALWAYS | _LOOPBACK | (_CPU if device == "cpu" else {})
    ours = {name: _ALWAYS[name] for name in _OURS_TO_SAY}
    if inherited.get(LOG_FORMAT_VARIABLE) == "json":
        ours["VLLM_CONFIGURE_LOGGING"] = "0"  # it goes through our own log
    return {**defaults, **inherited, **ours, ENGINE_VARIABLE: device}
