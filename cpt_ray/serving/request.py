"""What a request asks for beside the chat itself, read once into a frozen value.

A configuration is in the body (`"configuration"`), or in the model's name (`cpt:ornament=high,warmth=30`); the id of a
user's preferences is in the body (`"preferences"`), or is the model's name (`cpt:ID`). Everything else is vLLM's.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.chat.templates import find_control_token
from cpt_ray.errors import UserError, kind_of
from cpt_ray.rubrics.catalog import Catalog, ResolvedConfiguration
from cpt_ray.texts import lone_surrogate, strings_in, unique_names

CHAT_PATH = "/v1/chat/completions"
CHAT_PATHS = (CHAT_PATH, "/tokenize")
"""Where a body may name a configuration; anywhere else one is an error, never silently ignored."""
RAW_PATHS = ("/v1/completions", "/tokenize", "/detokenize")
"""Where a text is the model's input as it is, control tokens and all."""
RENDERED = (
    "messages", "input", "system", "instructions", "tools", "documents", "chat_template_kwargs", "choices"
)  # fmt: skip
"""Fields of bodies whose texts become parts of conversations, at all other paths."""
CONFIGURED_PREFIX = "cpt:"
"""Begins a model name that carries a configuration."""
PREFERENCES_PREFIX = "preferences-"
"""Begins the id of a user's preferences."""
MAX_FIELD_NAME = 60
"""Characters of a field's name that are looked at and repeated."""
MIN_SIMILARITY = 0.87
"""How alike a name must be to that of one of our own fields to be taken for a slip."""
OTHER_NAMES = {
    "configuration": {"cpt", "conf", "config", "configs", "cfg", "rubric", "rubrics", "directive", "directives"},
    "preferences": {"pref", "prefs", "preferencesid", "preferenceid"},
}
"""Our own fields of a body, and what else they might be called (in letters alone)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """What one request asks for beside the chat."""

    data: Mapping[str, Any]
    """The body as it came."""
    model: Any
    """The model's name as vLLM is to have it, without what the name carried; None if the body names none."""
    catalog: Catalog
    """What this model can be asked for."""
    configuration: ResolvedConfiguration | None
    """None if the body names none."""
    preferences: str | None
    """The id of a user's preferences; None if the body names none."""

    def body(self, configuration: ResolvedConfiguration) -> bytes:
        """For vLLM, with the directive of `configuration` in the messages; UserError if there is no place for it."""
        data = {name: value for name, value in self.data.items() if name not in OTHER_NAMES}
        if self.model is not None:
            data["model"] = self.model
        data["messages"] = policy_messages(configuration.directive, _checked_messages(data.get("messages")))
        try:
            return json.dumps(data).encode()
        except RecursionError:
            raise UserError("body: nested too deeply") from None


