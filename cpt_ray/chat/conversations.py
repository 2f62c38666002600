"""The one place where a conversation is rendered: for writing, directing, judging, training, evaluation, serving.

Whatever several requests share comes first (rubric, then prompt, then answer), so that the engine's prefix
cache serves it. `policy_messages` and `token_ids` are what training, evaluation and serving have in common.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from cpt_ray.rubrics.rubric import Criterion, Level, Rubric

ChatMessage = dict[str, Any]
"""{"role": ..., "content": ..., perhaps "tool_calls": ...}, as chat templates and the OpenAI API take it."""

WRITE_HEAD = "You write answers that a rubric describes. Never mention the rubric."
WRITE_TAIL = "Target level: {number} of {count}, {name} ({score:g}/100)."
DIRECT_HEAD = "You turn a rubric's level into a short instruction."
DIRECT_TAIL = (
    "Level: {number} of {count}, {name}.\n"
    "{descriptors}\n"
    "Write two or three sentences that tell a writer how to write at this level. "
    "Do not use numbers. Do not name the rubric."
)
JUDGE_HEAD = "You grade an answer with a rubric."
JUDGE_TAIL = "Criterion: {criterion}. Which level fits the answer best? Reply with one number, 1 to {count}."

JOINT_WRITE_HEAD = "You write answers that several rubrics describe at once. Never mention the rubrics."
RATIONALE_TAIL = (
    "For each criterion ({criteria}), reason in a sentence or two, then give the level that fits the answer best, "
    "1 to {count}, as JSON."
)


@functools.lru_cache
def rubric_text(rubric: Rubric) -> str:
    """The whole rubric as the writer, director and judge read it."""
    lines = [f"# {rubric.title}", rubric.objective, "", *(f"- {principle}" for principle in rubric.principles)]
    for criterion in rubric.criteria:
        lines += ["", f"## {criterion.name} ({criterion.weight:g}%)"]
        lines += [
            f"{number}. {criterion.descriptors[level.name]}" for number, level in enumerate(rubric.levels, start=1)
        ]
    return "\n".join(lines)


def _level_fields(rubric: Rubric, level: Level) -> dict[str, Any]:
    number = rubric.levels.index(level) + 1
    return {"number": number, "count": len(rubric.levels), "name": level.name, "score": level.score}


def _level_descriptors(rubric: Rubric, level: Level) -> str:
    return "\n".join(f"- {criterion.name}: {criterion.descriptors[level.name]}" for criterion in rubric.criteria)


@functools.lru_cache
def _write_tail(rubric: Rubric, level: Level) -> str:
    return f"{WRITE_TAIL.format(**_level_fields(rubric, level))}\n{_level_descriptors(rubric, level)}"


def _chat(system: str, user: str) -> list[ChatMessage]:
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]


def writer_messages(rubric: Rubric, level: Level, prompt: str) -> list[ChatMessage]:
    """The whole rubric, the prompt, then the level asked for."""
    return _chat(f"{WRITE_HEAD}\n\n{rubric_text(rubric)}", f"{prompt}\n\n{_write_tail(rubric, level)}")


def joint_writer_messages(targets: Sequence[tuple[Rubric, Level]], prompt: str) -> list[ChatMessage]:
    """The same for the targets of several rubrics in one answer."""
    rubrics = "\n\n".join(rubric_text(rubric) for rubric, _ in targets)
    tails = [f"{rubric.title}: {_write_tail(rubric, level)}" for rubric, level in targets]
    return _chat(f"{JOINT_WRITE_HEAD}\n\n{rubrics}", "\n\n".join([prompt, *tails]))


def director_messages(rubric: Rubric, level: Level) -> list[ChatMessage]:
    """Asks for a directive: what the policy will see instead of (rubric, level)."""
    tail = DIRECT_TAIL.format(**_level_fields(rubric, level), descriptors=_level_descriptors(rubric, level))
    return _chat(f"{DIRECT_HEAD}\n\n{rubric_text(rubric)}", tail)


def judge_messages(rubric: Rubric, criterion: Criterion, prompt: str, answer: str) -> list[ChatMessage]:
    """Asks for one criterion's level as one token; a text's criteria share everything but the last line."""
    tail = JUDGE_TAIL.format(criterion=criterion.name, count=len(rubric.levels))
    return _chat(f"{JUDGE_HEAD}\n\n{rubric_text(rubric)}", f"Prompt:\n{prompt}\n\nAnswer:\n{answer}\n\n{tail}")


def rationale_messages(rubric: Rubric, prompt: str, answer: str) -> list[ChatMessage]:
    """Asks for a reason and a level for every judged criterion, in JSON of `rationale_schema`."""
    criteria = ", ".join(criterion.name for criterion in rubric.judged)
    tail = RATIONALE_TAIL.format(criteria=criteria, count=len(rubric.levels))
    return _chat(f"{JUDGE_HEAD}\n\n{rubric_text(rubric)}", f"Prompt:\n{prompt}\n\nAnswer:\n{answer}\n\n{tail}")


def rationale_schema(rubric: Rubric) -> dict[str, Any]:
    """{criterion: {"reason": text, "level": number}}, the reason before the level it leads to."""
    level = {"type": "integer", "enum": list(range(1, len(rubric.levels) + 1))}
    verdict = {
        "type": "object",
        "properties": {"reason": {"type": "string", "maxLength": 400}, "level": level},
        "required": ["reason", "level"],
        "additionalProperties": False,
    }
    names = [criterion.name for criterion in rubric.judged]
    properties = dict.fromkeys(names, verdict)
    return {"type": "object", "properties": properties, "required": names, "additionalProperties": False}


def policy_messages(directive: str | None, messages: str | Sequence[Mapping[str, str]]) -> list[ChatMessage]:
    """What the tuned model sees: the directive as the system message, in front of the user's own if there is one.

    `messages`: a conversation, or the one prompt of which it consists.
    """
    rest = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(map(dict, messages))
    if not directive:
        return rest
    if rest and rest[0].get("role") == "system":
        rest[0]["content"] = f"{directive}\n\n{rest[0]['content']}"
        return rest
    return [{"role": "system", "content": directive}, *rest]


def token_ids(
    tokenizer: Any,
    messages: list[ChatMessage],
    template_kwargs: Mapping[str, Any] | None = None,
    is_finished: bool = False,
) -> list[int]:
    """Token ids of a conversation, by the model's own chat template (which puts the only BOS).

    By default a prompt that waits for its answer; with `is_finished`, a conversation up to the answer's end mark.
    """
    options = {**(template_kwargs or {}), "add_generation_prompt": not is_finished}
    # not verbose: what is too long is rejected and counted, and causes no "indexing errors"
    options |= {"tokenize": True, "return_dict": False, "tokenizer_kwargs": {"verbose": False}}
    return list(tokenizer.apply_chat_template(messages, **options))


class PromptTokens:
    """`token_ids` of many conversations that share parts, such as a rubric in the system message.

    A tokenizer splits a text at its special tokens first, so a part that begins with one and ends before the next has
    the same ids in every conversation. Each part is encoded once, all new parts of a call in one batch, during which a
    fast tokenizer releases the GIL. The first conversations are compared with an encoding of their whole text. If one
    differs, or the tokenizer is not a fast one, conversations are encoded whole.
    """

    _COMPARED = 16
    _KEPT = 256

    def __init__(self, tokenizer: Any, template_kwargs: Mapping[str, Any]):
        self._tokenizer, self._kwargs, self._compared = tokenizer, template_kwargs, 0
        added = getattr(tokenizer, "added_tokens_decoder", {}).values() if getattr(tokenizer, "is_fast", False) else ()
        plain = [mark for mark in added if mark.special and not (mark.lstrip or mark.normalized or mark.single_word)]
        marks = sorted((token.content for token in plain), key=len, reverse=True)
        self._starts = re.compile("|".join(map(re.escape, marks))) if marks else None
        if self._starts:  # here, because __call__ runs in several threads, and this changes the tokenizer
            tokenizer.backend_tokenizer.no_truncation()
            tokenizer.backend_tokenizer.no_padding()
        self._known: Mapping[str, Sequence[int]] = {}

    def __call__(self, conversations: Sequence[list[ChatMessage]]) -> list[list[int]]:
        """The prompts' token ids."""
        marks, known = self._starts, self._known  # read once: another thread may replace them
        if marks is None:
            return [token_ids(self._tokenizer, messages, self._kwargs) for messages in conversations]
        render = self._tokenizer.apply_chat_template  # of one at a time: vLLM has tokenizers that take no more
        options = {"tokenize": False, "add_generation_prompt": True, **self._kwargs}
        texts = [render(messages, **options) for messages in conversations]
        parts = []
        for text in texts:
            starts = [0, *(mark.start() for mark in marks.finditer(text) if mark.start()), len(text)]
            parts.append([text[start:end] for start, end in itertools.pairwise(starts)])
        uses = Counter(itertools.chain.from_iterable(parts))
        new = [part for part in uses if part not in known]
        ids = {**known, **dict(zip(new, self._encode(new), strict=True))}
        whole = [[token for part in conversation for token in ids[part]] for conversation in parts]
        for messages, own in zip(conversations[: max(0, self._COMPARED - self._compared)], whole, strict=False):
            self._compared += 1
            if own != token_ids(self._tokenizer, messages, self._kwargs):
                self._starts = None
                return self(conversations)
        self._known = {part: ids[part] for part, count in uses.most_common(self._KEPT) if count > 1 or part in known}
        return whole

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Calls the Rust tokenizer directly: the Python call also builds offsets and masks as lists, under the GIL."""
        encodings = self._tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]


def level_labels(rubric: Rubric) -> list[str]:
    """The judge's possible replies, lowest level first."""
    return [str(number) for number in range(1, len(rubric.levels) + 1)]
