"""A vLLM sampler without trainer or server, and what Hugging Face says of the same weights."""

from __future__ import annotations

import asyncio
import itertools
import tempfile
import threading
import warnings
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import attrs
import numpy as np
import numpy.typing as npt

from tests.models import write_tiny_model
from tests.vllm.conftest import HIDDEN_SIZE
from tinker_core.interfaces import SamplerContext
from tinker_core.types import (
    BaseModelSpec,
    ModelInput,
    PreparedSample,
    SampleInput,
    SampleOutput,
    SamplingParams,
    StopCondition,
    Transport,
    WeightsRef,
)

_T = TypeVar("_T")
CONTEXT = 512
RANKS = (2, 4, 8, 16)
LONG_PROMPT = np.random.default_rng(11).integers(4, 100, 300).tolist()
"""Several blocks of the cache, which has 128 tokens in each on CPUs."""
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")


class LoneSampler:
    """A `Sampler` on an event loop of its own, behind blocking calls."""

    def __init__(self, sampler: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.sampler = sampler
        self._loop = loop
        self._ids = itertools.count()

    def run(self, work: Coroutine[Any, Any, _T]) -> Future[_T]:
        """Run something on the sampler's event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def publish(self, revision: str, directory: Path) -> None:
        """Have a directory copied and served."""
        ref = WeightsRef(transport=Transport.FILE, directory=str(directory))
        self.run(self.sampler.publish(revision, ref)).result(timeout=120)

    def retire(self, revision: str) -> None:
        """Take a revision away."""
        self.run(self.sampler.retire(revision)).result(timeout=120)

    def request(self, revision: str | None, prompt: Sequence[int], **fields: Any) -> PreparedSample:
        """A sample of 8 tokens; fields of `SamplingParams` and of `SampleInput` both go by name."""
        names = {field.name for field in attrs.fields(SamplingParams)}
        params: dict[str, Any] = {"max_tokens": 8, "seed": 1, "stop": StopCondition(at_eos=False)}
        params |= {name: fields.pop(name) for name in list(fields) if name in names}
        request = SampleInput(
            sampling_session_id="alone",
            seq_id=0,
            prompt=ModelInput.from_ints(list(prompt)),
            sampling_params=SamplingParams(**params),
            **fields,
        )
        return PreparedSample(request_id=f"sample-{next(self._ids)}", revision=revision, request=request)

    def begin(self, sample: PreparedSample) -> Future[SampleOutput]:
        """Begin a sample; cancelling the future gives it up."""
        return self.run(self.sampler.sample(sample))

    def start(self, revision: str | None, prompt: Sequence[int], **fields: Any) -> Future[SampleOutput]:
        """Make a `request` and begin it."""
        return self.begin(self.request(revision, prompt, **fields))

    def is_waiting(self, request_id: str) -> bool:
        """Whether a sample has not begun."""
        return self.run(self.sampler.is_waiting(request_id)).result(timeout=120)

    def sample(self, revision: str | None, prompt: Sequence[int], **fields: Any) -> SampleOutput:
        """One sample from beginning to end."""
        return self.start(revision, prompt, **fields).result(timeout=120)

    def prompt_logprobs(self, revision: str | None, prompt: Sequence[int]) -> npt.NDArray[np.float32]:
        """Logprobs of ``prompt[1:]``."""
        return prompt_logprobs(self.sample(revision, prompt, prompt_logprobs=True, max_tokens=1))


def prompt_logprobs(output: SampleOutput) -> npt.NDArray[np.float32]:
    """Those of a sample that asked for them, without the first token's."""
    assert output.prompt_logprobs is not None
    return output.prompt_logprobs.data[1:].astype(np.float32)


@contextmanager
def lone_sampler(
    model: Path, *, dtype: str = "float32", max_context: int = CONTEXT, **fields: Any
) -> Iterator[LoneSampler]:
    """A sampler with one engine on the CPU; ``options`` and other fields of `SamplerContext` go by name."""
    from tinker_sampler_vllm.build import build_sampler

    options = {"vllm-lora-slots": 4, "vllm-kv-cache-mib": 64, **fields.pop("options", {})}
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    with (
        tempfile.TemporaryDirectory(prefix="tinker-") as sockets,
        tempfile.TemporaryDirectory(dir="/dev/shm") as memory,
    ):
        context = SamplerContext(
            base_model=BaseModelSpec(name="tiny", path=str(model)),
            device="cpu",
            dtype="float32",
            directory=sockets,
            memory_directory=f"{memory}/held",
            server_id="srv-alone",
            max_context_length=max_context,
            **{"max_revisions": 8, "max_lora_rank": 16, "options": options, **fields},
        )

        async def build() -> Any:
            sampler = build_sampler(context)
            await sampler.start()
            return sampler

        try:
            alone = LoneSampler(asyncio.run_coroutine_threadsafe(build(), loop).result(timeout=180), loop)
            try:
                yield alone
            finally:
                alone.run(alone.sampler.close()).result(timeout=60)
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=120)
            loop.close()


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def write_adapter(
    model: Path, directory: Path, *, rank: int, seed: int, targets: Sequence[str] = TARGETS, scale: float = 0.3
) -> Path:
    """A random PEFT adapter that moves every logit by about as much as they differ."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets), task_type="CAUSAL_LM")
    with _no_warning_of_tied_heads():
        peft = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                spread = scale / parameter.shape[1] ** 0.5
                parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    peft.save_pretrained(directory, save_embedding_layers=False)
    return directory


def rename_tensors(directory: Path, old: str, new: str) -> None:
    """Change the names in an adapter's file."""
    from safetensors.numpy import load_file, save_file

    file = directory / "adapter_model.safetensors"
    save_file({name.replace(old, new): values for name, values in load_file(file).items()}, file)


def write_models(directory: Path, *, tie: bool) -> tuple[Path, Path, list[Path]]:
    """A model, another of the same architecture, and adapters of the first with an ``lm_head``."""
    kind = "llama" if tie else "qwen3"
    models = [
        write_tiny_model(
            directory / f"model-{seed}", kind, tie=tie, hidden_size=HIDDEN_SIZE, max_context=CONTEXT, seed=seed
        )
        for seed in (0, 5)
    ]
    adapters = [write_adapter(models[0], directory / f"rank-{rank}", rank=rank, seed=rank) for rank in RANKS]
    return models[0], models[1], adapters


@lru_cache(maxsize=16)
def reference_model(model: Path, adapter: Path | None = None) -> Any:
    """The model of transformers, with an adapter of PEFT on it if one is named, in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter is None:
        return base.eval()
    with _no_warning_of_tied_heads():
        return PeftModel.from_pretrained(base, adapter).eval()


@contextmanager
def _no_warning_of_tied_heads() -> Iterator[None]:
    """PEFT warns of merging an adapter into one of two tied layers, which we do not do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


def reference_table(model: Path, adapter: Path | None, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logprobs of every token after each of ``tokens``, ``[T, V]``."""
    import torch

    with torch.no_grad():
        logits = reference_model(model, adapter)(torch.tensor([list(tokens)])).logits[0]
    return logits.float().log_softmax(-1).numpy()


def reference_logprobs(model: Path, adapter: Path | None, tokens: Sequence[int]) -> npt.NDArray[np.float32]:
    """Logprobs of ``tokens[1:]``."""
    table = reference_table(model, adapter, tokens)
    return table[np.arange(len(tokens) - 1), list(tokens)[1:]]
