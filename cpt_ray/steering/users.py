"""Simulated users: hidden tastes over the rubrics' scores, and the choices that follow from them.

A taste prefers a score per rubric: its utility is 1 at that score and falls with the distance. Every user has a twin,
who likes what the user dislikes and so makes every choice the other way.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from cpt_ray.config import Kind
from cpt_ray.errors import UserError
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.steering.answers import Answer

KINDS = get_args(Kind)
NOISE = 0.2
"""How often a noisy user takes the answer that they like less."""
MIN_DIFFERENCE = 0.05
"""Utilities closer than this are no choice."""
MINORITY = 0.25
"""A pair is conflicting if at least this share of users prefers each of its answers."""
PAIRS_PER_PROMPT = 200
NUM_SAMPLED_TASTES = 64
"""Tastes drawn to find the conflicting pairs."""

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Taste:
    """What a user likes."""

    kind: str
    liked_scores: Mapping[str, float]
    """Rubric id to preferred score."""
    weights: Mapping[str, float]
    """Rubric id to weight; they sum to 1."""
    noise: float = 0.0
    """Probability that a choice is the wrong way round."""
    flipped: bool = False
    """Likes what is far from the liked scores."""

    def twin(self) -> Taste:
        """Every choice the other way."""
        return replace(self, flipped=not self.flipped)

    def utility(self, scores: Mapping[str, float], spans: Mapping[str, float]) -> float:
        """0 to 1; NaN if the answer has no score of a rubric that matters.

        Args:
            spans: rubric id to the distance between its highest and lowest anchor.
        """
        if any(name not in scores for name in self.liked_scores):
            return float("nan")
        utility = sum(
            self.weights[name] * max(0.0, 1 - abs(scores[name] - liked) / spans[name])
            for name, liked in self.liked_scores.items()
        )
        return 1 - utility if self.flipped else utility


def draw_taste(rng: np.random.Generator, rubrics: Sequence[Rubric], kind: str) -> Taste:
    """A taste of one kind: one rubric's end ("noisy" too), a score within its middle half, or a blend of two ends."""
    chosen = [rubrics[at] for at in rng.permutation(len(rubrics))[: 2 if kind == "mixture" else 1]]
    liked_scores = {}
    for rubric in chosen:
        low, high = rubric.levels[0].score, rubric.levels[-1].score
        end = {"high": high, "low": low}.get(kind, high if rng.random() < 0.5 else low)
        liked_scores[rubric.id] = end if kind != "middle" else low + (high - low) * float(rng.uniform(0.25, 0.75))
    share = float(rng.uniform(0.35, 0.65)) if len(chosen) == 2 else 1.0
    weights = dict(zip(liked_scores, (share, 1 - share), strict=False))
    return Taste(kind=kind, liked_scores=liked_scores, weights=weights, noise=NOISE if kind == "noisy" else 0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class User:
    """A taste and the choices made by it; pairs are indices of answers, the chosen one first."""

    taste: Taste
    context: Indices
    """[k, 2], as chosen, noise included."""
    targets: Indices
    """[t, 2], by the true taste; no prompt of theirs is in the context."""

    def twin(self) -> User:
        """The user who chooses the other way on the same pairs."""
        return User(taste=self.taste.twin(), context=self.context[:, ::-1], targets=self.targets[:, ::-1])


class Population:
    """Answers that users choose between, and the users."""

    def __init__(self, answers: Sequence[Answer], rubrics: Sequence[Rubric], seed: int, kinds: Sequence[str] = KINDS):
        """UserError if no two prompts have two answers each."""
        self.answers, self.rubrics, self.kinds = list(answers), list(rubrics), tuple(kinds)
        self.spans = {rubric.id: rubric.levels[-1].score - rubric.levels[0].score for rubric in rubrics}
        rng = np.random.default_rng(seed)
        groups: dict[str, list[int]] = defaultdict(list)
        for place, answer in enumerate(self.answers):
            groups[answer.prompt_id].append(place)
        self.prompts = {name: at for at, name in enumerate(sorted(groups))}
        pairs = [pair for name in self.prompts for pair in _pairs(groups[name], rng)]
        if not pairs or len(self.prompts) < 2:
            raise UserError("steer: no two prompts with two graded answers each; synthesize (and evaluate) more")
        self.pairs: Indices = np.array(pairs, dtype=np.int64)
        self._prompt_of = np.array([self.prompts[self.answers[first].prompt_id] for first, _ in pairs])
        self.conflicting = self._find_conflicting(rng)

    def utilities(self, taste: Taste) -> Floats:
        """[answers], NaN where a score is missing."""
        return np.array([taste.utility(answer.scores, self.spans) for answer in self.answers])

    def _find_conflicting(self, rng: np.random.Generator) -> NDArray[np.bool_]:
        tastes = [draw_taste(rng, self.rubrics, self.kinds[at % len(self.kinds)]) for at in range(NUM_SAMPLED_TASTES)]
        differences = np.array([self._differences(taste) for taste in tastes])
        for_first = (differences > MIN_DIFFERENCE).mean(axis=0)
        for_second = (differences < -MIN_DIFFERENCE).mean(axis=0)
        conflicting: NDArray[np.bool_] = np.minimum(for_first, for_second) >= MINORITY
        return conflicting

    def _differences(self, taste: Taste) -> Floats:
        """Utility of each pair's first answer less that of its second; 0 where one of them has none."""
        first, second = self.utilities(taste)[self.pairs].T
        differences: Floats = np.nan_to_num(first - second)
        return differences

    def user(
        self, rng: np.random.Generator, taste: Taste, num_choices: int, num_targets: int, conflicting: float
    ) -> User:
        """A user who chose `num_choices` times; the prompts of context and targets are two random halves.

        Args:
            conflicting: least share of conflicting pairs.
        """
        difference = self._differences(taste)
        usable = np.abs(difference) > MIN_DIFFERENCE
        side = rng.permutation(len(self.prompts))[self._prompt_of] % 2

        def choices(pool: Indices, count: int, noise: float | None) -> Indices:
            clashing = pool[self.conflicting[pool]]
            if len(clashing) == 0:
                raise UserError("steer: too few graded answers differ for simulated users; give more prompts")
            num_clashing = int(np.ceil(conflicting * count))
            drawn = np.concatenate([_draw(rng, clashing, num_clashing), _draw(rng, pool, count - num_clashing)])
            drawn = rng.permutation(drawn)
            swap = difference[drawn] < 0
            if noise is not None:  # else nothing is drawn for it
                swap ^= rng.random(count) < noise
            return np.where(swap[:, None], self.pairs[drawn][:, ::-1], self.pairs[drawn])

        context = choices(np.flatnonzero(usable & (side == 0)), num_choices, taste.noise)
        targets = choices(np.flatnonzero(usable & (side == 1)), num_targets, None)
        return User(taste=taste, context=context, targets=targets)


def _pairs(group: Sequence[int], rng: np.random.Generator) -> list[tuple[int, int]]:
    """All pairs of a prompt's answers, or PAIRS_PER_PROMPT of them."""
    pairs = list(itertools.combinations(group, 2))
    if len(pairs) > PAIRS_PER_PROMPT:
        pairs = [pairs[at] for at in rng.choice(len(pairs), PAIRS_PER_PROMPT, replace=False)]
    return pairs


def _draw(rng: np.random.Generator, pool: Indices, count: int) -> Indices:
    """`count` of the pool, some of them again only where it has fewer."""
    return rng.choice(pool, count, replace=len(pool) < count)
