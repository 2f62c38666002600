"""What is trained on: tokenised pairs, and the rows of a cell's grid that they make.

The K(K-1) ordered pairs of a cell's K answers need K x K log-probabilities: one per (directive, answer). Two rows of
this grid share nothing, since a directive comes first in its prompt; within a row, all answers follow the same prompt.
So a row is the unit of training: its prompt and each of its answers are run once, whichever pairs they are in. In any
other preference set, the pairs of one prompt are a row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cpt_ray.config import PreferencesConfig
from cpt_ray.errors import UserError
from cpt_ray.prompting import ChatMessage, token_ids
from cpt_ray.prompts import read_rows
from cpt_ray.records import Message, Pair, Reject, content_id


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """A pair as the policy sees it, of the run's own or of any preference set."""

    pair_id: str
    twin_id: str
    """`pair_id` where there are no twins."""
    prompt_id: str
    cell_id: str = ""
    """"" where there are no cells; the same holds for the rubric and the levels."""
    rubric_id: str = ""
    level: str = ""
    rejected_level: str = ""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    """The answer's end mark included."""
    rejected_ids: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


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


# ---------------------------------------------------------------- tokenising


class Tokeniser:
    """Token ids of prompts and answers by a chat template; each distinct conversation is rendered once."""

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any]):
        self._tokenizer, self._kwargs = tokenizer, template_kwargs
        self._seen: dict[str, tuple[int, ...]] = {}

    def prompt(self, messages: list[ChatMessage]) -> tuple[int, ...]:
        """Ids of a conversation that waits for its answer; UserError if the template loses the directive."""

        def render() -> list[int]:
            if not self._tokenizer.chat_template:
                raise UserError("policy: its tokenizer has no chat template; use an instruction-tuned model")
            text = self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **self._kwargs
            )
            if any(one["role"] == "system" and one["content"].strip() not in text for one in messages):
                raise UserError(
                    "policy: its chat template drops the system message, where the directive is; use another model"
                )
            return token_ids(self._tokenizer, messages, self._kwargs)

        return self._once(messages, False, render)

    def answer(self, messages: list[ChatMessage], answer: list[ChatMessage]) -> tuple[int, ...]:
        """Ids that the answer adds to its prompt's; UserError if the two cannot be told apart."""
        prompt, both = self.prompt(messages), messages + answer
        whole = self._once(both, True, lambda: token_ids(self._tokenizer, both, self._kwargs, True))
        if whole[: len(prompt)] != prompt:
            raise UserError(
                f"policy: its chat template renders a prompt otherwise once it is answered ({prompt[-5:]} and "
                f"{whole[len(prompt) - 5 : len(prompt)]} at its end); set policy.chat_template_kwargs (for example "
                "{enable_thinking: false}) or use another model"
            )
        return whole[len(prompt) :]

    def text(self, prompt: str, answer: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Ids of a plain prompt and of what a plain answer, with an end mark, adds to it."""
        end = self._tokenizer.eos_token
        prompt_ids = tuple(self._tokenizer(prompt)["input_ids"])
        whole = tuple(self._tokenizer(prompt + answer.removesuffix(end) + end)["input_ids"])
        if whole[: len(prompt_ids)] != prompt_ids:
            raise UserError(f"preferences: a prompt and its answer share a token ({prompt[-30:]!r}); end it at a word")
        return prompt_ids, whole[len(prompt_ids) :]

    def _once(self, messages: list[ChatMessage], is_whole: bool, render: Callable[[], list[int]]) -> tuple[int, ...]:
        from jinja2 import TemplateError

        key = content_id(messages, is_whole)
        if key not in self._seen:
            try:
                self._seen[key] = tuple(render())
            except TemplateError as error:
                raise UserError(
                    f"policy: its chat template refuses a message ({str(error).splitlines()[0]}); "
                    "directives are system messages, use a model that takes them"
                ) from None
        return self._seen[key]


def own_pairs(pairs: Iterable[Pair], tokeniser: Tokeniser) -> list[TokenPair]:
    """The run's pairs, tokenised."""
    return [
        TokenPair(
            pair_id=one.pair_id,
            twin_id=one.twin_id,
            cell_id=one.cell_id,
            prompt_id=one.prompt_id,
            rubric_id=one.rubric_id,
            level=one.level,
            rejected_level=one.rejected_level,
            prompt_ids=tokeniser.prompt(_chat(one.prompt)),
            chosen_ids=tokeniser.answer(_chat(one.prompt), _chat(one.chosen)),
            rejected_ids=tokeniser.answer(_chat(one.prompt), _chat(one.rejected)),
        )
        for one in pairs
    ]


def _chat(messages: Sequence[Message]) -> list[ChatMessage]:
    return [{"role": one.role, "content": one.content} for one in messages]


def preference_pairs(config: PreferencesConfig, tokeniser: Tokeniser) -> list[TokenPair]:
    """Any preference set in TRL's format (text or messages, prompt explicit or not); UserError names the bad row."""
    pairs = []
    for number, row in enumerate(read_rows(config), start=1):
        try:
            prompt, chosen, rejected = _preference(row, tokeniser)
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{config.source}: row {number}: found {', '.join(map(str, row))}; expected TRL's preference format: "
                "chosen and rejected, and mostly prompt, all of them text or all of them lists of {role, content}"
            ) from None
        if not (prompt and chosen and rejected):
            raise UserError(f"{config.source}: row {number}: an empty prompt or answer; leave it out")
        name = content_id(prompt, chosen, rejected)
        pairs.append(
            TokenPair(
                pair_id=name,
                twin_id=name,
                prompt_id=content_id(prompt),
                prompt_ids=prompt,
                chosen_ids=chosen,
                rejected_ids=rejected,
            )
        )
    return list({one.pair_id: one for one in pairs}.values())


