"""What a model is given, token by token: rows of one prompt and its answers, made by the model's chat template, and
kept in files."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.chat.templates import DROPS, ChatTemplate, Rendering, own_stop_tokens
from cpt_ray.errors import UserError
from cpt_ray.tables.files import replacing
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import AnyPath, readable

NOTHING_MORE: Mapping[str, Any] = MappingProxyType({})
"""No further arguments of a template."""
SHARD_ROWS = 256
"""Rows in a row group of their file, or in a shard of the reference."""
SCHEMA = pa.schema(
    {name: pa.string() for name in ("cell_id", "rubric_id", "level")}
    | {"prompt": pa.list_(pa.int32()), "answers": pa.list_(pa.list_(pa.int32())), "levels": pa.list_(pa.string())}
    | {name: pa.list_(pa.int32()) for name in ("chosen", "rejected")}
    | {"ref_logps": pa.list_(pa.float64())}
)
"""Of a file of rows."""


class Row(TypedDict):
    """One training example: a prompt, its distinct answers, and pairs as indices into them."""

    cell_id: str
    rubric_id: str
    level: str
    """Of the directive; it and the two ids are "" where there are none."""
    prompt: list[int]
    """Token ids of directive and user message."""
    answers: list[list[int]]
    levels: list[str]
    """For each answer, its level."""
    chosen: list[int]
    """For each pair, the index of its chosen answer."""
    rejected: list[int]
    ref_logps: list[float]
    """For each answer, the reference model's log-probability in nats; empty until it is known."""


class Unfit(ValueError):
    """A pair that cannot be trained on: (reason, detail) of its reject."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Tokeniser:
    """Token ids of prompts and answers by a chat template; each distinct conversation is rendered once.

    What is wrong with the template is a UserError, what is wrong with one text is `Unfit`.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any], stop_ids: Collection[int] | None = None):
        """`stop_ids`: at which the model ends an answer; the tokenizer's own unless given."""
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, template_kwargs)
        self._stop_ids = own_stop_tokens(tokenizer) if stop_ids is None else stop_ids
        self._prompts: dict[str, Rendering] = {}
        self._answers: dict[str, tuple[int, ...]] = {}
        self._numbers: dict[int, int] = {}
        """One object for each token id, so that millions of them take 8 bytes each instead of 36."""

    def forget(self) -> None:
        """Forgets the conversations that were rendered: others follow, which share none with them."""
        self._prompts.clear()
        self._answers.clear()

    def _shared(self, ids: Iterable[int]) -> tuple[int, ...]:
        return tuple(self._numbers.setdefault(each, each) for each in ids)

    def check(self, has_system: bool = True) -> list[str]:
        """What the template adds to conversations, in lines for the user; UserError if it loses anything."""
        return self._template.check(self._stop_ids, has_system)

    def prompt(self, messages: list[ChatMessage], more: Mapping[str, Any] = NOTHING_MORE) -> tuple[int, ...]:
        """Ids of a conversation that waits for its answer.

        Args:
            more: arguments of the template beside the model's own, such as `tools`.
        """
        return self._prompt(messages, more).ids

    def _prompt(self, messages: list[ChatMessage], more: Mapping[str, Any]) -> Rendering:
        key = content_id(messages, dict(more))
        if key not in self._prompts:
            self._refuse_control_tokens([messages, more.get("tools")])
            rendering = self._template.rendering(messages, more=more)
            if where := self._template.missing(rendering.text, messages, more.get("tools", ())):
                raise UserError(f"policy: its chat template drops the {where}; {DROPS}")
            self._prompts[key] = rendering._replace(ids=self._shared(rendering.ids))
        return self._prompts[key]

    def answer(
        self, messages: list[ChatMessage], answer: list[ChatMessage], more: Mapping[str, Any] = NOTHING_MORE
    ) -> tuple[int, ...]:
        """Ids that the answer adds to its prompt's."""
        key = content_id(messages, answer, dict(more))
        if key not in self._answers:
            prompt = self._prompt(messages, more)
            self._refuse_control_tokens(answer)
            whole = self._template.rendering(messages + answer, is_finished=True, more=more)
            self._answers[key] = self._shared(self._template.answer_ids(prompt, whole, answer, self._stop_ids))
        return self._answers[key]

    def begun(self, messages: list[ChatMessage], answer: ChatMessage) -> tuple[int, ...]:
        """Ids that an answer adds to its prompt's if it goes on after its text: no end mark is among them."""
        key = content_id(messages, answer, "begun")
        if key not in self._answers:
            self.answer(messages, [answer])  # all that can be wrong with it
            prompt = self._prompt(messages, NOTHING_MORE)
            whole = self._template.rendering([*messages, answer], is_finished=True)
            try:
                self._answers[key] = self._shared(self._template.begun_ids(prompt, whole, answer["content"]))
            except ValueError as error:
                raise Unfit("cut answer", str(error)) from None
        return self._answers[key]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """Ids of an answer's own text, without an end mark."""
        self._refuse_control_tokens(text)
        return self._template.encode(text)

    def text(self, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a plain prompt and of what a plain answer, with an end mark, adds to it."""
        end = self._tokenizer.eos_token
        if end is None:
            raise UserError("policy: its tokenizer has no end-of-text token (eos_token), so a plain answer has no end")
        answer = answer.removesuffix(end)
        self._refuse_control_tokens([prompt, answer])
        prompt_ids, whole = (
            tuple(self._tokenizer(text, verbose=False)["input_ids"]) for text in (prompt, prompt + answer + end)
        )
        if whole[: len(prompt_ids)] != prompt_ids:
            raise Unfit(
                "shares a token", f"the tokenizer joins the prompt's end {prompt[-30:]!r} and the answer's start"
            )
        return prompt_ids, whole[len(prompt_ids) :]

    def _refuse_control_tokens(self, texts: Any) -> None:
        if token := self._template.special_token(texts):
            raise Unfit("control token", f"{token!r} is a special token of the policy and would not be read as text")


def sequence_ids(row: Row) -> list[str]:
    """For each answer, the hash of its and its prompt's token ids: the key in the reference table."""
    return [content_id(row["prompt"], answer) for answer in row["answers"]]


def num_tokens(row: Row) -> int:
    """Tokens that are run: the prompt's last one is run in front of every answer instead."""
    return len(row["prompt"]) - 1 + sum(len(answer) for answer in row["answers"])


# ---------------------------------------------------------------- the training set's file


def rows_path(run: RunDir, name: str) -> AnyPath:
    """Where `write_rows` puts them."""
    return run.train_rows.absolute() / f"{name}.parquet"


def read_rows_file(path: AnyPath) -> list[Row]:
    """The rows that `write_rows` wrote."""
    rows: list[Row] = pq.read_table(readable(path)).to_pylist()
    return rows


def write_rows(run: RunDir, name: str, rows: Sequence[Row], group_size: int = SHARD_ROWS) -> str:
    """Rows as a parquet file that every node sees, in row groups; its path."""
    path = rows_path(run, name)
    table = pa.Table.from_pylist([dict(row) for row in rows], schema=SCHEMA)
    with replacing(path) as file:
        pq.write_table(table, file, row_group_size=group_size)
    return str(path)
