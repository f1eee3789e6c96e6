"""When a sequence ends: end-of-sequence tokens, stop tokens, and stop texts that may begin and end inside tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import attrs

from tinker_core.errors import InvalidRequestError, UnsupportedFeatureError
from tinker_core.types import StopCondition

PROMPT_CONTEXT = 4
"""Prompt tokens decoded along with the first generated ones: some tokenizers drop a space at the start of a text."""
PATIENCE = 16
"""Tokens to wait for the rest of a character before its bytes are taken for broken."""
_UNFINISHED = "\ufffd"
"""What a decoder writes for a character of which only some bytes are there."""

Decode = Callable[[Sequence[int]], str]


@attrs.frozen(eq=False)
class StopRule:
    """The stop condition of one request, ready to use."""

    tokens: frozenset[int]
    texts: tuple[str, ...] = ()
    decode: Decode | None = None
    """Set when there are texts."""

    def watch(self, prompt: Sequence[int]) -> StopWatch:
        """A watch for one sequence after ``prompt``."""
        return StopWatch(self, prompt)


class StopWatch:
    """Follows one sequence, token by token."""

    def __init__(self, rule: StopRule, prompt: Sequence[int]) -> None:
        self._rule = rule
        self._window = list(prompt[-PROMPT_CONTEXT:]) if rule.texts else []
        """The tokens decoded together; text before ``_seen`` of them is known."""
        self._seen = len(self._window)
        self._tail = ""
        """The newest finished text, long enough for any stop text to begin in."""

    def ends(self, token: int) -> bool:
        """Take the next token; true when the sequence ends with it."""
        return token in self._rule.tokens or (bool(self._rule.texts) and self._completes_text(token))

    def _completes_text(self, token: int) -> bool:
        assert self._rule.decode is not None
        self._window.append(token)
        known = self._rule.decode(self._window[: self._seen])
        new = self._rule.decode(self._window)[len(known) :]
        finished = not new.endswith(_UNFINISHED) or len(self._window) - self._seen >= PATIENCE
        text = self._tail + (new if finished else new.rstrip(_UNFINISHED))
        if finished:
            longest = max(map(len, self._rule.texts))
            self._tail = text[max(0, len(text) - longest + 1) :]
            self._window = self._window[self._seen :]
            self._seen = len(self._window)
        return any(stop in text for stop in self._rule.texts)


class StopRules:
    """Makes stop rules for one base model; its tokenizer is loaded when the first stop text comes."""

    def __init__(self, model_path: str, eos_tokens: frozenset[int], vocab_size: int) -> None:
        self._model_path = model_path
        self._eos_tokens = eos_tokens
        self._vocab_size = vocab_size
        self._decode: Decode | None = None

    def build(self, stop: StopCondition) -> StopRule:
        """Check a condition; raises `InvalidRequestError`, or `UnsupportedFeatureError` where there is no tokenizer."""
        if any(not 0 <= token < self._vocab_size for token in stop.tokens):
            raise InvalidRequestError(f"stop: token ids must lie in 0..{self._vocab_size - 1}")
        if not all(stop.texts):
            raise InvalidRequestError("stop: a stop text must not be empty")
        tokens = frozenset(stop.tokens) | (self._eos_tokens if stop.at_eos else frozenset())
        if not stop.texts:
            return StopRule(tokens=tokens)
        if self._decode is None:
            self._decode = load_decoder(self._model_path)
        return StopRule(tokens=tokens, texts=stop.texts, decode=self._decode)


@cache
def load_decoder(model_path: str) -> Decode:
    """The text of token ids, special tokens included, by the tokenizer saved with a model."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError, KeyError) as error:
        raise UnsupportedFeatureError(
            f"stop texts need a tokenizer, and none could be loaded from {model_path!r} ({error}); "
            "save one there, or give stop as token ids"
        ) from error

    def decode(tokens: Sequence[int]) -> str:
        text = tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    return decode


def eos_tokens(causal_lm: Any, model_path: str) -> frozenset[int]:  # noqa: ANN401 - any Hugging Face model
    """End-of-sequence ids of a base model: its ``generation_config.json``, else its configuration."""
    return eos_tokens_of(model_path, causal_lm.generation_config, causal_lm.config)


def eos_tokens_of(model_path: str, *configurations: Any) -> frozenset[int]:  # noqa: ANN401 - Hugging Face's
    """End-of-sequence ids by ``generation_config.json`` in a model's directory, else by the first that names some."""
    from transformers import GenerationConfig

    if (Path(model_path) / "generation_config.json").is_file():
        configurations = (GenerationConfig.from_pretrained(model_path), *configurations[-1:])
    for configuration in configurations:
        named = getattr(configuration, "eos_token_id", None)
        if named is not None:
            return frozenset([named] if isinstance(named, int) else named)
    return frozenset()