def _preference(row: Mapping[str, Any], tokeniser: Tokeniser) -> tuple[tuple[int, ...], ...]:
    """(prompt, chosen, rejected) ids of a row in TRL's format."""
    if row.get("prompt") is None:
        from trl.data_utils import extract_prompt

        row = extract_prompt(dict(row))
    answers = row["chosen"], row["rejected"]
    if isinstance(row["prompt"], str):
        prompt = tokeniser.text(row["prompt"], answers[0])[0]
        return prompt, *(tokeniser.text(row["prompt"], one)[1] for one in answers)
    messages, *both = ([{"role": m["role"], "content": m["content"]} for m in one] for one in (row["prompt"], *answers))
    return tokeniser.prompt(messages), *(tokeniser.answer(messages, one) for one in both)


# ---------------------------------------------------------------- selecting


def select_pairs(
    pairs: Sequence[TokenPair], max_length: int, max_pairs: int | None, held_out: int, seed: int
) -> tuple[list[TokenPair], list[TokenPair], list[Reject]]:
    """(to train on, held out, the rest with the reason). A pair and its twin stay together, all chosen by hash.

    Args:
        max_length: tokens of prompt plus answer that still fit.
        max_pairs: train on at most this many.
        held_out: at most this many, of whole prompts, and no more than a tenth of all.
    """
    twins: dict[str, list[TokenPair]] = defaultdict(list)
    for one in pairs:
        twins[min(one.pair_id, one.twin_id)].append(one)
    rejects: list[Reject] = []
    fitting: dict[str, list[TokenPair]] = {}
    for name, group in twins.items():
        longest = max(one.longest for one in group)
        if longest <= max_length:
            fitting[name] = group
            continue
        for one in group:
            answer = one.longest - len(one.prompt_ids)
            detail = f"{len(one.prompt_ids)} prompt + {answer} answer tokens, {max_length} fit"
            if one.longest <= max_length:
                detail += f"; its twin has {longest}"
            rejects.append(Reject.of("train", one, one.pair_id, "too long", detail))
    aside = _held_out_prompts([one for group in fitting.values() for one in group], held_out, seed)
    kept: set[str] = set()
    left = len(pairs) if max_pairs is None else max_pairs
    for name in sorted(fitting, key=lambda name: content_id(name, seed)):
        group = fitting[name]
        if group[0].prompt_id in aside:
            continue
        if len(group) <= left:
            kept.add(name)
            left -= len(group)
        else:
            why = f"train.max_pairs is {max_pairs}"
            rejects += [Reject.of("train", one, one.pair_id, "over max_pairs", why) for one in group]
    names = [(min(one.pair_id, one.twin_id), one) for one in pairs]
    held = [one for name, one in names if name in fitting and one.prompt_id in aside]
    return [one for name, one in names if name in kept], held, rejects


