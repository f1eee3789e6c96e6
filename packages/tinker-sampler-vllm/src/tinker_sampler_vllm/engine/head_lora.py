"""Adapters on the ``lm_head`` of every model whose logits vLLM computes in the usual way.

vLLM 0.32 offers them only where the class of a model says so, and Qwen2's, for one, does not; what it needs is the same
everywhere.
"""

from __future__ import annotations

from typing import Any

_MAX_VOCABULARY = 258048
"""vLLM adapts no larger head."""


def apply() -> None:
    """Have models say so as vLLM prepares them for adapters."""
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    load = LoRAModelRunnerMixin.load_lora_model

    def load_with_head(runner: Any, model: Any, *rest: Any) -> Any:  # noqa: ANN401 - vLLM is not typed
        if _has_usual_head(model):
            model.embedding_modules = {**model.embedding_modules, "lm_head": "output_embeddings"}
        return load(runner, model, *rest)

    LoRAModelRunnerMixin.load_lora_model = load_with_head


def _has_usual_head(model: Any) -> bool:  # noqa: ANN401
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.interfaces import supports_lora

    return (
        supports_lora(model)
        and isinstance(getattr(model, "lm_head", None), ParallelLMHead)
        and isinstance(getattr(model, "logits_processor", None), LogitsProcessor)
        and model.logits_processor.vocab_size <= _MAX_VOCABULARY
    )
