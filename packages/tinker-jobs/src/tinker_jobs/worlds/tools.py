"""How a policy asks for something in a world, in the form that its chat template knows or in plain lines."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

import attrs
import orjson
from transformers import PreTrainedTokenizerBase

from tinker_jobs.rendering import render_text
from tinker_jobs.worlds.runtime import World

RUN, FINISH = "run_command", "finish_task"
_TOOL_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_LINE = re.compile(r"^[ \t]*(run|finish|give up)[ \t]*:[ \t]*(.*?)[ \t]*$", re.IGNORECASE | re.MULTILINE)
_REASONING = re.compile(r"\A(?:.*<think>)?(.*?)</think>", re.DOTALL)
_OPEN_REASONING = re.compile(r"<think>(.*)\Z", re.DOTALL)
_PROBE = ({"role": "user", "content": "?"},)


class CallForm(StrEnum):
    """How calls are written."""

    TEMPLATE = "template"
    """``<tool_call>{"name": …, "arguments": …}</tool_call>``, with the tools described by the chat template."""
    LINES = "lines"
    """Lines that begin with ``run:``, ``finish:`` or ``give up:``."""
    REPLY = "reply"
    """The whole reply is one command."""


@attrs.frozen(kw_only=True)
class RunCall:
    """Run a command."""

    command: str


@attrs.frozen(kw_only=True)
class FinishCall:
    """End the episode."""

    success: bool
    """What the policy says of it."""


@attrs.frozen(kw_only=True)
class BadCall:
    """A call that cannot be read."""

    reason: str


Call = RunCall | FinishCall | BadCall


@attrs.frozen(kw_only=True)
class Reply:
    """A policy's reply, taken apart."""

    reasoning: str
    calls: tuple[Call, ...]


TOOLS: tuple[Mapping[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": RUN,
            "description": "Run a command in the environment and read its output.",
            "parameters": {
                "type": "object",
                "properties": {"command": {"type": "string", "description": "The command line to run."}},
                "required": ["command"],
            },
        },
    },
    {
        "type": "function",
        "function": {
            "name": FINISH,
            "description": "End the task: the goal is reached, or no further progress is possible.",
            "parameters": {
                "type": "object",
                "properties": {
                    "success": {"type": "boolean", "description": "Whether the goal is reached."},
                    "summary": {"type": "string", "description": "What was done."},
                },
                "required": ["success"],
            },
        },
    },
)
_LINES_HELP = """To run a command, write a line of this form:
run: COMMAND
You will then be shown its output. When the goal is reached, write
finish: SUMMARY
and when you cannot get any further
give up: REASON"""


def call_form(tokenizer: PreTrainedTokenizerBase, world: World) -> CallForm:
    """The form for a model in a world; raises `JobFailedError` for a model without a chat template."""
    if world.reply_is_command:
        return CallForm.REPLY
    with_tools = render_text(tokenizer, _PROBE, tools=TOOLS, prompts_reply=True)
    shows_tools = with_tools != render_text(tokenizer, _PROBE, prompts_reply=True)
    return CallForm.TEMPLATE if shows_tools and "<tool_call>" in with_tools else CallForm.LINES


def describe(world: World, form: CallForm) -> str:
    """What a policy is told about a world."""
    parts = [world.description, _LINES_HELP if form is CallForm.LINES else ""]
    if world.commands:
        lines = [f"- {one.usage}: {one.description}" if one.description else f"- {one.usage}" for one in world.commands]
        parts.append("\n".join(["Commands:", *lines]))
    return "\n\n".join(part for part in parts if part)


def read_reply(text: str, form: CallForm) -> Reply:
    """What a reply asks for. Nothing inside ``<think>`` is a call."""
    reasoning, rest = split_reasoning(text)
    if form is CallForm.REPLY:
        command = rest.strip()
        return Reply(reasoning=reasoning, calls=(RunCall(command=command),) if command else ())
    read = _template_calls if form is CallForm.TEMPLATE else _line_calls
    return Reply(reasoning=reasoning, calls=tuple(read(rest)))


def split_reasoning(text: str) -> tuple[str, str]:
    """Reasoning and the rest. A template may have opened ``<think>`` in the prompt, and a reply may end inside it."""
    if found := _REASONING.search(text):
        return found[1].strip(), text[found.end() :]
    if found := _OPEN_REASONING.search(text):
        return found[1].strip(), text[: found.start()]
    return "", text


def _line_calls(text: str) -> Sequence[Call]:
    return [_line_call(found[1].lower(), found[2]) for found in _LINE.finditer(text)]


def _line_call(word: str, argument: str) -> Call:
    if word != "run":
        return FinishCall(success=word == "finish")
    return RunCall(command=argument) if argument else BadCall(reason="run: needs a command after it")


def _template_calls(text: str) -> Sequence[Call]:
    return [_template_call(found[1].strip()) for found in _TOOL_CALL.finditer(text)]


def _template_call(text: str) -> Call:
    try:
        call = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        return BadCall(reason=f"a tool call must be JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("arguments"), dict):
        return BadCall(reason="a tool call must be an object with name and arguments")
    name, arguments = call.get("name"), call["arguments"]
    if name == RUN:
        command = arguments.get("command")
        return RunCall(command=command) if isinstance(command, str) else BadCall(reason=f"{RUN} needs command as text")
    if name == FINISH:
        success = arguments.get("success")
        if not isinstance(success, bool):
            return BadCall(reason=f"{FINISH} needs success as true or false")
        return FinishCall(success=success)
    return BadCall(reason=f"there is no tool {name!r}; there are {RUN} and {FINISH}")
