"""The address of a plain vLLM server: what can be asked of it, and how it is asked."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from tinker_core.errors import ConfigurationError, InvalidRequestError, TinkerError, UnsupportedFeatureError
from tinker_core.sampling.checking import check_extras, check_params, check_prompt
from tinker_core.sampling.stopping import StopRules, eos_tokens_of
from tinker_core.types import BaseModelSpec, PreparedSample, SamplerCapabilities
from tinker_sampler_vllm.links.completions import PlainSample, check_logprobs_mode, probe_body, understood
from tinker_sampler_vllm.links.link import HealthChecks
from tinker_sampler_vllm.links.plain import ONLY_BASE_MODELS, PlainLink
from tinker_sampler_vllm.protocol import EngineDescription
from tinker_sampler_vllm.seeds import sequence_seed

TEMPERATURES = (0.01, 2.0)
"""vLLM refuses greater temperatures, and silently takes the smaller one for all between it and 0."""
MAX_TOPK = 64
"""Greatest top-k that is asked for, as from our own engines; the server may allow less."""
_LEAST_TOPK = 2
"""What it takes to see in which form a server reports logprobs."""
_OWN_ENGINE = "use an engine of --vllm-engines or --vllm-workers"


class PlainServer:
    """Makes connections to one plain vLLM server, and knows which samples it can serve.

    The end-of-sequence tokens are those of the base model's files here, as for all samplers: the server is told not to
    look for its own.  Reading them, and stop texts, takes transformers, which imports torch into this process.
    """

    def __init__(
        self,
        url: str,
        base_model: BaseModelSpec,
        *,
        api_key: str | None = None,
        max_context_length: int | None = None,
        checks: HealthChecks | None = None,
    ) -> None:
        """Raises `ConfigurationError` for an address that would be written to logs with a password."""
        if urlsplit(url).username is not None:
            raise ConfigurationError("--vllm-urls: leave names and passwords out of addresses; set VLLM_API_KEY")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._base_model = base_model
        self._api_key = api_key
        self._checks = checks
        self._max_context_length = max_context_length
        self._capabilities: SamplerCapabilities | None = None
        """Of the server that was there last."""
        self._stop_rules: StopRules | None = None

    async def connect(self) -> PlainLink:
        """A connection that is ready; raises `WorkerLostError`, or `ConfigurationError` for a server of no use."""
        link = PlainLink(self.url, self._api_key, self._checks)
        try:
            vocab_size, eos = await asyncio.to_thread(_read_base_model, self._base_model)
            model, length = self._find_model(await link.get("/v1/models"))
            if self._max_context_length is not None:
                length = min(length, self._max_context_length)
            self._stop_rules = StopRules(self._base_model.path, eos, vocab_size)
            self._capabilities = SamplerCapabilities(
                max_context_length=length,
                vocab_size=vocab_size,
                transports=(),
                max_revisions=1,  # 0 would let a revision wait for room instead of being refused
                max_topk=await self._measure_topk(link, model, vocab_size),
            )
            description = EngineDescription(
                capabilities=self._capabilities,
                base_model=self._base_model.name,
                dtype="",
                vllm_version=await _version(link),
                incarnation=uuid.uuid4().hex,
            )
            link.open(model, description, self.prepare)
        except BaseException:
            await link.close()
            raise
        return link

    def _find_model(self, answer: Mapping[str, Any]) -> tuple[str, int]:
        """The server's name of the base model, and its context length."""
        with understood(self.url):
            cards = [card for card in answer["data"] if card.get("parent") is None]
            for card in cards:
                if {self._base_model.name, self._base_model.path} & {card["id"], card.get("root")}:
                    return str(card["id"]), int(card["max_model_len"])
            served = ", ".join(repr(card["id"]) for card in cards) or "no base model"
        raise ConfigurationError(
            f"{self.url} serves {served}, not base model {self._base_model.name!r}; if it is the same, start it with "
            f"--served-model-name {self._base_model.name}"
        )

    async def _measure_topk(self, link: PlainLink, model: str, vocab_size: int) -> int:
        """The greatest top-k that it accepts; raises `ConfigurationError` for logprobs of another kind than ours."""
        accepted, refused = 0, min(MAX_TOPK, vocab_size) + 1
        topk = refused - 1
        while accepted < topk:
            try:
                answer = await link.post(probe_body(model, topk))
            except InvalidRequestError as error:
                if topk <= _LEAST_TOPK:
                    raise ConfigurationError(f"{error}; start it with --max-logprobs {MAX_TOPK}") from error
                refused = topk
            else:
                with understood(self.url):
                    check_logprobs_mode(self.url, answer, vocab_size)
                accepted = topk
            topk = max((accepted + refused) // 2, _LEAST_TOPK)
        return accepted

    # --- samples ------------------------------------------------------------------------------------------------------

    def check(self, sample: PreparedSample) -> None:
        """Raise what the server cannot do of a sample: `UnsupportedFeatureError` or `InvalidRequestError`."""
        request = sample.request
        if sample.revision is not None:
            raise UnsupportedFeatureError(f"{sample.revision} cannot be sampled from: {ONLY_BASE_MODELS}")
        if request.prompt_alt_tokens_k:
            raise UnsupportedFeatureError(f"prompt_alt_tokens_k: plain vLLM servers draw none; {_OWN_ENGINE}")
        if request.target_prompt_logprobs is not None:
            raise UnsupportedFeatureError(
                f"target_prompt_logprobs: plain vLLM servers report no chosen tokens of a prompt; {_OWN_ENGINE}"
            )
        temperature, (least, greatest) = request.sampling_params.temperature, TEMPERATURES
        if 0.0 < temperature < least or temperature > greatest:
            raise UnsupportedFeatureError(
                f"temperature: plain vLLM servers take 0 and {least} to {greatest}, got {temperature}; {_OWN_ENGINE}"
            )
        if self._capabilities is None:
            return
        for name in ("topk_prompt_logprobs", "topk_sample_logprobs"):
            if self._capabilities.max_topk < getattr(request, name) <= MAX_TOPK:
                raise UnsupportedFeatureError(
                    f"{name}: {self.url} reports up to {self._capabilities.max_topk}, got {getattr(request, name)}; "
                    f"start it with --max-logprobs {MAX_TOPK}, or {_OWN_ENGINE}"
                )
        check_prompt(request, self._capabilities)

    async def prepare(self, sample: PreparedSample) -> PlainSample:
        """A sample with all that the server must be told; raises its refusal."""
        assert self._capabilities is not None
        assert self._stop_rules is not None
        self.check(sample)
        request, params = sample.request, sample.request.sampling_params
        prompt = check_prompt(request, self._capabilities)
        check_params(params)
        check_extras(request, prompt.size, self._capabilities)
        room = self._capabilities.max_context_length - prompt.size
        build, stop = self._stop_rules.build, params.stop
        return PlainSample(
            request=request,
            prompt=prompt.tolist(),
            stop=await asyncio.to_thread(build, stop) if stop.texts else build(stop),  # may load a tokenizer
            max_new_tokens=min(room, params.max_tokens or room),
            seeds=tuple(sequence_seed(params.seed or 0, index) for index in range(request.num_samples)),
        )


async def _version(link: PlainLink) -> str:
    try:
        return str((await link.get("/version"))["version"])
    except (TinkerError, KeyError, TypeError):
        return "unknown"  # a gateway may not pass it on, and nothing depends on it


def _read_base_model(base_model: BaseModelSpec) -> tuple[int, frozenset[int]]:
    """Vocabulary size and end-of-sequence tokens."""
    try:
        from transformers import AutoConfig

        config: Any = AutoConfig.from_pretrained(base_model.path).get_text_config()
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"--vllm-urls: the configuration of base model {base_model.name!r} is needed here, and could not be read "
            f"from {base_model.path!r}: {error}"
        ) from error
    return int(config.vocab_size), eos_tokens_of(base_model.path, config)
