"""Conversations as training examples: tokens, and which of them are to be learned."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import attrs
import numpy as np
from numpy.typing import NDArray
from tinker import types
from transformers import PreTrainedTokenizerBase

from tinker_jobs.errors import JobFailedError
from tinker_jobs.rendering import render_text, template_of, tools_argument
from tinker_jobs.rl.prompts import with_system
from tinker_jobs.rows import Conversation
from tinker_jobs.sft.passages import Passage, PassageReader

_MARKS_REPLIES = re.compile(r"\{%-?\s*generation\s*-?%\}")


@attrs.frozen(kw_only=True, eq=False)
class Example:
    """A sequence to learn from."""

    tokens: NDArray[np.int32]
    is_learned: NDArray[np.bool_]
    """By token."""

    @property
    def num_learned(self) -> int:
        """Tokens that count in the loss. The first one never does: nothing comes before it."""
        return int(self.is_learned[1:].sum())

    def datum(self) -> types.Datum:
        """For ``cross_entropy``: position i predicts token i + 1."""
        return types.Datum(
            model_input=types.ModelInput.from_ints(self.tokens[:-1].tolist()),
            loss_fn_inputs={
                "target_tokens": types.TensorData.from_numpy(self.tokens[1:].astype(np.int64)),
                "weights": types.TensorData.from_numpy(self.is_learned[1:].astype(np.float32)),
            },
        )


class ExampleMaker:
    """Makes examples of conversations, and counts what it had to leave out."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, system: str | None, max_length: int) -> None:
        """``max_length`` is in tokens; what is longer loses its end."""
        if not tokenizer.is_fast:
            raise JobFailedError(
                f"the model's tokenizer ({type(tokenizer).__name__}) does not tell where in the text its tokens are, "
                "so replies cannot be told from prompts; choose a model with a tokenizer.json"
            )
        self._tokenizer = tokenizer
        self._passages = PassageReader(tokenizer)
        self._system = system or ""
        self._max_length = max_length
        self.num_truncated = 0
        """Examples that lost their end."""
        self.num_dropped = 0
        """Examples without anything to learn in what was left."""
        self.num_open = 0
        """Examples whose last reply no special token ends."""

    def make(self, conversation: Conversation) -> list[Example]:
        """The conversation's examples; none when nothing of it can be learned. Raises `JobFailedError`."""
        messages = with_system(conversation.messages, self._system)
        found = []
        for passage in self._passages.read(messages, conversation.tools):
            self.num_open += not passage.is_closed
            whole = self._encode(passage, conversation)
            example = Example(tokens=whole.tokens[: self._max_length], is_learned=whole.is_learned[: self._max_length])
            self.num_truncated += len(example.tokens) < len(whole.tokens)
            if example.num_learned:
                found.append(example)
            else:
                self.num_dropped += 1
        return found

    def ignores_tools(self, conversation: Conversation) -> bool:
        """Whether the template leaves out the definitions of the conversation's tools."""
        texts = {
            render_text(self._tokenizer, conversation.messages, tools=tools, prompts_reply=False)
            for tools in (conversation.tools, ())
        }
        return bool(conversation.tools) and len(texts) == 1

    def _encode(self, passage: Passage, conversation: Conversation) -> Example:
        encoded = self._tokenizer(passage.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
        tokens = np.array(encoded["input_ids"], np.int32)
        if _MARKS_REPLIES.search(template_of(self._tokenizer, conversation.tools)):
            marked = self._marked(passage, conversation)
            return Example(tokens=tokens, is_learned=marked & (places[:, 0] >= passage.spans[0][0]))
        return Example(tokens=tokens, is_learned=_overlaps(places, passage.spans))

    def _marked(self, passage: Passage, conversation: Conversation) -> NDArray[np.bool_]:
        """What the template itself marks as the assistant's."""
        encoded: Any = self._tokenizer.apply_chat_template(
            list(passage.messages),
            tools=tools_argument(conversation.tools),
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        return np.array(encoded["assistant_masks"], np.bool_)


def _overlaps(places: NDArray[np.int64], spans: Iterable[tuple[int, int]]) -> NDArray[np.bool_]:
    """Tokens with a character inside a span. One that begins before it counts: it brings the reply's first letters."""
    found = np.zeros(len(places), np.bool_)
    for start, end in spans:
        found |= (places[:, 0] < end) & (np.maximum(places[:, 1], places[:, 0] + 1) > start)
    return found
