"""Preference data of others: which layouts are read, and what each row compares.

All preference layouts that TRL documents are read (text or messages, the prompt given or left in both answers, `tools`
and `chat_template_kwargs` beside it), and those of the public sets used most:

    UltraFeedback, Tulu    prompt (a text), and the whole conversations as chosen and rejected
    Capybara               whole conversations as chosen and rejected
    Orca                   system, question (or input), chosen, rejected: texts, read as messages
    HH-RLHF                whole dialogues as text, with "\\n\\nHuman:" and "\\n\\nAssistant:" in front of the turns

A row that could be read in two ways, or whose context is in a column that is not read, is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.errors import UserError, kind_of
from cpt_ray.texts import common_length, is_blank, lone_surrogate, refuse_messages_in, squashed
from cpt_ray.training.messages import Turns, from_json, is_empty, read_turns, without_nulls

ANSWERS = ("chosen", "rejected")
QUESTION_COLUMNS = ("question", "input")
"""Columns that hold the user's message in the layout of Orca's pairs."""
SYSTEM_COLUMNS = ("system", "system_prompt")
READ_COLUMNS = {"prompt", *ANSWERS, *QUESTION_COLUMNS, *SYSTEM_COLUMNS, "tools", "chat_template_kwargs"}
CONTEXT_COLUMNS = {
    "instruction",
    "instructions",
    "context",
    "history",
    "query",
    "passage",
    "document",
    "documents",
    *QUESTION_COLUMNS,
}
"""Columns that, beside a prompt, are likely a part of it."""
MEDIA_COLUMNS = {"image", "images", "video", "videos", "audio", "audios"}
DIALOGUE_MARK, HUMAN_MARK = "\n\nAssistant:", "\n\nHuman:"
"""In front of each turn in HH-RLHF."""
ECHO_WORDS = 3
"""Of a prompt with which both answers begin: a shorter one may be a greeting that is answered with the same."""
MESSAGE_FIELDS = {"role", "content", "tool_calls", "tool_call_id", "name", "reasoning_content", "reasoning", "thinking"}
"""Of a message, those that chat templates know."""
RESERVED_ARGUMENTS = {
    "add_generation_prompt",
    "continue_final_message",
    "tokenize",
    "return_dict",
    "messages",
    "conversation",
}
"""Arguments of chat templates that this program sets itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Two answers to the same prompt: all three are texts, or all three are messages."""

    prompt: Turns
    chosen: Turns
    rejected: Turns
    dialogue: Turns
    """What the prompt's id is a hash of: the prompt or, in whole dialogues, the text up to the last answer."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template that the row brings: `tools` and its `chat_template_kwargs`."""
    is_implicit: bool = False
    """Whether the prompt is what two texts have in common."""


def read_comparisons(rows: Sequence[Mapping[str, Any]], source: str) -> list[Comparison]:
    """One per row, in order; UserError with the row's number, the column and what to do."""
    if not rows:
        raise UserError(f"{source}: there are no rows in it")
    has_system = any(name in row for row in rows for name in SYSTEM_COLUMNS)
    comparisons: list[Comparison] = []
    for number, row in enumerate(rows, start=1):
        try:
            comparison = _comparison(row, has_system)
        except UserError as error:
            raise UserError(f"{source}: row {number}: {error}") from None
        if comparisons and isinstance(comparison.prompt, str) != isinstance(comparisons[0].prompt, str):
            kinds = ("plain text", "messages")[:: 1 if isinstance(comparison.prompt, str) else -1]
            raise UserError(f"{source}: row {number}: {kinds[0]}, but row 1 has {kinds[1]}; give all rows in one form")
        comparisons.append(comparison)
    return comparisons


def unread_fields(comparisons: Iterable[Comparison]) -> list[str]:
    """Names of the messages' fields that no chat template is known to read, such as `weight`."""
    turns = (part for each in comparisons for part in (each.prompt, each.chosen, each.rejected))
    return sorted(
        {name for part in turns if isinstance(part, list) for message in part for name in message} - MESSAGE_FIELDS
    )


def unread_columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the columns that are not read here, such as ratings."""
    names = dict.fromkeys(str(name) for row in rows for name, value in row.items() if value is not None)
    return [name for name in names if name and name not in READ_COLUMNS]


def _comparison(row: Mapping[str, Any], has_system: bool) -> Comparison:
    columns = {name: value for name, value in row.items() if not _is_missing(value)}
    for name in columns:
        if name in MEDIA_COLUMNS:
            raise UserError(f"column {name!r}: only text can be trained on; leave the row or the column out")
        if name in READ_COLUMNS:
            _refuse_lone_surrogates(columns[name], name)
    chosen, rejected = (read_turns(row, name) for name in ANSWERS)
    prompt = read_turns(columns, "prompt") if "prompt" in columns else None
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError("chosen and rejected: one is text, the other is messages; give both in the same form")
    if isinstance(chosen, str) and isinstance(rejected, str):
        if empty := [name for name in ("prompt", *QUESTION_COLUMNS) if name in row and name not in columns]:
            raise UserError(f"{empty[0]} is empty; fill it in, leave the row out, or the column if no row has one")
        comparison = _of_texts(columns, prompt, chosen, rejected, has_system)
    else:
        assert isinstance(chosen, list)
        assert isinstance(rejected, list)
        comparison = _of_messages(columns, prompt, chosen, rejected)
    _check(comparison)
    return comparison


def _check(comparison: Comparison) -> None:
    prompt, template = comparison.prompt, comparison.template
    if is_blank(prompt) if isinstance(prompt, str) else not prompt or is_empty(prompt[-1]):
        raise UserError("an empty prompt; give one, or leave the row out")
    for name in ("prompt", *ANSWERS, "template"):  # once more, for what stood in a text as JSON
        _refuse_lone_surrogates(getattr(comparison, name), name)
    if isinstance(prompt, list):
        _check_turns(comparison)
    elif template:
        raise UserError(f"{', '.join(template)}: only messages are rendered with it; give messages, not text")


def _refuse_lone_surrogates(value: Any, name: str) -> None:
    if escape := lone_surrogate(value):
        raise UserError(f"{name}: half a character ({escape}); correct the text, or leave the row out")


def _is_missing(value: Any) -> bool:
    return value is None or value == [] or value == {} or (isinstance(value, str) and is_blank(value))


# ---------------------------------------------------------------- two layouts


def _of_texts(
    columns: Mapping[str, Any], prompt: Turns | None, chosen: str, rejected: str, has_system: bool
) -> Comparison:
    """Of answers that are texts."""
    questions = [name for name in QUESTION_COLUMNS if name in columns]
    if prompt is None and questions:
        prompt = _user_turn(columns, questions)
    elif prompt is None:
        others = [name for name, value in columns.items() if name not in ANSWERS and _is_prose(value)]
        if others:
            raise UserError(
                f"no prompt, and {', '.join(map(repr, others))} beside chosen and rejected; name the column with the "
                "prompt `prompt` (a system message: `system`) and leave the others out"
            )
        return _of_dialogues(chosen, rejected)
    else:
        _refuse_context(columns)
        if isinstance(prompt, str):
            _refuse_echo(prompt, chosen, rejected)
    if isinstance(prompt, str) and has_system:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str):
        return _explicit(columns, prompt, chosen, rejected)
    answers = ([{"role": "assistant", "content": text}] for text in (chosen, rejected))
    return _explicit(columns, _with_system(columns, prompt), *answers)


def _refuse_echo(prompt: str, chosen: str, rejected: str) -> None:
    """UserError if both answers begin with a prompt of some length: it would be there twice."""
    is_long = len(prompt.split()) >= ECHO_WORDS
    if is_long and all(answer.lstrip().startswith(prompt.strip()) for answer in (chosen, rejected)):
        raise UserError("chosen and rejected repeat the prompt; leave it out there, or leave out the column `prompt`")


def _user_turn(columns: Mapping[str, Any], questions: Sequence[str]) -> list[ChatMessage]:
    """The message in `question` or `input`."""
    _refuse_context({name: value for name, value in columns.items() if name != questions[0]})
    text = columns[questions[0]]
    if not isinstance(text, str):
        raise UserError(f"{questions[0]}: {kind_of(text)}; expected a text")
    refuse_messages_in(text, questions[0])
    return [{"role": "user", "content": text}]


def _of_dialogues(chosen: str, rejected: str) -> Comparison:
    """Of texts that begin with their prompt; as TRL reads them, but cut between words and never at the very end."""
    start = _common_length(chosen, rejected)
    prompt = chosen[:start]
    if is_blank(prompt):
        raise UserError("an empty prompt: there is no column `prompt`, and chosen and rejected begin differently")
    mark = prompt.rfind(DIALOGUE_MARK)
    dialogue = prompt[: mark + len(DIALOGUE_MARK)] if mark >= 0 else prompt
    return Comparison(
        prompt=prompt, chosen=chosen[start:], rejected=rejected[start:], dialogue=dialogue, is_implicit=True
    )


def _common_length(chosen: str, rejected: str) -> int:
    """Where two texts part: at the end of a word, if there is a space to go back to."""
    length = common_length(chosen, rejected)
    rests = [text[length : length + 1] for text in (chosen, rejected)]
    if all(not rest or rest.isspace() for rest in rests):
        return length
    words = chosen[:length]
    cut = max((at for at, character in enumerate(words) if character.isspace()), default=0)
    return len(words[:cut].rstrip(" ")) or length


def _of_messages(
    columns: Mapping[str, Any], prompt: Turns | None, chosen: list[ChatMessage], rejected: list[ChatMessage]
) -> Comparison:
    """Of answers that are messages: the answers alone, or the whole conversations."""
    if isinstance(prompt, list):
        for name, answer in zip(ANSWERS, (chosen, rejected), strict=True):
            if answer[: len(prompt)] == prompt:
                raise UserError(f"{name} repeats the prompt; leave it out there, or leave out the column `prompt`")
        _refuse_context(columns)
        return _explicit(columns, _with_system(columns, prompt), chosen, rejected)
    shared = _shared_turns(chosen, rejected)
    lead, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    if lead and prompt is not None and not _is_about(prompt, lead):
        begins = next((turn["content"] for turn in lead if turn["role"] == "user"), lead[0]["content"])
        raise UserError(
            f"prompt is {prompt[:60]!r}, but chosen and rejected begin with {begins[:60]!r}; leave out one of them"
        )
    if not lead and prompt is not None:
        _refuse_context(columns)
        lead = [{"role": "user", "content": prompt}]
    elif not lead and (questions := [name for name in QUESTION_COLUMNS if name in columns]):
        lead = _user_turn(columns, questions)
    return _explicit(columns, _with_system(columns, lead), chosen, rejected)


def _shared_turns(chosen: Sequence[ChatMessage], rejected: Sequence[ChatMessage]) -> int:
    """How many messages two conversations begin with alike, less a last answer that is the same in both."""
    pairs = zip(chosen, rejected, strict=False)
    shared = next((at for at, (turn, other) in enumerate(pairs) if turn != other), min(len(chosen), len(rejected)))
    while 0 < shared == min(len(chosen), len(rejected)) and chosen[shared - 1]["role"] == "assistant":
        shared -= 1
    return shared


def _is_about(prompt: str, lead: Sequence[ChatMessage]) -> bool:
    """Whether a prompt's text is that of a conversation's beginning (some sets have all of it there, some one turn)."""
    text, whole = squashed(prompt), squashed("".join(turn["content"] for turn in lead))
    return text in whole or any(squashed(turn["content"]) in text for turn in lead if turn["role"] == "user")


def _explicit(columns: Mapping[str, Any], prompt: Turns, chosen: Turns, rejected: Turns) -> Comparison:
    template = _template_arguments(columns)
    return Comparison(prompt=prompt, chosen=chosen, rejected=rejected, dialogue=prompt, template=template)


def _refuse_context(columns: Mapping[str, Any]) -> None:
    others = [
        name
        for name, value in columns.items()
        if name in CONTEXT_COLUMNS and (_is_prose(value) or isinstance(value, list))
    ]
    if others:
        raise UserError(
            f"column {others[0]!r} stands beside the prompt and is not read; put it into the prompt, or leave it out"
        )


def _with_system(columns: Mapping[str, Any], prompt: list[ChatMessage]) -> list[ChatMessage]:
    """The prompt with the system column's text in front."""
    for name in SYSTEM_COLUMNS:
        if name not in columns:
            continue
        text = columns[name]
        if not isinstance(text, str):
            raise UserError(f"{name}: {kind_of(text)}; expected a text")
        if prompt and prompt[0]["role"] == "system":
            if prompt[0]["content"] != text:
                raise UserError(f"{name} and the prompt's own system message differ; leave out one of them")
            return prompt
        refuse_messages_in(text, name)
        return [{"role": "system", "content": text}, *prompt]
    return prompt


