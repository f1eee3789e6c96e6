"""What of a conversation's text the assistant wrote, under any chat template.

Most templates write a message the same way whatever follows it. Some do not: Qwen3 drops the reasoning of earlier
replies, gpt-oss ends the last reply with another token. There the text of a whole conversation shows replies as the
model never writes them, so a conversation falls into several passages, each ending with a reply as it is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

import attrs
from transformers import PreTrainedTokenizerBase

from tinker_jobs.rendering import render_text, template_of
from tinker_jobs.rows import Message

Tools = Sequence[Mapping[str, Any]]


@attrs.frozen(kw_only=True)
class Passage:
    """A conversation up to a reply of the assistant."""

    messages: Sequence[Message]
    text: str
    spans: tuple[tuple[int, int], ...]
    """First character, and the one after the last, of each reply to be learned, with the token that ends its turn."""
    is_closed: bool
    """Whether a special token ends the last reply's turn. Without one nobody learns to stop there."""


class PassageReader:
    """Finds the replies in conversations."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._special = tuple(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)

    def read(self, messages: Sequence[Message], tools: Tools = ()) -> Iterator[Passage]:
        """Passages in which each reply of the assistant is to be learned once; one when the template allows it.

        Messages after the last reply are left out. Raises `JobFailedError` as `render_text` does.
        """
        ends = [index + 1 for index, message in enumerate(messages) if message["role"] == "assistant"]
        text, end, spans = "", 0, list[tuple[int, int]]()
        for next_end in ends:
            longer = render_text(self._tokenizer, messages[:next_end], tools=tools, prompts_reply=False)
            if spans and not longer.startswith(text):
                yield self._passage(messages[:end], text, spans)
                spans = []
            text, end = longer, next_end
            spans.append((self._start_of_reply(messages[:end], tools, text), self._end_of_turn(text)))
        if spans:
            yield self._passage(messages[:end], text, spans)

    def _passage(self, messages: Sequence[Message], text: str, spans: Sequence[tuple[int, int]]) -> Passage:
        return Passage(messages=messages, text=text, spans=tuple(spans), is_closed=self._is_closed(text))

    def _is_closed(self, text: str) -> bool:
        return bool(self._special) and text.rstrip().endswith(self._special)

    def _start_of_reply(self, messages: Sequence[Message], tools: Tools, text: str) -> int:
        """Where the last of the messages begins: after what the model is prompted with, if the text has that."""
        before = messages[:-1]
        if before and "add_generation_prompt" in template_of(self._tokenizer, tools):
            prompt = render_text(self._tokenizer, before, tools=tools, prompts_reply=True)
            if text.startswith(prompt):
                return len(prompt)
        # Otherwise after what the template writes ahead of any reply.
        others = ([*before, {"role": "assistant", "content": content}] for content in ("A", "B"))
        texts = [render_text(self._tokenizer, other, tools=tools, prompts_reply=False) for other in others]
        shared = takewhile(lambda letters: len(set(letters)) == 1, zip(text, *texts, strict=False))
        return sum(1 for _ in shared)

    def _end_of_turn(self, text: str) -> int:
        """The end of a text that ends with a reply, without the white space after the token that ends the turn."""
        return len(text.rstrip()) if self._is_closed(text) else len(text)
