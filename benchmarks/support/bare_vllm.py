"""vLLM without our server: an ``AsyncLLM`` in this process with the arguments that the server's engine has."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tinker_core.types import BaseModelSpec
from tinker_sampler_vllm.engine.arguments import engine_arguments
from tinker_sampler_vllm.engine.environment import engine_environment
from tinker_sampler_vllm.protocol import EngineSettings


class BareVllm:
    """Samples through vLLM's own interface: what any user of vLLM would write."""

    def __init__(self, llm: Any, runner: asyncio.Runner) -> None:
        self._llm = llm
        self._runner = runner
        self._ids = itertools.count()
        self._adapter: Any = None

    def use_adapter(self, directory: Path) -> None:
        """Sample with an adapter from now on; it is loaded by vLLM itself."""
        from vllm.lora.request import LoRARequest

        self._adapter = LoRARequest("bench", 1, str(directory))
        self._runner.run(self._llm.add_lora(self._adapter))

    def sample(self, batch: list[list[int]], new_tokens: int) -> int:
        """All prompts at once; the number of new tokens."""
        return self._runner.run(self._sample(batch, new_tokens))

    async def _sample(self, batch: list[list[int]], new_tokens: int) -> int:
        return sum(await asyncio.gather(*(self._one(prompt, new_tokens) for prompt in batch)))

    async def _one(self, prompt: list[int], new_tokens: int) -> int:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=1.0,
            seed=0,
            max_tokens=new_tokens,
            ignore_eos=True,
            logprobs=0,  # a sample of ours always comes with the logprobs of its tokens
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        request_id = f"bare-{next(self._ids)}"
        async for output in self._llm.generate(
            TokensPrompt(prompt_token_ids=prompt), params, request_id, lora_request=self._adapter
        ):
            final = output
        return len(final.outputs[0].token_ids)


@contextmanager
def bare_vllm(model: Path, device: str, dtype: str) -> Iterator[BareVllm]:
    """Start an engine with the settings of a server without flags."""
    # Before vLLM is imported: it reads them once.  They also put the CPU fixes in place that our engines run with.
    os.environ.update(engine_environment(device, os.environ))
    from vllm.v1.engine.async_llm import AsyncLLM

    base_model = BaseModelSpec(name="smollm2", path=str(model))
    settings = EngineSettings(base_model=base_model, device=device, dtype=dtype)

    async def start() -> Any:
        return AsyncLLM.from_engine_args(engine_arguments(settings))

    with asyncio.Runner() as runner:
        llm = runner.run(start())
        try:
            yield BareVllm(llm, runner)
        finally:
            llm.shutdown()
