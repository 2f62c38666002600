"""What a model's chat template does to conversations: looked at once, before anything expensive starts.

A template can drop the system message, a role or an answer's thoughts, add text of its own (a date, a default system
message), or end answers with nothing that the model stops at. And the text of a user or a model can hold what the
tokenizer takes for a control token (`<|im_end|>`), which would end their turn: such text is refused, never encoded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from types import MappingProxyType
from typing import Any, NamedTuple

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.errors import UserError, first_line
from cpt_ray.texts import common_length, squashed, strings_in

SYSTEM, USER, ANSWER = "Violet lanterns hum.", "Which kettle sang?", "Seven copper owls."
"""Texts of the probe conversation."""
DROPS = "use a model whose template keeps it, or leave the row out"
"""What to do about a template that drops something."""
_ROLES = {"system", "developer", "user", "assistant", "tool", "model", "human", "ai", "bot"}
_CLOCK = "clock-reading"


class Rendering(NamedTuple):
    """A conversation as the model gets it."""

    text: str
    ids: tuple[int, ...]


class ChatTemplate:
    """A tokenizer's chat template with its arguments, and the time it shows held still."""

    def __init__(self, tokenizer: Any, arguments: Mapping[str, Any], role: str = "policy"):
        """`role`: what errors call the model: its role in the run file, or its name."""
        self._tokenizer, self._arguments, self.role = tokenizer, dict(arguments), role
        self._now = datetime.now().strftime
        self._special = control_tokens(tokenizer, every=True)

    def render(
        self, messages: Sequence[ChatMessage], is_finished: bool = False, more: Mapping[str, Any] = MappingProxyType({})
    ) -> str:
        """The text of a conversation, by default one that waits for its answer; UserError if the template refuses it.

        Args:
            more: arguments of the template beside the model's own, such as `tools`.
        """
        from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError

        if not self._tokenizer.chat_template:
            raise UserError(f"{self.role}: its tokenizer has no chat template; use an instruction-tuned model")
        arguments = {"strftime_now": self._now, **self._arguments, **more, "add_generation_prompt": not is_finished}
        try:
            return str(self._tokenizer.apply_chat_template(list(messages), tokenize=False, **arguments))
        except (TemplateSyntaxError, UndefinedError) as error:
            line = f"line {error.lineno}: " if isinstance(error, TemplateSyntaxError) else ""
            raise UserError(
                f"{self.role}: its chat template is broken ({line}{first_line(error)}); mend chat_template.jinja (or "
                "chat_template in tokenizer_config.json)"
            ) from None
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = list(dict.fromkeys(message["role"] for message in messages))
            hint = "; directives are system messages, use a model that takes them" if "system" in roles else ""
            shown = ", ".join(roles)
            raise UserError(
                f"{self.role}: its chat template refuses a message ({first_line(error)}) of a conversation with "
                f"{shown} messages{hint}"
            ) from None

    def rendering(
        self, messages: Sequence[ChatMessage], is_finished: bool = False, more: Mapping[str, Any] = MappingProxyType({})
    ) -> Rendering:
        """`render`, and its token ids."""
        return self._with_ids(self.render(messages, is_finished, more))

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a rendered conversation; the template has put the beginning mark there already."""
        return tuple(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def special_token(self, said: Any) -> str:
        """The first special token in the texts of messages or other JSON values, "" if there is none."""
        return next((token for text in strings_in(said) if (token := find_control_token(self._special, text))), "")

    def missing(self, text: str, messages: Sequence[ChatMessage], tools: Sequence[Any] = ()) -> str:
        """What of `messages` and `tools` is not in their rendering `text`, the longest of it; "" if all is there.

        Spaces do not count, nor thoughts in earlier answers: templates are right to leave those out.
        """
        rendered = squashed(text)
        pieces = [
            (f"{name} of the {message['role']} message", piece)
            for at, message in enumerate(messages)
            for name, piece in _pieces(message, is_last=at == len(messages) - 1)
        ]
        pieces += [("tool", tool.get("function", tool).get("name", "")) for tool in tools]
        # the longest first, and each found place is used up: a short text is not found inside another one
        for where, piece in sorted(pieces, key=lambda named: -len(named[1])):
            forms = (squashed(piece), squashed(json.dumps(piece, ensure_ascii=False)[1:-1]))
            form = next((form for form in forms if form in rendered), None)
            if form is None:
                return f"{where} ({piece[:60]!r})"
            rendered = rendered.replace(form, "\0", 1) if form else rendered
        return ""

    def check(self, stop_ids: Collection[int] | None = None, has_system: bool = True) -> list[str]:
        """What the template adds, a line each; UserError if it drops what a system message or a user says.

        Args:
            stop_ids: token ids at which the model stops. If given, answers are looked at too: UserError if the template
                drops one, changes its prompt, or ends it with none of these.
            has_system: whether system messages are needed.
        """
        system: list[ChatMessage] = [{"role": "system", "content": SYSTEM}] if has_system else []
        prompt = [*system, {"role": "user", "content": USER}]
        text = self.render(prompt)
        if where := self.missing(text, prompt):
            raise UserError(
                f"{self.role}: its chat template drops the {where}; directives and rubrics are system messages, "
                "use a model whose template keeps them"
            )
        if stop_ids is not None:
            answer: list[ChatMessage] = [{"role": "assistant", "content": ANSWER}]
            whole = self.rendering([*prompt, *answer], True)
            self.answer_ids(self.rendering(prompt), whole, answer, stop_ids)
            added = whole.text.removeprefix(text).partition(ANSWER)[0].strip()
            if added:
                said = (
                    f"{self.role}: its chat template puts {added!r} in front of each answer, which is learned as well"
                )
                return [said, *self._notes(text)]
        return self._notes(text)

    def begun_ids(self, prompt: Rendering, whole: Rendering, text: str) -> tuple[int, ...]:
        """Token ids of an answer that goes on, without the end mark and what the template puts before it.

        Args:
            whole: the conversation with the answer as if it were finished, of which `answer_ids` approves.
            text: of the answer. ValueError if the template changes it, so that its end is not found.
        """
        end = whole.text.rfind(text.strip(), len(prompt.text))
        if end < 0:
            raise ValueError("the chat template changes its text, and the place of its end is not known")
        return self._added_ids(prompt, self._with_ids(whole.text[: end + len(text.strip())]))

    def _with_ids(self, text: str) -> Rendering:
        """A rendered text with its token ids."""
        return Rendering(text, self.encode(text))

    def _added_ids(self, prompt: Rendering, whole: Rendering) -> tuple[int, ...]:
        size = len(prompt.ids)
        # an answer that begins with a space may share a token with its prompt; never when it is generated
        is_apart = whole.ids[:size] == prompt.ids
        return whole.ids[size:] if is_apart else self.encode(whole.text[len(prompt.text) :])

    def answer_ids(
        self, prompt: Rendering, whole: Rendering, answer: Sequence[ChatMessage], stop_ids: Collection[int]
    ) -> tuple[int, ...]:
        """Token ids that an answer adds to its prompt; UserError if it is not all there, or ends with no stop token."""
        if where := self.missing(whole.text.removeprefix(prompt.text), answer):
            raise UserError(f"{self.role}: its chat template drops the {where}; {DROPS}")
        if not whole.text.startswith(prompt.text):
            at = max(0, common_length(prompt.text, whole.text) - 20)
            raise UserError(
                f"{self.role}: its chat template renders a prompt differently once it is answered "
                f"({prompt.text[at : at + 60]!r}, then {whole.text[at : at + 60]!r}); set "
                f"{self.role}.chat_template_kwargs (for Qwen3: {{enable_thinking: false}}) or use another model"
            )
        answer_ids = self._added_ids(prompt, whole)
        self._check_end(answer_ids, stop_ids)
        return answer_ids

    def _check_end(self, answer: Sequence[int], stop_ids: Collection[int]) -> None:
        """UserError unless an answer's last token, blank ones aside, is one at which the model stops."""
        last = next((token for token in reversed(answer) if not self._is_blank(token)), None)
        if last not in stop_ids:
            end = self._tokenizer.decode([last]) if last is not None else ""
            stops = ", ".join(repr(self._tokenizer.decode([token])) for token in sorted(stop_ids)) or "nothing"
            raise UserError(
                f"{self.role}: its chat template ends an answer with {end!r}, but the model stops at {stops}; a model "
                "tuned on it would never end an answer; mend the template, or eos_token_id in generation_config.json"
            )

    def _is_blank(self, token: int) -> bool:
        return not str(self._tokenizer.decode([token])).strip()

    def _notes(self, text: str) -> list[str]:
        notes = []
        bare = self._own_words(self.render([{"role": "user", "content": USER}]))
        if added := bare or self._own_words(text):
            when = "" if self._own_words(text) else " where there is no system message"
            notes.append(f"{self.role}: its chat template adds text of its own{when}: {added[:100]!r}")
        with_clock = self.render([{"role": "user", "content": USER}], more={"strftime_now": lambda _: _CLOCK})
        if _CLOCK in with_clock:
            fix = f" (fix it with {self.role}.chat_template_kwargs: {{date_string: ...}})"
            has_name = "date_string" in str(self._tokenizer.chat_template)
            notes.append(
                f"{self.role}: its chat template puts the present time into conversations{fix if has_name else ''}; a "
                "training keeps the time at which it began"
            )
        return notes

    def _own_words(self, text: str) -> str:
        """What a rendering says beside the probe's texts, control tokens and the names of roles."""
        for known in (SYSTEM, USER):
            text = text.replace(known, " ")
        text = self._special.sub(" ", text) if self._special else text
        lines = [line.strip() for line in text.splitlines()]
        return " ".join(line for line in lines if re.sub(r"\W", "", line).lower() not in {"", *_ROLES})


