"""What runs in every process of an engine that we start: vLLM loads it as one of its general plugins.

Nothing happens in the processes of other vLLM engines of the same environment.
"""

from __future__ import annotations

import ctypes
import logging
import math
import os
import signal
import sys
from multiprocessing import current_process, parent_process
from typing import Any

from tinker_core.logs import LOG_FORMAT_VARIABLE, configure_logging

ENGINE_VARIABLE = "TINKER_VLLM_ENGINE"
"""Set to the device in the processes that we start."""

_PR_SET_PDEATHSIG = 1
_done = False


def prepare() -> None:
    """Tie the process to its parent, and mend what vLLM does differently than our users expect."""
    global _done
    device = os.environ.get(ENGINE_VARIABLE)
    if device is None or _done:
        return
    _done = True
    end_with_parent()
    _log_as_json_if_asked()
    _take_any_temperature()
    _adapt_every_head()
    if device == "cpu":
        _mend_cpu_lora()


def end_with_parent() -> None:
    """Have the kernel end this process with its parent: a lost engine must not leave half of itself behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = parent_process()
    if parent is not None and parent.pid != os.getppid():
        os._exit(1)  # it ended before the kernel was asked


def _log_as_json_if_asked() -> None:
    """vLLM's lines are for people, and it would put a prefix before ours."""
    if os.environ.get(LOG_FORMAT_VARIABLE) != "json":
        return
    if parent_process() is not None:
        configure_logging("json", process=current_process().name)
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])


def _take_any_temperature() -> None:
    """vLLM lifts temperatures below 0.01 to that without a word, and refuses those above 2; ours are honoured."""
    import vllm.sampling_params as module

    if not hasattr(module, "_MAX_TEMP"):
        raise RuntimeError("this vLLM bounds temperatures in another way than the one that this package is for")
    module._MAX_TEMP = 0.0
    verify = module.SamplingParams._verify_args

    def verify_all_but_high_temperatures(params: Any) -> None:  # noqa: ANN401 - vLLM is not typed
        temperature = params.temperature
        if math.isfinite(temperature) and temperature > 1.0:
            params.temperature = 1.0
        try:
            verify(params)
        finally:
            params.temperature = temperature

    module.SamplingParams._verify_args = verify_all_but_high_temperatures


def _adapt_every_head() -> None:
    from tinker_sampler_vllm.engine import head_lora

    head_lora.apply()


def _mend_cpu_lora() -> None:
    import vllm.lora.ops.torch_ops.lora_ops as operations
    import vllm.lora.punica_wrapper.punica_cpu as wrapper

    from tinker_sampler_vllm.engine import cpu_lora, cpu_slots

    cpu_lora.apply_to((operations, wrapper))
    cpu_slots.install()
