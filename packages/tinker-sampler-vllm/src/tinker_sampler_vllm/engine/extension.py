"""The methods that we add to vLLM's workers; `AsyncLLM.collective_rpc` calls them by name in every worker."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tinker_core.training.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tinker_sampler_vllm.engine import cpu_lora
from tinker_sampler_vllm.engine.scores import PromptScorer


class WorkerExtension:
    """Mixed into vLLM's worker class; arguments and results are what msgpack can carry."""

    model_runner: Any
    _tinker_scorer: PromptScorer

    def tinker_prepare(self) -> dict[str, Any]:
        """Install what watches the steps, and say what this worker can adapt."""
        self._tinker_scorer = PromptScorer(self.model_runner)
        import vllm.lora.punica_wrapper.punica_cpu as wrapper

        manager = self.model_runner.lora_manager._adapter_manager
        return {
            "lora_targets": sorted({name.rsplit(".", 1)[-1] for name in _adaptable(manager)}),
            "cpu_lora_mended": wrapper.bgmv_expand is cpu_lora.bgmv_expand,
        }

    def tinker_load_adapter(self, lora_id: int, directory: str) -> str:
        """Take an adapter out of a PEFT directory; returns why it cannot be, or nothing.

        A failure is no exception: those would reach the engine as its own.
        """
        from vllm.lora.peft_helper import PEFTHelper

        manager = self.model_runner.lora_manager
        adapters = manager._adapter_manager
        try:
            config = json.loads((Path(directory) / CONFIG_FILE).read_text(encoding="utf-8"))
            helper = PEFTHelper.from_dict(config)
            helper.validate_legal(manager.lora_config)
            mapper = getattr(adapters.model, "hf_to_vllm_mapper", None)
            lora = manager._lora_model_cls.from_lora_tensors(
                lora_model_id=lora_id,
                tensors=load_file(Path(directory) / WEIGHTS_FILE),
                peft_helper=helper,
                device="cpu",
                dtype=manager.lora_config.lora_dtype,
                model_vocab_size=manager.vocab_size,
                weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
            )
        except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        # vLLM passes over what it has no layer for.
        unknown = sorted(set(lora.loras) - _adaptable(adapters))
        if unknown:
            return f"vLLM cannot adapt {unknown[0]!r} of this model"
        if len(adapters) >= adapters.capacity:
            return f"all {adapters.capacity} places for adapters are taken"
        adapters.add_adapter(lora)
        adapters.activate_adapter(lora_id)
        return ""

    def tinker_drop_adapter(self, lora_id: int) -> None:
        """Forget an adapter; nobody may be sampling from it."""
        self.model_runner.lora_manager.remove_adapter(lora_id)

    def tinker_take_scores(self, key: str) -> bytes:
        """See `PromptScorer.take`."""
        return self._tinker_scorer.take(key)


def _adaptable(manager: Any) -> set[str]:  # noqa: ANN401
    """The linears that an adapter may change, by their names in the checkpoint as far as vLLM keeps them."""
    names: set[str] = set()
    for name in manager.modules:
        names.update(manager.packed_modules.get(name, (name,)))
    return names
