"""Rows as conversations and prompts."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tinker_jobs.rows import BadRowError, Conversation, PromptRow, read_conversation, read_prompt


def says(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HELLO = (says("user", "hello"), says("assistant", "hi"))


def conversation(row: dict[str, Any]) -> Conversation:
    found = read_conversation(row)
    assert found is not None
    return found


def prompt(row: dict[str, Any]) -> PromptRow:
    found = read_prompt(row)
    assert found is not None
    return found


# --- conversations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": list(HELLO)}, HELLO),
        ({"messages": [{"content": "hello"}, *HELLO[1:]]}, HELLO),
        ({"messages": [says("system", " "), *HELLO, {"role": "user"}, {"role": "user", "content": None}]}, HELLO),
        ({"messages": [says("user", [{"type": "text", "text": "hel"}, "lo"]), HELLO[1]]}, HELLO),
        ({"messages": [says("user", 7), HELLO[1]]}, (says("user", "7"), HELLO[1])),
        ({"messages": [], "prompt": "hello", "answer": "hi"}, HELLO),
        ({"messages": None, "prompt": "hello", "answer": "hi"}, HELLO),
        ({"steps": [{"source": "user", "message": "hello"}, {"source": "agent", "message": "hi"}]}, HELLO),
        ({"prompt": "", "input": "  ", "question": "hello", "task_prompt": "no", "output": "hi"}, HELLO),
        ({"prompt": "hello", "expected_output": None, "target": "hi", "answer": "no"}, HELLO),
        ({"question": "2+2?", "answer": 4}, (says("user", "2+2?"), says("assistant", "4"))),
        ({"question": "2-2?", "answer": 0}, (says("user", "2-2?"), says("assistant", "0"))),
        ({"question": "hello", "answer": "hi", "steps": ["think", "say"]}, HELLO),
        ({"question": "hello", "answer": "hi", "steps": 2}, HELLO),
        ({"prompt": "code", "answer": "  x = 1\n"}, (says("user", "code"), says("assistant", "  x = 1\n"))),
    ],
)
def test_a_row_is_a_conversation_in_the_first_form_that_fits(row, messages):
    assert conversation(row).messages == messages


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"text": "hello"},
        {"prompt": "hello"},
        {"answer": "hi"},
        {"prompt": " ", "answer": "hi"},
        {"messages": [HELLO[0]]},
        {"messages": [HELLO[0]], "answer": "hi"},
        {"steps": [{"source": "user", "message": "hello"}]},
    ],
)
def test_a_row_without_a_reply_is_no_conversation(row):
    assert read_conversation(row) is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": "hello"}, "messages must be a list, got 'hello'"),
        ({"messages": {"role": "user"}}, "messages must be a list"),
        ({"messages": ["hello"]}, "a message must be an object with role and content, got 'hello'"),
        ({"messages": [{"role": 1, "content": "x"}]}, "the role of a message must be text, got 1"),
        ({"messages": [says("user", {"a": 1})]}, "the content of a message must be text"),  # type: ignore[arg-type]
        ({"messages": [says("user", True)]}, "the content of a message must be text, got True"),  # type: ignore[arg-type]
        ({"messages": [says("user", [{"type": "image"}])]}, "text or parts of text"),  # type: ignore[arg-type]
        ({"messages": [says("tool", "x", tool_call_id=7)]}, "the tool_call_id of a message must be text, got 7"),
        ({"messages": [says("assistant", "", tool_calls="f()")]}, "tool_calls must be a list"),
        ({"messages": [says("assistant", "", tool_calls=["f()"])]}, "a tool call must be an object"),
        ({"messages": [says("assistant", "", tool_calls=[{"id": "1"}])]}, "must have the name of a function"),
        ({"messages": [says("assistant", "", tool_calls=[{"function": "f"}])]}, "the function of a tool call must"),
        ({"messages": [says("assistant", "", tool_calls=[{"name": "f", "arguments": 3}])]}, "the arguments of a tool"),
        ({"steps": [{"source": "user"}, "x"]}, "a step must be an object with source and message"),
        ({"steps": [{"source": "agent", "message": "x", "observation": "y"}]}, "the observation of a step must"),
        ({"steps": [{"source": "agent", "observation": {"results": ["y"]}}]}, "a result must be an object"),
        ({"prompt": ["x"], "answer": "y"}, "prompt must be text, got ['x']"),
        ({"prompt": "x", "answer": {"y": 1}}, "answer must be text"),
        ({"prompt": "x", "answer": True}, "answer must be text, got True"),
        ({"prompt": "x", "answer": "y", "tools": "f"}, "tools must be a list of objects, got text that is no JSON"),
        ({"prompt": "x", "answer": "y", "tools": ["f"]}, "tools must be a list of objects, got ['f']"),
        ({"prompt": "x", "answer": "y", "metadata": {"reward": "good"}}, "reward must be a number, got 'good'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(row, why):
    with pytest.raises(BadRowError) as error:
        read_conversation(row)
    assert why in str(error.value)


CALL = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": {"command": "ls"}}}
TOOL = {"type": "function", "function": {"name": "run", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "call",
    [
        CALL,
        {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"command": "ls"}'}},
        {"id": "c1", "name": "run", "arguments": '{"command": "ls"}'},
        {"tool_call_id": "c1", "function_name": "run", "arguments": {"command": "ls"}},
    ],
)
def test_tool_calls_of_all_kinds_of_records_become_one_form(call):
    row = {
        "messages": [
            says("user", "look"),
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "", "tool_call_id": "c1"},
            says("assistant", "nothing there"),
        ],
        "tools": json.dumps([TOOL]),
    }
    found = conversation(row)
    assert found.messages == (
        says("user", "look"),
        says("assistant", "", tool_calls=[CALL]),
        says("tool", "", tool_call_id="c1"),
        says("assistant", "nothing there"),
    )
    assert found.tools == (TOOL,)


@pytest.mark.parametrize("arguments", ["ls -l", "[1]", '{"a": ', "[" * 100_000])
def test_tool_arguments_that_are_no_object_stay_what_the_model_had_written(arguments):
    call = {"name": "run", "arguments": arguments}
    (message,) = conversation({"messages": [says("assistant", "", tool_calls=[call])]}).messages
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_trajectory_keeps_reasoning_calls_and_results():
    row = {
        "schema_version": "ATIF-v1.4",
        "agent": {"name": "scout", "version": "1", "tool_definitions": [TOOL]},
        "steps": [
            {"step_id": 1, "source": "system", "message": "Be brief."},
            {"step_id": 2, "source": "user", "message": "look"},
            {
                "step_id": 3,
                "source": "agent",
                "message": "",
                "reasoning_content": "I list files.",
                "tool_calls": [{"tool_call_id": "c1", "function_name": "run", "arguments": {"command": "ls"}}],
                "observation": {"results": [{"source_call_id": "c1", "content": "a b"}, {"content": None}]},
                "metrics": {"prompt_tokens": 3},
            },
            {"step_id": 4, "source": "agent", "message": "a and b", "observation": None},
        ],
    }
    found = conversation(row)
    assert found.messages == (
        says("system", "Be brief."),
        says("user", "look"),
        says("assistant", "", tool_calls=[CALL], reasoning_content="I list files."),
        says("tool", "a b", tool_call_id="c1"),
        says("tool", ""),
        says("assistant", "a and b"),
    )
    assert found.tools == (TOOL,)


@pytest.mark.parametrize(
    ("outcome", "reward"),
    [
        ({}, None),
        ({"reward": 0.5}, 0.5),
        ({"metadata": {"reward": 2, "success": False}}, 2.0),
        ({"metadata": {"success": False}}, 0.0),
        ({"metadata": {"success": True}}, 1.0),
        ({"success": True}, 1.0),
        ({"worlds_summary": {"success": False}}, 0.0),
        ({"metadata": "none", "worlds_summary": None}, None),
        ({"metadata": {"success": "yes"}}, None),
    ],
)
def test_the_reward_of_a_trajectory_is_what_its_outcome_says(outcome, reward):
    assert conversation({"messages": list(HELLO), **outcome}).reward == reward


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_a_prompt_row_has_what_is_known_of_its_answer():
    row = {
        "question": "2+2?",
        "target": 4,
        "reward": 1,
        "template_context": {"who": "you", "n": 3, "none": None},
        "level": "easy",
        "source": {"page": 1},
    }
    found = prompt(row)
    assert found.messages == (says("user", "2+2?"),)
    assert (found.expected_output, found.reward) == ("4", 1.0)
    assert found.template_context == {"who": "you", "n": 3, "none": None}
    assert found.metadata == {"level": "easy", "source": {"page": 1}}
    assert found.content == row


def test_messages_come_before_a_prompt():
    messages = [says("system", "s"), says("user", "u")]
    assert prompt({"messages": messages, "prompt": "p"}).messages == tuple(messages)
    assert prompt({"messages": [{"role": "user"}], "prompt": "p"}).messages == (says("user", "p"),)


@pytest.mark.parametrize(
    ("context", "found"),
    [("a passage", {}), ({"a": "b", "c": 1, "d": [2], "e": None}, {"a": "b", "c": 1, "e": None}), (None, {})],
)
def test_a_context_gives_what_a_template_can_use_and_stays_in_the_row(context, found):
    row = prompt({"prompt": "p", "context": context})
    assert row.template_context == found
    assert row.metadata == {"context": context}


@pytest.mark.parametrize("row", [{}, {"text": "x"}, {"answer": "x"}, {"prompt": ""}, {"messages": []}])
def test_a_row_without_a_prompt_is_none(row):
    assert read_prompt(row) is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": list(HELLO)}, "messages end with the assistant's reply"),
        ({"prompt": "p", "reward": "high"}, "reward must be a number, got 'high'"),
        ({"prompt": "p", "reward": True}, "reward must be a number, got True"),
        ({"prompt": "p", "reward": 10**400}, "reward must be a finite number"),
        ({"prompt": "p", "template_context": "x"}, "template_context must be an object, got 'x'"),
        ({"prompt": "p", "template_context": {"a": [1]}}, "template_context.a must be text, got [1]"),
    ],
)
def test_a_prompt_row_with_a_wrong_value_says_which(row, why):
    with pytest.raises(BadRowError) as error:
        read_prompt(row)
    assert why in str(error.value)


# --- any row ----------------------------------------------------------------------------------------------------------

KEYS = st.sampled_from(
    [
        "messages",
        "steps",
        "tools",
        "prompt",
        "input",
        "answer",
        "output",
        "reward",
        "context",
        "template_context",
        "metadata",
        "role",
        "content",
        "source",
        "message",
        "tool_calls",
        "tool_call_id",
        "function",
        "function_name",
        "name",
        "arguments",
        "observation",
        "results",
        "agent",
        "text",
        "success",
    ]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
    | st.sampled_from(["user", "assistant", "agent", "tool", "[{}]", "{}"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=40)
@given(row=st.dictionaries(KEYS, VALUES, max_size=6))
def test_any_row_is_of_use_or_none_or_bad_and_what_is_of_use_is_well_formed(row):
    for read in (read_conversation, read_prompt):
        try:
            found = read(row)
        except BadRowError as error:
            assert str(error)  # noqa: PT017 - either is right
            continue
        if found is None:
            continue
        assert found.messages
        for message in found.messages:
            assert isinstance(message["role"], str)
            assert isinstance(message["content"], str)
        assert found.reward is None or math.isfinite(found.reward)
        if isinstance(found, Conversation):
            assert any(message["role"] == "assistant" for message in found.messages)
