"""Directive inference: from a user's choices to a configuration, by the tuned policy's own implicit reward.

    p(s | C) ~ p(s) prod_j [ lapse/2 + (1 - lapse) sigmoid(v_s(y_w) - v_s(y_l)) ]
    v_d(y)   = SHARPNESS sum_l q(l|y) (1 - |a_d - a_l| / span),     q(l|y) ~ pi(y|d_l,x)^beta

over the candidate configurations s. The implicit rewards beta [log pi(y|d,x) - log ref(y|x)] of a rubric's directives d
become a belief q about the answer's level, in which the reference cancels; v values levels by the distance of their
anchors a, since users like the neighbour of what they like best. (The rewards themselves are peaked at d's own level
and say little about which of two answers of other levels is nearer.)

Configurations of several rubrics have the sum of their directives' values, so that the policy scores each answer once
per directive and not once per configuration; to have no preference has value 0. `lapse` bounds what one choice can say:
noisy, contradictory or hostile choices cannot make the belief certain.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.rubrics.rubric import check_rubric_names
from cpt_ray.steering.choices import Choice, PreferenceState, Question
from cpt_ray.steering.scoring import Triple
from cpt_ray.steering.users import Floats
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import QUESTIONS_FILE, RunDir

PRIOR = (0.1, 0.6, 0.3)
"""Prior mass of no preference, of all configurations of one rubric, and of all those of two."""
NEIGHBOUR_SHARE = 0.25
"""Share of a rubric's span within which levels count as one in the confidence of a belief."""
SHARPNESS = 8.0
"""How sure users choose between the two ends of a rubric: sigmoid(8) of them take the end they like."""
MOST_RUBRICS = 2
"""In one configuration."""


