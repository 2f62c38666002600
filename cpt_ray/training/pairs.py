"""Pairs as the policy sees them: read, tokenised, and selected to train on or to hold out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.config import PreferencesConfig
from cpt_ray.console import say
from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import Tokeniser, Unfit
from cpt_ray.prompts import read_rows
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.by_hash import shuffled
from cpt_ray.tables.records import CONTROL, Message, Pair, Reject, content_id
from cpt_ray.training.comparisons import (
    ANSWERS,
    HUMAN_MARK,
    Comparison,
    read_comparisons,
    unread_columns,
    unread_fields,
)
from cpt_ray.training.messages import is_empty_answer, same_answers


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPair:
    """A pair as the policy sees it, of the run's own or of any preference set."""

    pair_id: str
    twin_id: str
    """`pair_id` where there are no twins."""
    prompt_id: str
    cell_id: str = ""
    """Of the pair's grid; "" where there is none. The same holds for the rubric and the levels."""
    rubric_id: str = ""
    level: str = ""
    rejected_level: str = ""
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    """The answer's end mark included, unless the answer was cut."""
    rejected_ids: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longer of the two sequences."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


# ---------------------------------------------------------------- tokenising


class TokenPairs(list[TokenPair]):
    """Tokenised pairs in order, and the rejects beside them."""

    def __init__(self, pairs: Iterable[TokenPair] = (), rejects: Iterable[Reject] = ()):
        super().__init__(pairs)
        self.rejects = list(rejects)

    def add(self, more: TokenPairs) -> None:
        """Pairs and rejects of further rows."""
        self.extend(more)
        self.rejects += more.rejects


def own_pairs(pairs: Iterable[Pair], tokeniser: Tokeniser) -> TokenPairs:
    """The run's pairs, tokenised; one that cannot be goes with its twin."""
    pairs = list(pairs)
    tokenised: dict[str, TokenPair] = {}
    problems: dict[str, Unfit] = {}
    for pair in pairs:
        try:
            tokenised[pair.pair_id] = _own_pair(pair, tokeniser)
        except Unfit as unfit:
            problems[pair.pair_id] = unfit
    rejects = []
    for pair in pairs:
        problem = problems.get(pair.pair_id) or problems.get(pair.twin_id)
        if problem:
            detail = problem.detail if pair.pair_id in problems else f"its twin: {problem.detail}"
            rejects.append(Reject.of("train", pair, pair.pair_id, problem.reason, detail))
    lost = {reject.subject_id for reject in rejects}
    return TokenPairs((pair for name, pair in tokenised.items() if name not in lost), rejects)


def end_pairs(pairs: Sequence[Pair], rubrics: Sequence[Rubric]) -> tuple[list[Pair], list[Reject]]:
    """(pairs of each rubric's first and last level, the others); pairs with several rubrics or a control all stay."""
    ends = {rubric.id: {rubric.levels[0].name, rubric.levels[-1].name, CONTROL} for rubric in rubrics}
    kept, rejects = [], []
    for pair in pairs:
        if "+" in pair.rubric_id or {pair.level, pair.rejected_level} <= ends[pair.rubric_id]:
            kept.append(pair)
        else:
            rejects.append(Reject.of("train", pair, pair.pair_id, "middle level", "train.contrast is ends"))
    return kept, rejects


def _own_pair(pair: Pair, tokeniser: Tokeniser) -> TokenPair:
    prompt, chosen, rejected = (_chat(turns) for turns in (pair.prompt, pair.chosen, pair.rejected))
    # as if both were finished: answers that differ in that alone are the same
    ids = _distinct(tokeniser.prompt(prompt), tokeniser.answer(prompt, chosen), tokeniser.answer(prompt, rejected))
    if pair.chosen_is_cut:
        ids["chosen_ids"] = tokeniser.begun(prompt, chosen[-1])
    if pair.rejected_is_cut:
        ids["rejected_ids"] = tokeniser.begun(prompt, rejected[-1])
    return TokenPair(
        pair_id=pair.pair_id,
        twin_id=pair.twin_id,
        cell_id=pair.cell_id,
        prompt_id=pair.prompt_id,
        rubric_id=pair.rubric_id,
        level=pair.level,
        rejected_level=pair.rejected_level,
        **ids,
    )


def _chat(messages: Sequence[Message]) -> list[ChatMessage]:
    return [{"role": message.role, "content": message.content} for message in messages]


class _Ids(TypedDict):
    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]


def _distinct(prompt: tuple[int, ...], chosen: tuple[int, ...], rejected: tuple[int, ...]) -> _Ids:
    """The ids by the names of `TokenPair`; `Unfit` if the answers are the same."""
    if chosen == rejected:
        raise Unfit("same answers", "chosen and rejected have the same tokens")
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}


def preference_pairs(config: PreferencesConfig, tokeniser: Tokeniser) -> TokenPairs:
    """Any preference set (comparisons.py has the layouts), tokenised; rows that become no pair are rejects, and named.

    UserError names a row that cannot be read, or that the policy's template cannot render. Ids are hashes of messages,
    so that they stay the same whatever a template makes of them.
    """
    rows = list(read_rows(config))
    comparisons = read_comparisons(rows, config.source)
    if not isinstance(comparisons[0].prompt, str):  # plain text needs no template
        for note in tokeniser.check(has_system=False):  # each row's own roles are looked at below
            say(f"note: {note}")
    pairs = TokenPairs()
    first: dict[str, int] = {}
    for number, comparison in enumerate(comparisons, start=1):
        name = content_id(comparison.prompt, comparison.chosen, comparison.rejected, comparison.template)
        try:
            if name in first:
                raise Unfit("repeats another", f"row {first[name]} has the same prompt and answers")
            first[name] = number
            pairs.append(_compared_pair(name, comparison, tokeniser))
        except Unfit as unfit:
            pairs.rejects.append(Reject.of_row("train", name, unfit.reason, f"row {number}: {unfit.detail}"))
        except UserError as error:
            raise UserError(f"{config.source}: row {number}: {error}") from None
    _say_notes(config.source, rows, comparisons, pairs.rejects)
    return pairs


def _compared_pair(name: str, comparison: Comparison, tokeniser: Tokeniser) -> TokenPair:
    prompt, answers = comparison.prompt, (comparison.chosen, comparison.rejected)
    for column, answer in zip(ANSWERS, answers, strict=True):
        if not comparison.is_implicit and is_empty_answer(answer):
            raise Unfit("empty answer", f"{column} is empty")
    if comparison.is_implicit and any(HUMAN_MARK in str(answer) for answer in answers):
        raise Unfit("another turn", "an answer goes on with a turn of the human")
    if same_answers(*answers):
        raise Unfit("same answers", "chosen and rejected say the same")
    if isinstance(prompt, str):
        texts = [tokeniser.text(prompt, str(answer)) for answer in answers]
        ids = _distinct(texts[0][0], texts[0][1], texts[1][1])
    else:
        more = comparison.template
        chosen, rejected = (tokeniser.answer(prompt, list(answer), more) for answer in answers)  # type: ignore[arg-type]
        ids = _distinct(tokeniser.prompt(prompt, more), chosen, rejected)
    return TokenPair(pair_id=name, twin_id=name, prompt_id=content_id(comparison.dialogue), **ids)


def _say_notes(
    source: str, rows: Sequence[Mapping[str, Any]], comparisons: Sequence[Comparison], rejects: Sequence[Reject]
) -> None:
    """What of the set is read otherwise than its owner may expect, or not at all."""
    if isinstance(comparisons[0].prompt, str):
        say(f"note: {source} is plain text: the chat template is not used")
    if fields := unread_fields(comparisons):
        say(f"note: {source}: fields of messages that a chat template may not read: {', '.join(fields)}")
    if comparisons[0].is_implicit:
        shown = comparisons[0].prompt[-60:]
        say(f"note: {source} has no column `prompt`; it is what chosen and rejected begin with (row 1: ...{shown!r})")
    if unread := unread_columns(rows):
        say(f"note: {source}: columns that are not read: {', '.join(unread)}")
    if rejects:
        say(f"note: {source}: {len(rejects)} of {len(rows)} rows are not used: {counted(rejects)}")


def counted(rejects: Iterable[Reject]) -> str:
    """How many rejects there are of each reason, in words and with an example of each."""
    groups: dict[str, list[Reject]] = defaultdict(list)
    for reject in rejects:
        groups[reject.reason].append(reject)
    return "; ".join(f"{len(group)} {reason} ({group[0].detail})" for reason, group in sorted(groups.items()))


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
    rejects: list[Reject] = []
    groups: dict[str, list[TokenPair]] = defaultdict(list)  # a pair and its twin
    for pair in pairs:
        groups[_group(pair)].append(pair)
    for name, group in list(groups.items()):
        if max(pair.longest for pair in group) > max_length:
            rejects += _too_long(groups.pop(name), max_length)
    aside = _held_out_prompts([pair for group in groups.values() for pair in group], held_out, seed)
    kept: set[str] = set()
    left = len(pairs) if max_pairs is None else max_pairs
    for name in shuffled(groups, lambda name: (name, seed)):
        group = groups[name]
        if group[0].prompt_id in aside:
            continue
        if len(group) <= left:
            kept.add(name)
            left -= len(group)
        else:
            why = f"train.max_pairs is {max_pairs}"
            rejects += [Reject.of("train", pair, pair.pair_id, "over max_pairs", why) for pair in group]
    held = [pair for pair in pairs if _group(pair) in groups and pair.prompt_id in aside]
    return [pair for pair in pairs if _group(pair) in kept], held, rejects


def _group(pair: TokenPair) -> str:
    """Names a pair and its twin."""
    return min(pair.pair_id, pair.twin_id)


def _too_long(group: Sequence[TokenPair], max_length: int) -> Iterator[Reject]:
    longest = max(pair.longest for pair in group)
    for pair in group:
        answer = pair.longest - len(pair.prompt_ids)
        detail = f"{len(pair.prompt_ids)} prompt + {answer} answer tokens, {max_length} fit"
        if pair.longest <= max_length:
            detail += f"; its twin has {longest}"
        yield Reject.of("train", pair, pair.pair_id, "too long", detail)


def _held_out_prompts(pairs: Sequence[TokenPair], held_out: int, seed: int) -> set[str]:
    """Prompts, chosen by hash, of at most `held_out` pairs and a tenth of all."""
    counts = Counter(pair.prompt_id for pair in pairs)
    prompts: set[str] = set()
    left = min(held_out, len(pairs) // 10)
    for name in shuffled(counts, lambda name: (name, "held out", seed)):
        if counts[name] <= left:
            prompts.add(name)
            left -= counts[name]
    return prompts
