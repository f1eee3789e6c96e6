"""A program: what vLLM answers without our fixes, as JSON on standard output, for `test_stock_vllm`.

It is told what to do by JSON on standard input; every job is a list of (prompt, adapter directory or None).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from typing import Any

log = logging.getLogger(__name__)

Job = list[tuple[list[int], str | None]]


class Stock:
    """A bare engine with as many adapter slots as there are adapters."""

    def __init__(self, model: str) -> None:
        from vllm import LLM

        self.llm = LLM(
            model=model,
            dtype="float32",
            skip_tokenizer_init=True,
            enable_lora=True,
            max_loras=4,
            max_cpu_loras=8,
            max_lora_rank=16,
            max_model_len=512,
            max_num_seqs=16,
            max_num_batched_tokens=2048,
            enforce_eager=True,
            kv_cache_memory_bytes=64 << 20,
            enable_prefix_caching=True,
        )
        self._numbers: dict[str, int] = {}

    def adapter(self, directory: str | None, **fields: Any) -> Any:
        from vllm.lora.request import LoRARequest

        if directory is None:
            return None
        number = self._numbers.setdefault(directory, len(self._numbers) + 1)
        return LoRARequest(f"adapter-{number}", number, directory, **fields)

    def run(self, job: Job, *, prompt_logprobs: bool = False, **fields: Any) -> list[dict[str, Any]]:
        """What was generated, and its logprobs."""
        from vllm import SamplingParams, TokensPrompt

        params = SamplingParams(
            temperature=1.0,
            seed=1,
            max_tokens=8,
            logprobs=0,
            prompt_logprobs=0 if prompt_logprobs else None,
            detokenize=False,
            ignore_eos=True,
        )
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=prompt) for prompt, _ in job],
            params,
            lora_request=[self.adapter(directory, **fields) for _, directory in job],
            use_tqdm=False,
        )
        return [_record(output) for output in outputs]


def _record(output: Any) -> dict[str, Any]:
    (sequence,) = output.outputs
    tokens = list(sequence.token_ids)
    return {
        "tokens": tokens,
        "logprobs": [row[token].logprob for row, token in zip(sequence.logprobs, tokens, strict=True)],
    }


def _dies(stock: Stock, job: Job, **fields: Any) -> bool:
    """Whether a job ends the whole engine."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        stock.run(job, **fields)
    except Exception as error:
        log.warning("%s: %s", type(error).__name__, error)
    try:
        stock.run([(job[0][0], None)])
    except EngineDeadError:
        return True
    return False


def _temperatures() -> list[float | None]:
    """What becomes of a low and a high one; None for a refusal."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError

    try:
        high = SamplingParams(temperature=3.0).temperature
    except VLLMValidationError:
        high = None
    return [SamplingParams(temperature=0.005).temperature, high]


def main() -> None:
    """Run all jobs, those that may end an engine on one of their own."""
    told = json.loads(sys.stdin.read())
    stock = Stock(told["model"])
    first, second, copy = told["adapters"][0], told["adapters"][1], told["copy"]
    answers: dict[str, Any] = {"mixed": stock.run(told["mixed"])}
    shutil.copytree(first, copy)
    stock.run([(told["long"], copy)])
    shutil.copytree(second, copy, dirs_exist_ok=True)
    answers["in_place"] = stock.run([(told["long"], copy)], load_inplace=True)
    stock.llm.collective_rpc("reload_weights", kwargs={"weights_path": told["other"]})
    stock.llm.reset_prefix_cache()
    answers["reloaded"] = stock.run([(told["long"], None)])
    answers["unknown_module"] = stock.run([(told["long"], told["deeper"])])
    answers["dies_of_missing"] = _dies(stock, [(told["long"], "/nonexistent/adapter")])
    answers["dies_of_prompts"] = _dies(Stock(told["model"]), told["mixed"], prompt_logprobs=True)
    different = [([4 + number, *told["long"]], None) for number in range(16)]
    answers["dies_of_parts"] = _dies(Stock(told["model"]), different)
    answers["temperatures"] = _temperatures()
    with os.fdopen(int(told["answer_fd"]), "w") as pipe:
        json.dump(answers, pipe)
    os._exit(0)  # a dead engine does not shut down


if __name__ == "__main__":
    main()