class Scorer(Protocol):
    """The tuned policy, as far as it is needed here."""

    def logprobs(self, triples: Sequence[Triple]) -> list[float]:
        """log pi(answer | directive, prompt) of each, its end mark included."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Belief:
    """What the choices say; by default nothing."""

    configuration: dict[str, str] | None = None
    """Rubric id to level name, of the (at most two) rubrics surest to matter; None: "I do not know yet"."""
    directive: str | None = None
    confidence: dict[str, float] = field(default_factory=dict)
    """Rubric id to the probability that its likeliest level, or one very near it, is meant."""
    probabilities: dict[str, dict[str, float]] = field(default_factory=dict)
    """Rubric id to level name to probability; the rest to 1 is the probability that the rubric does
    not matter."""
    num_choices: int
    """How many count: a repeated choice does not."""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


class Candidates:
    """The configurations that a user may have in mind: none, and any level of one rubric or of two."""

    def __init__(
        self,
        catalog: Catalog,
        beta: float,
        lapse: float = 0.1,
        certainty: float = 0.6,
        prior: Mapping[str, float] = MappingProxyType({}),
        policy: str = "",
    ):
        """
        Args:
            beta: of the policy's DPO.
            certainty: confidence from which on a rubric's level is known.
            prior: rubric id to how likely a user cares about it, against 1 of the others.
            policy: names the weights; margins of another policy are not used.
        """
        self.catalog, self.beta, self.lapse, self.certainty = catalog, beta, lapse, certainty
        self.directives = [level.directive for rubric in catalog.rubrics for level in rubric.levels]
        self.key = content_id(self.directives, beta, policy)
        sizes = {rubric.id: len(rubric.levels) for rubric in catalog.rubrics}
        ends = itertools.accumulate(sizes.values())
        self._columns = {name: slice(end - sizes[name], end) for name, end in zip(sizes, ends, strict=True)}
        """Rubric id to its directives among all."""
        self.configurations: list[dict[str, int]] = [
            dict(zip(names, levels, strict=True))
            for count in range(MOST_RUBRICS + 1)
            for names in itertools.combinations(sizes, count)
            for levels in itertools.product(*(range(sizes[name]) for name in names))
        ]
        """Rubric id to level index."""
        self._has_directive: Floats = np.zeros((len(self.configurations), len(self.directives)))
        for row, configuration in enumerate(self.configurations):
            self._has_directive[row, [self._columns[name].start + level for name, level in configuration.items()]] = 1
        self._log_prior = np.log(self._prior(prior))

    def _prior(self, care: Mapping[str, float]) -> Floats:
        counts = np.array([len(names) for names in self.configurations])
        prior = np.array([np.prod([care.get(name, 1.0) for name in names]) for names in self.configurations])
        for count in np.unique(counts):
            prior[counts == count] *= PRIOR[count] / prior[counts == count].sum()
        normalised: Floats = prior / prior.sum()  # there are none of two rubrics where there is one rubric
        return normalised

    # ------------------------------------------------------------ what the policy says

    def values(self, logprobs: Floats) -> Floats:
        """v_d(y), [answers, directives], of the answers' log-probabilities under each directive."""
        values = np.empty(logprobs.shape)
        for rubric in self.catalog.rubrics:
            own, anchors = self._columns[rubric.id], np.array([level.score for level in rubric.levels])
            rewards = self.beta * logprobs[:, own]
            chance = np.exp(rewards - rewards.max(axis=1, keepdims=True))
            nearness = 1 - np.abs(anchors[:, None] - anchors) / np.ptp(anchors)
            values[:, own] = SHARPNESS * chance / chance.sum(axis=1, keepdims=True) @ nearness
        return values

    def score(self, scorer: Scorer, choices: Sequence[Choice]) -> Floats:
        """Margins of choices by the policy itself, [choices, directives]; one batch, each answer once."""
        answers = list(dict.fromkeys((each.prompt, text) for each in choices for text in (each.chosen, each.rejected)))
        triples = [(directive, *answer) for answer in answers for directive in self.directives]
        logprobs = np.array(scorer.logprobs(triples), dtype=np.float64).reshape(len(answers), -1)
        values = dict(zip(answers, self.values(logprobs), strict=True))
        return np.array([values[each.prompt, each.chosen] - values[each.prompt, each.rejected] for each in choices])

    def add(
        self, state: PreferenceState, choices: Sequence[Choice], scorer: Scorer, questions: Sequence[Question] = ()
    ) -> None:
        """Adds what is new of `choices` to a state.

        Choices that answer `questions` have known margins; the rest are scored in one batch.
        """
        known = {Choice(prompt=ask.prompt, chosen=ask.first, rejected=ask.second): ask.margins for ask in questions}
        known |= {choice.swapped(): tuple(-value for value in margins) for choice, margins in known.items()}
        if state.key != self.key:  # its margins belong to another policy
            choices, state.choices, state.margins, state.key = [*state.choices, *choices], [], [], self.key
        choices = state.new(choices)
        if unknown := [choice for choice in choices if choice not in known]:
            known |= zip(unknown, map(tuple, self.score(scorer, unknown).tolist()), strict=True)
        state.choices += choices
        state.margins += [known[choice] for choice in choices]

    # ------------------------------------------------------------ what follows

    def _chances(self, margins: Floats) -> Floats:
        """Probability of each choice under each configuration, [configurations, choices]."""
        total = self._has_directive @ margins.reshape(-1, len(self.directives)).T
        chances: Floats = self.lapse / 2 + (1 - self.lapse) / (1 + np.exp(-np.clip(total, -50, 50)))
        return chances

    def posterior(self, margins: Floats) -> Floats:
        """[configurations] of margins [choices, directives]."""
        logs = self._log_prior + np.log(self._chances(margins)).sum(axis=1)
        weights = np.exp(logs - logs.max())
        posterior: Floats = weights / weights.sum()
        return posterior

    def predict(self, margins: Floats, others: Floats) -> Floats:
        """How much likelier than not each of the choices `others` is after the choices `margins`, -0.5 to 0.5."""
        excess: Floats = self.posterior(margins) @ self._chances(others) - 0.5
        excess[np.abs(excess) < 1e-12] = 0.0  # rounding is no preference
        return excess

    def belief(self, margins: Any) -> Belief:
        """The posterior of margins [choices, directives] in terms of rubrics and levels."""
        per_directive = self.posterior(np.array(margins, dtype=np.float64)) @ self._has_directive
        probabilities, likeliest, confidence = {}, {}, {}
        for rubric in self.catalog.rubrics:
            chances = per_directive[self._columns[rubric.id]]
            names, anchors = [level.name for level in rubric.levels], np.array([level.score for level in rubric.levels])
            best = int(np.argmax(chances))
            probabilities[rubric.id] = dict(zip(names, chances.tolist(), strict=True))
            likeliest[rubric.id] = names[best]
            confidence[rubric.id] = float(
                chances[np.abs(anchors - anchors[best]) <= NEIGHBOUR_SHARE * np.ptp(anchors)].sum()
            )
        surest = sorted(confidence, key=lambda name: -confidence[name])[:MOST_RUBRICS]
        configuration = {name: likeliest[name] for name in surest if confidence[name] >= self.certainty}
        return Belief(
            configuration=configuration or None,
            directive=self.catalog.resolve(configuration).directive,
            confidence=confidence,
            probabilities=probabilities,
            num_choices=len(margins),
        )

    def information_gain(self, margins: Floats, questions: Floats) -> Floats:
        """Expected nats that each question's answer takes from the entropy of the posterior, [questions].

        H(mean p) - mean H(p), over the posterior, of the choice's probability p; margins [questions, directives].
        """
        posterior, chances = self.posterior(margins), self._chances(questions)
        gain: Floats = _entropy(posterior @ chances) - posterior @ _entropy(chances)
        return gain

    def next_question(self, state: PreferenceState, questions: Sequence[Question]) -> Question | None:
        """The most informative question about a prompt that has no choice yet; None if there is none left."""
        answered = {choice.prompt for choice in state.choices}
        left = [question for question in questions if question.prompt not in answered]
        if not left:
            return None
        gains = self.information_gain(np.array(state.margins), np.array([question.margins for question in left]))
        return left[int(np.argmax(gains))]


def _entropy(chance: Floats) -> Floats:
    entropy: Floats = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))
    return entropy


def make_candidates(config: RunConfig, catalog: Catalog, policy: ModelConfig) -> Candidates:
    """What users of a run's policy may have in mind; UserError for a prior about an unknown rubric."""
    steer, known = config.steer, [rubric.id for rubric in catalog.rubrics]
    check_rubric_names("steer.prior", steer.prior, known)
    return Candidates(catalog, config.train.beta, steer.lapse, steer.certainty, steer.prior, policy.identity)


def read_questions(run: RunDir, candidates: Candidates) -> list[Question]:
    """The questions that `cpt steer fit` wrote for this model; none if it wrote none."""
    saved = run.read_json(QUESTIONS_FILE)
    if not saved or saved["key"] != candidates.key:
        return []
    return [Question(**{**question, "margins": tuple(question["margins"])}) for question in saved["questions"]]