def _held_out_prompts(pairs: Sequence[TokenPair], held_out: int, seed: int) -> set[str]:
    counts: dict[str, int] = defaultdict(int)
    for one in pairs:
        counts[one.prompt_id] += 1
    found: set[str] = set()
    left = min(held_out, len(pairs) // 10)
    for name in sorted(counts, key=lambda name: content_id(name, "held out", seed)):
        if counts[name] <= left:
            found.add(name)
            left -= counts[name]
    return found


# ---------------------------------------------------------------- rows


def make_rows(pairs: Iterable[TokenPair], max_pairs: int) -> list[Row]:
    """Pairs grouped by cell and prompt, in order; what has more than `max_pairs` pairs becomes several rows."""
    groups: dict[tuple[str, tuple[int, ...]], list[TokenPair]] = defaultdict(list)
    for one in pairs:
        groups[one.cell_id, one.prompt_ids].append(one)
    return [
        _make_row(group[start : start + max_pairs])
        for group in groups.values()
        for start in range(0, len(group), max_pairs)
    ]


def _make_row(pairs: Sequence[TokenPair]) -> Row:
    answers: dict[tuple[int, ...], tuple[int, str]] = {}

    def index(ids: tuple[int, ...], level: str) -> int:
        return answers.setdefault(ids, (len(answers), level))[0]

    first = pairs[0]
    chosen = [index(one.chosen_ids, one.level) for one in pairs]
    rejected = [index(one.rejected_ids, one.rejected_level) for one in pairs]
    return Row(
        cell_id=first.cell_id,
        rubric_id=first.rubric_id,
        level=first.level,
        prompt=list(first.prompt_ids),
        answers=[list(one) for one in answers],
        levels=[level for _, level in answers.values()],
        chosen=chosen,
        rejected=rejected,
        ref_logps=[],
    )


def steps_per_epoch(num_pairs: int, step_pairs: int) -> int:
    """Optimizer steps: a step has `step_pairs` pairs on average, or a little more."""
    return max(1, num_pairs // step_pairs)


def sequence_ids(row: Row) -> list[str]:
    """For each answer, the hash of its and its prompt's token ids: the key in the reference table."""
    return [content_id(row["prompt"], one) for one in row["answers"]]


# ---------------------------------------------------------------- metrics of twins


def held_out_metrics(rows: Sequence[Row], logps: Sequence[Sequence[float]]) -> dict[str, float]:
    """What tells whether the policy reads its directive, from log-probabilities (nats) of each row's answers.

    A pair is right if the policy raised its chosen answer above its rejected one, against the reference.

    Returns:
        pair_accuracy, and accuracy/RUBRIC/LEVEL by the directive's.
        twin_accuracy: over the pairs whose twin is there; 0.5 means that the directive is ignored.
        swap_gap: nats per token by which an answer is likelier under its own directive than under its twin's.
        drift: nats per token by which the answers became unlikelier than under the reference (the divergence
            KL(reference || policy), were they drawn from the reference).
        length_drift: share of pairs whose longer answer is preferred, less the share whose longer answer is chosen.
    """
    right: dict[str, list[float]] = defaultdict(list)
    swaps: dict[tuple[str, str, str], tuple[float, bool]] = {}
    own: dict[tuple[str, str], tuple[float, int]] = {}
    longer: list[float] = []
    lost, tokens = 0.0, 0
    for row, found in zip(rows, logps, strict=True):
        lengths = [len(one) for one in row["answers"]]
        gains = [new - old for new, old in zip(found, row["ref_logps"], strict=True)]
        lost, tokens = lost - sum(gains), tokens + sum(lengths)
        for chosen, rejected in zip(row["chosen"], row["rejected"], strict=True):
            is_right = gains[chosen] > gains[rejected]
            right["pair_accuracy"].append(is_right)
            if lengths[chosen] != lengths[rejected]:
                chosen_is_longer = lengths[chosen] > lengths[rejected]
                longer.append((chosen_is_longer == is_right) - chosen_is_longer)
            if row["rubric_id"]:
                right[f"accuracy/{row['rubric_id']}/{row['level']}"].append(is_right)
                swaps[row["cell_id"], row["level"], row["levels"][rejected]] = (found[rejected], is_right)
                own[row["cell_id"], row["level"]] = (found[chosen], lengths[chosen])
    gaps = []
    for (cell, level, other), (_, is_right) in swaps.items():
        if twin := swaps.get((cell, other, level)):
            right["twin_accuracy"].append(is_right)
            logp, length = own[cell, level]
            gaps.append((logp - twin[0]) / length)
    means = {name: sum(values) / len(values) for name, values in right.items()}
    means |= {"swap_gap": sum(gaps) / len(gaps)} if gaps else {}
    return means | {"drift": lost / tokens, "length_drift": sum(longer) / len(longer) if longer else 0.0}
