"""Messages as tokens, with the chat template of the base model."""

from __future__ import annotations

import json
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

    Raises `JobFailedError` when the model has no chat template, or one that refuses the messages or has no place for
    their tool calls.
    """
    if not tokenizer.chat_template:
        raise JobFailedError("the model has no chat template; choose an instruction-tuned model")
    try:
        text = _apply(tokenizer, messages, tools, prompts_reply)
    except Exception as error:  # templates raise what they like
        raise JobFailedError(f"the model's chat template refuses a conversation: {error}") from error
    _check_tool_calls(messages, text)
    return text


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Mapping[str, Any]],
    prompts_reply: bool,
) -> str:
    options: dict[str, Any] = {"tools": tools_argument(tools), "add_generation_prompt": prompts_reply}
    try:
        text = tokenizer.apply_chat_template(list(messages), tokenize=False, **options)
    except TypeError:
        written = [_written_out(message) for message in messages]
        if written == list(messages):
            raise
        text = tokenizer.apply_chat_template(written, tokenize=False, **options)
    assert isinstance(text, str)
    return text


def _written_out(message: Message) -> Message:
    """The message with the arguments of its tool calls as JSON text, which a few templates, as DeepSeek's, ask for."""
    calls = [
        {**call, "function": {**call["function"], "arguments": _as_json(call["function"]["arguments"])}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _as_json(arguments: object) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def render_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()
) -> list[int]:
    """Tokens that a reply of the assistant follows."""
    text = render_text(tokenizer, messages, tools=tools, prompts_reply=True)
    tokens: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return tokens


def template_of(tokenizer: PreTrainedTokenizerBase, tools: Sequence[Mapping[str, Any]]) -> str:
    """The chat template that is used; some models have another one for conversations with tools."""
    template: str = tokenizer.get_chat_template(tools=tools_argument(tools))
    return template


def tools_argument(tools: Sequence[Mapping[str, Any]]) -> list[Any] | None:
    """Tools as tokenizers take them: a list, or none at all."""
    return [dict(tool) for tool in tools] or None


def _check_tool_calls(messages: Sequence[Message], text: str) -> None:
    """Templates without tool calls leave them out without a word, and the model would learn to say nothing."""
    for message in messages:
        for call in message.get("tool_calls", ()):
            name = call["function"]["name"]
            if name not in text:
                raise JobFailedError(
                    f"the model's chat template does not write the tool call {name!r}; "
                    "choose a model with tools, or a dataset without them"
                )
