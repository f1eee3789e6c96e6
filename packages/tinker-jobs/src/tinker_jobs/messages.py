"""Messages of dataset rows in the one form that chat templates know."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Message = dict[str, Any]
"""``role`` and ``content``, which is text, and where they were recorded ``reasoning_content``, ``tool_calls``,
``tool_call_id`` and ``name``."""

ASSISTANT = "assistant"
_TEXT_KEYS = ("reasoning_content", "tool_call_id", "name")


class BadRowError(Exception):
    """A row that cannot be used, with why."""


def as_message(value: object) -> Message | None:
    """A message; None for one that says nothing. Raises `BadRowError`."""
    if not isinstance(value, Mapping):
        raise BadRowError(f"a message must be an object with role and content, got {value!r:.60}")
    role = value.get("role") or "user"
    if not isinstance(role, str):
        raise BadRowError(f"the role of a message must be text, got {role!r:.60}")
    message: Message = {"role": role, "content": _content(value.get("content"))}
    calls = as_list(value, "tool_calls")
    if calls:
        message["tool_calls"] = [_tool_call(call) for call in calls]
    for key in _TEXT_KEYS:
        found = value.get(key)
        if found is not None and not isinstance(found, str):
            raise BadRowError(f"the {key} of a message must be text, got {found!r:.60}")
        if found:
            message[key] = found
    says_something = message["content"].strip() or any(key in message for key in (*_TEXT_KEYS[:2], "tool_calls"))
    return message if says_something else None


def is_atif(steps: object) -> bool:
    """Whether what a row calls its steps is a trajectory in the ATIF form: other rows count steps, or name them."""
    return isinstance(steps, list | tuple) and any(isinstance(step, Mapping) and "source" in step for step in steps)


def steps_as_messages(steps: Sequence[object]) -> Iterator[Message]:
    """The steps of a trajectory in the ATIF form: what was said, and the results of the tools that were called.

    Raises `BadRowError`.
    """
    for step in steps:
        if not isinstance(step, Mapping):
            raise BadRowError(f"a step must be an object with source and message, got {step!r:.60}")
        source = step.get("source")
        message = {**step, "role": ASSISTANT if source == "agent" else source, "content": step.get("message")}
        said = as_message(message)
        if said is not None:
            yield said
        observation = step.get("observation")
        if observation is not None and not isinstance(observation, Mapping):
            raise BadRowError(f"the observation of a step must be an object with results, got {observation!r:.60}")
        for result in as_list(observation or {}, "results"):
            yield _tool_result(result)


def _tool_result(result: object) -> Message:
    if not isinstance(result, Mapping):
        raise BadRowError(f"a result must be an object with content, got {result!r:.60}")
    call_id = result.get("source_call_id") or result.get("tool_call_id")
    found = as_message({"role": "tool", "content": result.get("content"), "tool_call_id": call_id})
    return {"role": "tool", "content": ""} if found is None else found


def _content(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "".join(_part(part) for part in value)
    text = as_text(value, "the content of a message")
    return "" if text is None else text


def _part(part: object) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    if not isinstance(text, str):
        raise BadRowError(f"the content of a message must be text or parts of text, got {part!r:.60}")
    return text


def _tool_call(call: object) -> dict[str, Any]:
    """OpenAI's form; ATIF and transcripts have the function's name and arguments in the call itself."""
    if not isinstance(call, Mapping):
        raise BadRowError(f"a tool call must be an object, got {call!r:.60}")
    function = call.get("function", call)
    if not isinstance(function, Mapping):
        raise BadRowError(f"the function of a tool call must be an object, got {function!r:.60}")
    name = function.get("name") or function.get("function_name")
    if not isinstance(name, str):
        raise BadRowError(f"a tool call must have the name of a function, got {call!r:.60}")
    found: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": _arguments(function)}}
    call_id = call.get("id") or call.get("tool_call_id")
    return found if call_id is None else {"id": str(call_id), **found}


def _arguments(function: Mapping[str, object]) -> object:
    """As an object, which templates write as JSON; text that is none stays what the model had written."""
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except (ValueError, RecursionError):
            return arguments
        return parsed if isinstance(parsed, dict) else arguments
    if arguments is not None and not isinstance(arguments, Mapping):
        raise BadRowError(f"the arguments of a tool call must be an object, got {arguments!r:.60}")
    return dict(arguments or {})


def as_list(value: Mapping[str, object], key: str) -> Sequence[object]:
    """A list, empty when there is none. Raises `BadRowError`."""
    found = value.get(key)
    if found is None:
        return ()
    if not isinstance(found, list | tuple):
        raise BadRowError(f"{key} must be a list, got {found!r:.60}")
    return found


def as_text(value: object, what: str) -> str | None:
    """A text or a number as it is written; None when there is none. Raises `BadRowError`."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRowError(f"{what} must be text, got {value!r:.60}")
    return str(value)