def _pieces(message: ChatMessage, is_last: bool) -> Iterator[tuple[str, str]]:
    """(field, text) of all that a message says."""
    content = message["content"]
    if message["role"] == "assistant" and not is_last:
        content = content.rpartition("</think>")[2]
    yield "content", content
    if is_last:
        yield from ((name, message[name]) for name in ("reasoning_content", "reasoning", "thinking") if name in message)
    for call in message.get("tool_calls", ()):
        yield from (("tool_calls", text) for text in _values(call.get("function", call)))


def _values(value: Any) -> Iterator[str]:
    """The texts in a JSON value, in order; numbers as they are written, names not."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _values(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _values(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def special_tokens(tokenizer: Any) -> dict[int, str]:
    """By id, the tokens that a tokenizer finds wherever they stand in a text, and leaves out when it decodes."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    added = added() if callable(added) else added  # Mistral's own tokenizers have a method of that name
    return {at: str(token.content) for at, token in added.items() if token.special and token.content.strip()}


def control_tokens(tokenizer: Any, every: bool = False) -> re.Pattern[str] | None:
    """Finds what would begin or end a turn, or the text; None if there is nothing.

    That is the special tokens which have a role, have the form `<|...|>`, or are in the chat template.

    Args:
        every: all special tokens, also those that are just names in code (`<filename>`): none of them is text.
    """
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    roles = {getattr(tokenizer, name, None) for name in names}
    template = str(getattr(tokenizer, "chat_template", ""))
    marks = [
        mark
        for mark in set(special_tokens(tokenizer).values())
        if every or mark in roles or mark in template or re.fullmatch(r"<[|\uff5c].*[|\uff5c]>", mark)
    ]
    return re.compile("|".join(map(re.escape, sorted(marks, key=len, reverse=True)))) if marks else None


def find_control_token(control: re.Pattern[str] | None, text: str) -> str:
    """The first control token in a text; "" if there is none."""
    match = control.search(text) if control else None
    return match.group() if match else ""


def stop_tokens(model: str, tokenizer: Any) -> set[int]:
    """Token ids at which a model ends an answer: the tokenizer's and those of its generation config."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError):  # it has none of its own
        ends = None
    return {*([ends] if isinstance(ends, int) else ends or ()), *own_stop_tokens(tokenizer)}


def own_stop_tokens(tokenizer: Any) -> set[int]:
    """The tokenizer's own end of a text, if it has one."""
    return set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