def _template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """`tools`, JSON schemas as such or in a text, and the row's `chat_template_kwargs`."""
    arguments: dict[str, Any] = {}
    if "tools" in columns:
        tools = without_nulls(from_json(columns["tools"], "tools"))
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise UserError(f"tools: {kind_of(tools)}; expected a list of JSON schemas")
        arguments["tools"] = tools
    if "chat_template_kwargs" in columns:
        more = without_nulls(from_json(columns["chat_template_kwargs"], "chat_template_kwargs"))
        if not isinstance(more, dict):
            raise UserError(f"chat_template_kwargs: {kind_of(more)}; expected an object")
        if wrong := sorted(RESERVED_ARGUMENTS & {*more}):
            raise UserError(f"chat_template_kwargs: {wrong[0]} is not for a row to set; leave it out")
        arguments |= more
    return arguments


def _is_prose(value: Any) -> bool:
    """Whether a column's value is text that a person wrote; a CSV file has numbers as texts too."""
    if not isinstance(value, str):
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def _check_turns(comparison: Comparison) -> None:
    """UserError unless the prompt waits for an answer and the answers are the assistant's."""
    if comparison.prompt[-1]["role"] == "assistant":  # type: ignore[index]
        raise UserError("prompt ends with an assistant message, which chat templates do not go on with; leave it out")
    for name in ANSWERS:
        answer = getattr(comparison, name)
        wrong = [at for at, message in enumerate(answer) if message["role"] != "assistant"]
        if wrong:
            how = "begins with" if wrong[0] == 0 else "has"
            role = answer[wrong[0]]["role"]
            raise UserError(f"{name} {how} a {role} message; an answer is what the assistant says to one prompt")
