"""Messages as tokens, with the chat template of the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from tinker_jobs.errors import JobFailedError
from tinker_jobs.rows import Message


def render_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    prompts_reply: bool,
) -> str:
    """Messages as the model's text, with the beginning of a reply if one is asked for.

    Raises `JobFailedError` when the model has no chat template, or a template that refuses the messages.
    """
    if not tokenizer.chat_template:
        raise JobFailedError("the model has no chat template; choose an instruction-tuned model")
    known = [dict(tool) for tool in tools] or None
    try:
        text = tokenizer.apply_chat_template(
            list(messages),
            tools=known,
            add_generation_prompt=prompts_reply,
            tokenize=False,
        )
    except Exception as error:  # templates raise what they like
        raise JobFailedError(f"the model's chat template refuses a conversation: {error}") from error
    assert isinstance(text, str)
    return text


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Tokens that a reply of the assistant follows."""
    text = render_text(tokenizer, messages, tools=tools, prompts_reply=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens
