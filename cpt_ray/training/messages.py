"""A prompt or an answer of a preference set: a text, or messages in one of the forms in which data sets hold them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.errors import UserError, kind_of
from cpt_ray.texts import is_blank, messages_in, same_text

ROLES = ("system", "developer", "user", "assistant", "tool")
EXPECTED = (
    "expected TRL's preference format: chosen and rejected, and mostly prompt, all of them text or all of them lists "
    "of {role, content}"
)

Turns = str | list[ChatMessage]


def read_turns(row: Mapping[str, Any], name: str) -> Turns:
    """A column as text or as messages; UserError if it is neither."""
    if row.get(name) is None:
        if name in row:
            raise UserError(f"{name}: nothing is there (null); give an answer, or leave the row out")
        near = [column for column in row if str(column).strip().lower() == name]
        hint = f" (is it {near[0]!r}? rename that column)" if near else ""
        raise UserError(f"no column {name!r}{hint} among {', '.join(map(repr, row)) or 'none'}; {EXPECTED}")
    value = row[name]
    if isinstance(value, str):
        value = messages_in(value, name)
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple):
        raise UserError(f"{name}: found {kind_of(value)}; {EXPECTED}")
    return [_message(message, f"{name}[{at}]") for at, message in enumerate(value)]


def _message(value: Any, where: str) -> ChatMessage:
    """A message as the chat template takes it, whole; its content one text."""
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: found {kind_of(value)}; expected a message: role and content")
    calls = value.get("tool_calls")
    if "role" not in value or ("content" not in value and not calls):
        raise UserError(f"{where}: found {', '.join(map(str, value))}; expected a message: role and content")
    if value["role"] not in ROLES:
        raise UserError(f"{where}.role: found {value['role']!r:.40}; expected {', '.join(ROLES)}")
    message: ChatMessage = without_nulls(value)
    message["content"] = _content(value.get("content"), bool(calls), f"{where}.content")
    if calls:
        message["tool_calls"] = [_tool_call(call, f"{where}.tool_calls") for call in message["tool_calls"]]
    return message


def _content(value: Any, has_calls: bool, where: str) -> str:
    if isinstance(value, str):
        return value
    if value is None and has_calls:
        return ""
    if value is None:
        raise UserError(f"{where}: nothing is there (null); give a text, or leave the row out")
    parts = value if isinstance(value, list | tuple) else [value]
    texts = [part.get("text") for part in parts if isinstance(part, Mapping) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: found {kind_of(value)}; expected a text, or a list of text parts")
    return "\n".join(map(str, texts))  # as the server joins them


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    """A tool call with its arguments as an object, which is what chat templates expect."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: expected {{function: {{name, arguments}}}}")
    if not isinstance(function.get("arguments"), str):
        return dict(call)
    parsed = {**function, "arguments": from_json(function["arguments"], f"{where}.arguments")}
    return {**call, "function": parsed} if "function" in call else parsed


def is_empty(message: ChatMessage) -> bool:
    return is_blank(message["content"]) and not message.get("tool_calls")


def is_empty_answer(answer: Turns) -> bool:
    """Whether an answer says nothing and calls nothing."""
    return is_blank(answer) if isinstance(answer, str) else all(map(is_empty, answer))


def same_answers(answer: Turns, other: Turns) -> bool:
    """Whether a reader sees the same in two answers."""
    if isinstance(answer, str) or isinstance(other, str):
        return same_text(str(answer), str(other))
    return len(answer) == len(other) and all(
        same_text(message["content"], theirs["content"]) and {**message, "content": ""} == {**theirs, "content": ""}
        for message, theirs in zip(answer, other, strict=True)
    )


def from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        raise UserError(f"{name}: a text that is not JSON ({value[:40]!r}); give JSON") from None


def without_nulls(value: Any) -> Any:
    """A copy without fields that are null: parquet gives each object in a column the fields of all of them."""
    if isinstance(value, Mapping):
        return {name: without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value