class RequestParser:
    """How the requests of one server are read."""

    def __init__(
        self,
        catalogs: Mapping[str, Catalog],
        has_preferences: bool = False,
        vllm_fields: frozenset[str] = frozenset(),
        control_token_pattern: re.Pattern[str] | None = None,
    ):
        """`catalogs`: what each served model can be asked for, the default model first.

        `vllm_fields`: names of vLLM's own fields.
        `control_token_pattern`: finds a control token of the model in a text.
        """
        self._catalogs, self._has_preferences = catalogs, has_preferences
        self._vllm_fields, self._control_token_pattern = vllm_fields, control_token_pattern
        self._rubrics = frozenset(rubric.id for catalog in catalogs.values() for rubric in catalog.rubrics)

    def read(self, scope: Mapping[str, Any], path: str, body: bytes) -> dict[str, Any] | None:
        """The body's JSON object, None if it is no such; UserError for what is wrong in the request at any path."""
        self._check_address(scope)
        data = read_object(body)
        self._check_texts(path, data or {})
        return data

    def parse(self, path: str, data: Mapping[str, Any]) -> ParsedRequest:
        """UserError for a bad configuration, or one where none is understood."""
        self._check_fields(data)
        model, preferences = data.get("model"), data.get("preferences")
        named, text = self._split_model(model)
        if self._has_preferences and preferences is None and text is not None and text.startswith(PREFERENCES_PREFIX):
            preferences, text = text, None
        if preferences is not None and path not in CHAT_PATHS:
            raise UserError(f"preferences: not understood here; send it with messages to {CHAT_PATH}")
        if preferences is not None and not isinstance(preferences, str):
            raise UserError(f"preferences: found {kind_of(preferences)}; give the id of a state, as a text")
        model = model if named is None else named
        default = next(iter(self._catalogs.values()))
        catalog = self._catalogs.get(model, default) if isinstance(model, str) else default
        configuration = self._resolve(path, data, catalog, text)
        return ParsedRequest(
            data=data, model=model, catalog=catalog, configuration=configuration, preferences=preferences
        )

    def _resolve(
        self, path: str, data: Mapping[str, Any], catalog: Catalog, text: str | None
    ) -> ResolvedConfiguration | None:
        """`text`: a configuration that the model's name carries."""
        is_in_body = "configuration" in data
        if not is_in_body and text is None:
            return None
        if path not in CHAT_PATHS:
            raise UserError(f"configuration: not understood here; send it with messages to {CHAT_PATH}")
        if text is None:
            return catalog.resolve(data["configuration"])
        if is_in_body:
            raise UserError("configuration: given twice, also in the model's name; leave one out")
        try:
            return catalog.resolve_text(text)
        except UserError as error:
            raise UserError(str(error).replace("configuration", "model", 1)) from None

    def _split_model(self, model: Any) -> tuple[str | None, str | None]:
        """(served model, what follows) of a name like `cpt:ornament=high` or `MODEL:ornament=high`; else two None."""
        prefix, colon, text = model.partition(":") if isinstance(model, str) else ("", "", "")
        if not colon or model in self._catalogs:
            return None, None
        if prefix + colon == CONFIGURED_PREFIX:
            return next(iter(self._catalogs)), text
        return (prefix, text) if prefix in self._catalogs else (None, None)

    # ------------------------------------------------------------ what would be silently ignored

    def _check_fields(self, data: Mapping[str, Any]) -> None:
        """UserError for a misspelt name of a field of ours, or one in the wrong place."""
        for name, value in data.items():
            if name in self._vllm_fields or name in OTHER_NAMES:
                continue
            if name.lower() in ("extra_body", "extrabody") and value:
                raise UserError(
                    f"{name}: an argument of the openai client for Python, and no field of a body; "
                    "put what is in it beside `model` and `messages`"
                )
            if meant := _meant(name):
                raise UserError(f'{name[:MAX_FIELD_NAME]}: no field is called so (did you mean "{meant}"?)')
            if name in self._rubrics:
                raise UserError(f'{name}: a rubric, not a field; put it into "configuration": {{"{name}": ...}}')
        if data.get("preferences") is not None and not self._has_preferences:
            raise UserError("preferences: not offered by this server; name a configuration")
        messages = data.get("messages")
        for at, message in enumerate(messages if isinstance(messages, list) else ()):
            for name in OTHER_NAMES:
                if isinstance(message, dict) and name in message:
                    raise UserError(f"messages[{at}].{name}: not read here; put it beside `messages`")

    def _check_address(self, scope: Mapping[str, Any]) -> None:
        """UserError for a configuration in the query or in a header."""
        for name, _ in parse_qsl(scope.get("query_string", b"").decode("latin-1"), keep_blank_values=True):
            if meant := _meant(name) or ("configuration" if name in self._rubrics else None):
                raise UserError(f'{name[:MAX_FIELD_NAME]}: not read from the address; put "{meant}" into the body')
        for header, _ in scope["headers"]:
            if _meant(header.decode("latin-1").removeprefix("x-")):
                raise UserError(
                    f"{header.decode('latin-1')[:MAX_FIELD_NAME]}: not read from a header; put it into the body"
                )

    def _check_texts(self, path: str, data: Mapping[str, Any]) -> None:
        """UserError for a control token in what a chat template will render: it would end a turn and begin another."""
        for name in RENDERED if path not in RAW_PATHS else ():
            for text in strings_in(data.get(name)):
                if token := find_control_token(self._control_token_pattern, text):
                    raise UserError(
                        f"{name}: a text holds the control token {token!r}, which would end or begin a turn; "
                        "leave it out, or write it otherwise"
                    )


