"""The methods that we add to vLLM's workers; `AsyncLLM.collective_rpc` calls them by name in every worker."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tinker_core.training.peft_format import CONFIG_FILE, WEIGHTS_FILE
from tinker_sampler_vllm.engine import cpu_lora, cpu_seeds
from tinker_sampler_vllm.engine.scores import PromptScorer
from tinker_sampler_vllm.engine.weight_files import HEAD


class WorkerExtension:
    """Mixed into vLLM's worker class; arguments and results are what msgpack can carry."""

    vllm_config: Any
    model_runner: Any
    _tinker_scorer: PromptScorer
    _tinker_weights: dict[int, OpenWeights]

    def tinker_prepare(self) -> dict[str, Any]:
        """Install what watches the steps, and say what this worker can adapt."""
        self._tinker_scorer = PromptScorer(self.model_runner)
        self._tinker_weights = {}
        if self.model_runner.device.type == "cpu":
            cpu_seeds.install(self.model_runner)
        import vllm.lora.punica_wrapper.punica_cpu as wrapper

        manager = self.model_runner.lora_manager._adapter_manager
        return {
            "lora_targets": sorted({name.rsplit(".", 1)[-1] for name in _adaptable(manager)}),
            "cpu_lora_mended": wrapper.bgmv_expand is cpu_lora.bgmv_expand,
            "ties_head": _ties_head(self.model_runner.get_model()),
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
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError) as error:
            return f"{type(error).__name__}: {error}"
        # vLLM passes over what it has no layer for.
        unknown = sorted(set(lora.loras) - _adaptable(adapters)) + sorted(lora.modules_to_save)
        if unknown:
            return f"vLLM cannot adapt {unknown[0]!r} of this model"
        if len(adapters) >= adapters.capacity:
            return f"all {adapters.capacity} places for adapters are taken"
        try:
            adapters.add_adapter(lora)
            adapters.activate_adapter(lora_id)
        except Exception as error:  # it must not stay behind half done, whatever the cause
            manager.remove_adapter(lora_id)
            return f"{type(error).__name__}: {error}"
        return ""

    def tinker_drop_adapter(self, lora_id: int) -> None:
        """Forget an adapter; nobody may be sampling from it."""
        self.model_runner.lora_manager.remove_adapter(lora_id)

    def tinker_open_weights(self, number: int, files: list[str], embedding: str) -> str:
        """Keep full weights within reach under a number; returns why they cannot be, or nothing.

        ``embedding`` names the tensor that is the ``lm_head`` too, and is empty where the two are apart.
        """
        try:
            self._tinker_weights[number] = OpenWeights(files, embedding)
        except (OSError, SafetensorError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def tinker_close_weights(self, number: int) -> None:
        """Let go of full weights; unknown numbers are ignored."""
        self._tinker_weights.pop(number, None)

    def tinker_use_weights(self, number: int) -> None:
        """Put full weights into the model in place of those that are in it; nothing may be running.

        A failure leaves a mixture behind.
        """
        from vllm.config import set_current_vllm_config
        from vllm.model_executor.model_loader.reload.inplace import reload_weights

        # The runner's own method does the same and then drops all adapters, which do not depend on these weights.
        with set_current_vllm_config(self.vllm_config), _no_alarm_about_rotary_embeddings():
            reload_weights(
                self.vllm_config,
                self.model_runner.get_model(),
                weights_iterator=self._tinker_weights[number].tensors(),
                weights_path=None,
                is_checkpoint_format=True,
            )
        self.model_runner.reset_encoder_cache()
        self.model_runner.reset_mm_cache()

    def tinker_take_scores(self, key: str) -> bytes:
        """See `PromptScorer.take`."""
        return self._tinker_scorer.take(key)


class OpenWeights:
    """Safetensors files, mapped into memory for as long as this lives, even if their names are removed meanwhile."""

    def __init__(self, files: list[str], embedding: str) -> None:
        self._files: list[Any] = [safe_open(file, framework="pt", device="cpu") for file in files]
        self._embedding = embedding

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Everything a model loads, by name.

        A tied ``lm_head`` is always there: vLLM keeps a copy of it on CPUs, in a layout of its own, which it makes
        anew only when it is given one.
        """
        for file in self._files:
            for name in file.offset_keys():
                if name == HEAD and self._embedding:
                    continue
                tensor = file.get_tensor(name)
                yield name, tensor
                if name == self._embedding:
                    yield HEAD, tensor


@contextmanager
def _no_alarm_about_rotary_embeddings() -> Iterator[None]:
    """vLLM warns that it "failed to load weights" of these layers, which have none in any file."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")

    def is_alarm(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith("RotaryEmbedding: Failed to load weights")

    logger.addFilter(is_alarm)
    try:
        yield
    finally:
        logger.removeFilter(is_alarm)


def _ties_head(model: torch.nn.Module) -> bool:
    """Whether two layers share the weights of the embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    weights = [module.weight for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    return len({id(weight) for weight in weights}) < len(weights)


def _adaptable(manager: Any) -> set[str]:  # noqa: ANN401
    """The linears that an adapter may change, by their names in the checkpoint as far as vLLM keeps them."""
    names: set[str] = set()
    for name in manager.modules:
        names.update(manager.packed_modules.get(name, (name,)))
    return names
