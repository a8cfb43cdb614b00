"""Conversations in rows: lists of messages in the forms of chat templates and of sharegpt, checked."""

from __future__ import annotations

import json
from typing import Any

from fsdp_qlora.data.readers import json_type
from fsdp_qlora.data.templates import Message
from fsdp_qlora.errors import FsdpQloraError

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
}
"""Names of roles in messages and sharegpt rows; a function_call's text is the JSON of a call."""

FOLLOWS = {
    "start": ("user", "system"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "calls": ("tool",),
    "tool": ("tool", "assistant"),
}
"""Which roles may come after which; 'calls' is an assistant message with tool calls."""

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names under which an answer's reasoning is found; templates know the first."""


class RowError(FsdpQloraError):
    """What is wrong with a row; load_rows adds its place."""


def string_of(columns: dict[str, object], name: str, *, optional: bool = False) -> str:
    """Return a text column; a missing or null optional one is ''.

    Raises:
        RowError: the column is missing or holds another type.
    """
    value = columns.get(name)
    if optional and value is None:
        return ""
    if name not in columns:
        raise RowError(f"column {name!r} is missing")
    if not isinstance(value, str):
        raise RowError(f"{name!r} must be a string, found {json_type(value)}")
    return value


def turns_of(columns: dict[str, object], list_name: str, role_name: str, content_name: str) -> list[Message]:
    """Return the messages in a column that holds a list of objects with a role and a text."""
    if list_name not in columns:
        raise RowError(f"column {list_name!r} is missing")
    turns = columns[list_name]
    if not isinstance(turns, list):
        raise RowError(f"{list_name!r} must be a list, found {json_type(turns)}")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict):
            raise RowError(f"message {number} must be an object, found {json_type(turn)}")
        try:
            messages.append(_message(turn, role_name, content_name))
        except RowError as error:
            raise RowError(f"message {number}: {error}") from error
    return messages


def tools_of(columns: dict[str, object]) -> tuple[dict[str, Any], ...]:
    """Return the descriptions of tools in the column 'tools': a list of objects, or its JSON; () without one."""
    tools = _parsed(columns.get("tools"), "tools") or []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"'tools' must be a list of objects, found {json_type(tools)}")
    return tuple(_without_nulls(tool) for tool in tools)


def check_conversation(messages: list[Message]) -> None:
    """Raise RowError unless each role may follow the one before, the last is an answer, and texts are not blank."""
    if not messages:
        raise RowError("the conversation is empty")
    if all(message["role"] != "assistant" for message in messages):
        raise RowError("no assistant message, so nothing to learn from")
    previous = "start"
    for number, message in enumerate(messages, 1):
        role = message["role"]
        if role not in FOLLOWS[previous]:
            expected = " or ".join(FOLLOWS[previous])
            raise RowError(f"message {number} is from {role}, expected {expected}: roles out of order")
        previous = "calls" if "tool_calls" in message else role
    if messages[-1]["role"] != "assistant":
        raise RowError(f"the last message is from {messages[-1]['role']}, expected assistant")
    for number, message in enumerate(messages, 1):
        if not message["content"].strip() and "tool_calls" not in message:
            raise RowError(f"message {number} ({message['role']}) is empty")


def texts_of(messages: list[Message]) -> list[str]:
    """Return all texts of a conversation, tool calls as JSON."""
    return [
        text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
        for message in messages
        for text in message.values()
    ]


def _message(turn: dict[str, object], role_name: str, content_name: str) -> Message:
    role = string_of(turn, role_name)
    if role not in ROLES:
        raise RowError(f"unknown role {role[:40]!r}, known are {', '.join(ROLES)}")
    if role == "function_call":
        calls = _parsed(string_of(turn, content_name), content_name)
        return {"role": "assistant", "content": "", "tool_calls": _calls(calls if isinstance(calls, list) else [calls])}
    calls = turn.get("tool_calls")
    message: Message = {
        "role": ROLES[role],
        "content": string_of(turn, content_name, optional=bool(calls)),
    }
    if ROLES[role] == "assistant":
        name = next((name for name in REASONING if turn.get(name) is not None), None)
        if name is not None and (reasoning := string_of(turn, name)).strip():
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = _calls(_parsed(calls, "tool_calls"))
    if ROLES[role] == "tool":
        message |= {name: turn[name] for name in ("name", "tool_call_id") if isinstance(turn.get(name), str)}
    return message


def _calls(calls: object) -> list[dict[str, Any]]:
    """Return tool calls as templates expect them: {"type", "function": {"name", "arguments": object}} and the id, if any."""
    if not isinstance(calls, list) or not calls:
        raise RowError(f"'tool_calls' must be a list of calls, found {json_type(calls)}")
    found = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise RowError("a tool call needs a 'name' and 'arguments'")
        arguments = _parsed(function.get("arguments", {}), "arguments")
        if not isinstance(arguments, dict):
            raise RowError(f"the arguments of a tool call must be an object, found {json_type(arguments)}")
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        named = {"name": function["name"].strip(), "arguments": _without_nulls(arguments)}
        found.append({**identity, "type": "function", "function": named})
    return found


def _parsed(value: object, name: str) -> object:
    """Return a value that may be given as its JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise RowError(f"{name!r} is not JSON ({error})") from error


def _without_nulls(value: Any) -> Any:
    """Drop the nulls with which Parquet fills objects up to a common form."""
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