@functools.lru_cache(1024)
def _meant(name: str) -> str | None:
    """The field of ours that a name looks like."""
    letters = re.sub("[^a-z]", "", name[:MAX_FIELD_NAME].partition("[")[0].lower())
    for field, others in OTHER_NAMES.items():
        bare = letters.removeprefix("cpt") or letters
        is_near = bare[:1] == field[0] and difflib.SequenceMatcher(None, bare, field).ratio() >= MIN_SIMILARITY
        if bare in others or is_near:
            return field
    return None


def _checked_messages(messages: Any) -> list[dict[str, Any]]:
    """The messages as they came, but the content of a leading system message as one text."""
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("messages: expected a list of messages, each with a role and a content")
    if not messages or messages[0].get("role") != "system":
        return messages
    parts = messages[0].get("content")
    if isinstance(parts, str):
        return messages
    texts = [part.get("text") if isinstance(part, dict) else None for part in parts] if isinstance(parts, list) else []
    text = "\n".join(part for part in texts if isinstance(part, str))  # as vLLM joins them
    if not text or not all(isinstance(part, str) for part in texts):
        raise UserError("messages[0].content: expected text (or a list of text parts) in a system message")
    return [{**messages[0], "content": text}, *messages[1:]]


# ---------------------------------------------------------------- JSON

_SURROGATES = (re.compile(rb"\\u[dD][89a-fA-F]"), re.compile(rb"\xed[\xa0-\xbf]"))
"""In UTF-8, as an escape (of a pair or not) and as such; two patterns, since a fixed beginning is searched for fast."""


def read_object(body: bytes) -> dict[str, Any] | None:
    """The JSON object that a body is; None for anything else, which is vLLM's to refuse.

    UserError for a name given twice, of which one value would be lost, and for half a character, which no tokenizer
    takes.
    """
    try:
        data = json.loads(body, object_pairs_hook=unique_names)
    except UserError:
        raise
    except (ValueError, RecursionError):
        return None
    is_wide = b"\0" in body[:4]  # UTF-16 or UTF-32
    may_have = is_wide or any(pattern.search(body) for pattern in _SURROGATES)
    if may_have and (where := _surrogate_in(data) or _surrogate_in_arguments(data)):
        raise UserError(f"{where}: holds half a character (a lone surrogate, like \\ud83d); send whole ones")
    return data if isinstance(data, dict) else None


def _surrogate_in_arguments(data: Any) -> str | None:
    """The same, in the JSON texts of tool calls, which vLLM reads for the chat template."""
    messages = data.get("messages") if isinstance(data, dict) else None
    for at, message in enumerate(messages if isinstance(messages, list) else ()):
        with contextlib.suppress(AttributeError, KeyError, RecursionError, TypeError, ValueError):
            for call in message["tool_calls"]:
                if _surrogate_in(json.loads(call["function"]["arguments"])) is not None:
                    return f"messages[{at}].tool_calls"
    return None


def _surrogate_in(data: Any) -> str | None:
    """Where half a character is, like "messages[0].content"; None if there is none."""
    with contextlib.suppress(RecursionError):
        try:
            json.dumps(data, ensure_ascii=False).encode()
            return None
        except UnicodeEncodeError:
            pass
    left = [("", data)]
    while left:
        where, value = left.pop()
        if isinstance(value, str) and lone_surrogate(value):
            return where or "body"
        if isinstance(value, list):
            left += [(f"{where}[{at}]", item) for at, item in enumerate(value)]
        if isinstance(value, dict):
            if lone_surrogate(list(value)):
                return f"{where}.(a name)" if where else "(a name)"
            left += [(f"{where}.{name[:MAX_FIELD_NAME]}".removeprefix("."), item) for name, item in value.items()]
    return None
