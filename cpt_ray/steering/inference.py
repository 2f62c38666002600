"""Directive inference: from a user's choices to a configuration, by the tuned policy's own implicit reward.

    p(s | C) ~ p(s) prod_j [ lapse/2 + (1 - lapse) sigmoid(v_s(y_w) - v_s(y_l)) ]
    v_d(y)   = SHARPNESS sum_l q(l|y) (1 - |a_d - a_l| / span),     q(l|y) ~ pi(y|d_l,x)^beta

over the candidate configurations s. The implicit rewards beta [log pi(y|d,x) - log ref(y|x)] of a rubric's directives d
become a belief q about the answer's level, in which the reference cancels; v values levels by the distance of their
anchors a, since users like the neighbour of what they like best. (The rewards themselves are peaked at d's own level
and say little about which of two answers of other levels is nearer.)

Configurations of several rubrics have the sum of their directives' values, so that the policy scores each answer once
per directive and not once per configuration; "no taste" has value 0. `lapse` bounds what one choice can say: noisy,
contradictory or hostile choices cannot make the belief certain.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.steering.choices import Choice, Preferences, Question
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import RunDir

QUESTIONS = "steering/questions.json"
"""Where `cpt steer fit` keeps pairs worth asking."""
NO_TASTE_PRIOR = 0.1
TWO_RUBRICS_PRIOR = 0.3
"""Prior mass of the configurations of two rubrics; the rest is for one rubric."""
NEAR = 0.25
"""Share of a rubric's span within which levels count as one, when it is asked how sure the belief is."""
SHARPNESS = 8.0
"""How sure users choose between the two ends of a rubric: sigmoid(8) of them take the end they like."""
MOST_RUBRICS = 2
"""In one configuration."""

Floats = NDArray[np.float64]


class Scorer(Protocol):
    """The tuned policy, as far as it is needed here."""

    def logprobs(self, asked: Sequence[tuple[str | None, str, str]]) -> list[float]:
        """log pi(answer | directive, prompt) of each (directive, prompt, answer), its end mark included."""
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
    """Rubric id to level name to probability; what is missing to 1 is that the rubric does not matter."""
    num_choices: int
    """How many count: the same one again does not."""

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
        entries = [(rubric.id, at, level) for rubric in catalog.rubrics for at, level in enumerate(rubric.levels)]
        self.directives: list[str] = [level.directive for _, _, level in entries]
        self.key = content_id(self.directives, beta, policy)
        index = {(name, at): place for place, (name, at, _) in enumerate(entries)}
        sizes = {rubric.id: len(rubric.levels) for rubric in catalog.rubrics}
        self.configurations: list[dict[str, int]] = [{}]
        """Rubric id to level index."""
        for count in range(1, MOST_RUBRICS + 1):
            for names in itertools.combinations(sizes, count):
                levels = itertools.product(*(range(sizes[name]) for name in names))
                self.configurations += [dict(zip(names, one, strict=True)) for one in levels]
        self._member: Floats = np.zeros((len(self.configurations), len(entries)))
        for row, one in enumerate(self.configurations):
            for item in one.items():
                self._member[row, index[item]] = 1
        self._log_prior = np.log(self._prior(prior))

    def _prior(self, care: Mapping[str, float]) -> Floats:
        counts = np.array([len(one) for one in self.configurations])
        weight = np.array([np.prod([care.get(name, 1.0) for name in one]) for one in self.configurations])
        mass = {0: NO_TASTE_PRIOR, 1: 1 - NO_TASTE_PRIOR - TWO_RUBRICS_PRIOR, 2: TWO_RUBRICS_PRIOR}
        prior = np.zeros(len(counts))
        for count, share in mass.items():
            if (counts == count).any():
                prior[counts == count] = share * weight[counts == count] / weight[counts == count].sum()
        prior /= prior.sum()
        return prior

    # ------------------------------------------------------------ what the policy says

    def values(self, logprobs: Floats) -> Floats:
        """v_d(y), [answers, directives], of the answers' log-probabilities under each directive."""
        parts, start = [], 0
        for rubric in self.catalog.rubrics:
            own = self.beta * logprobs[:, start : start + len(rubric.levels)]
            start += len(rubric.levels)
            chance = np.exp(own - own.max(axis=1, keepdims=True))
            anchors = np.array([level.score for level in rubric.levels])
            nearness = 1 - np.abs(anchors[:, None] - anchors) / np.ptp(anchors)
            parts.append(SHARPNESS * chance / chance.sum(axis=1, keepdims=True) @ nearness)
        found: Floats = np.concatenate(parts, axis=1)
        return found

    def score(self, scorer: Scorer, choices: Sequence[Choice]) -> Floats:
        """Margins of choices by the policy itself, [choices, directives]; one batch, each answer once."""
        answers = list(dict.fromkeys((one.prompt, text) for one in choices for text in (one.chosen, one.rejected)))
        asked = [(directive, *one) for one in answers for directive in self.directives]
        logprobs = np.array(scorer.logprobs(asked), dtype=np.float64).reshape(len(answers), -1)
        values = dict(zip(answers, self.values(logprobs), strict=True))
        return np.array([values[one.prompt, one.chosen] - values[one.prompt, one.rejected] for one in choices])

    def add(
        self, state: Preferences, choices: Sequence[Choice], scorer: Scorer, questions: Sequence[Question] = ()
    ) -> None:
        """Adds what is new of `choices` to a state. What was asked as one of `questions` costs nothing; the rest is
        one batch.
        """
        known = {Choice(prompt=one.prompt, chosen=one.first, rejected=one.second): one.margins for one in questions}
        known |= {one.swapped(): tuple(-value for value in margins) for one, margins in known.items()}
        if state.key != self.key:  # what was known belongs to another policy
            choices, state.choices, state.margins, state.key = [*state.choices, *choices], [], [], self.key
        choices = state.new(choices)
        left = [one for one in choices if one not in known]
        if left:
            scored = self.score(scorer, left).tolist()
            known |= {one: tuple(margins) for one, margins in zip(left, scored, strict=True)}
        state.choices += choices
        state.margins += [known[one] for one in choices]

    # ------------------------------------------------------------ what follows

    def _chances(self, margins: Floats) -> Floats:
        """Probability of each choice under each configuration, [configurations, choices]."""
        total = self._member @ margins.reshape(-1, len(self.directives)).T
        chances: Floats = self.lapse / 2 + (1 - self.lapse) / (1 + np.exp(-np.clip(total, -50, 50)))
        return chances

    def posterior(self, margins: Floats) -> Floats:
        """[configurations] of margins [choices, directives]."""
        logs = self._log_prior + np.log(self._chances(margins)).sum(axis=1)
        found: Floats = np.exp(logs - logs.max())
        found /= found.sum()
        return found

    def predict(self, margins: Floats, others: Floats) -> Floats:
        """How much likelier than not each of the choices `others` is after the choices `margins`, -0.5 to 0.5."""
        found: Floats = self.posterior(margins) @ self._chances(others) - 0.5
        found[np.abs(found) < 1e-12] = 0.0
        return found

    def belief(self, margins: Any) -> Belief:
        """The posterior of margins [choices, directives], put into words."""
        posterior = self.posterior(np.array(margins, dtype=np.float64))
        per_directive = iter(posterior @ self._member)
        probabilities, likeliest, confidence = {}, {}, {}
        for rubric in self.catalog.rubrics:
            found = np.array([next(per_directive) for _ in rubric.levels])
            probabilities[rubric.id] = {level.name: float(one) for level, one in zip(rubric.levels, found, strict=True)}
            best, anchors = int(np.argmax(found)), np.array([level.score for level in rubric.levels])
            likeliest[rubric.id] = rubric.levels[best].name
            confidence[rubric.id] = float(found[np.abs(anchors - anchors[best]) <= NEAR * np.ptp(anchors)].sum())
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

    def next_question(self, state: Preferences, questions: Sequence[Question]) -> Question | None:
        """The question not asked yet that says most; None if there is none left."""
        asked = {one.prompt for one in state.choices}
        left = [one for one in questions if one.prompt not in asked]
        if not left:
            return None
        gains = self.information_gain(np.array(state.margins), np.array([one.margins for one in left]))
        return left[int(np.argmax(gains))]


def _entropy(chance: Floats) -> Floats:
    found: Floats = -(chance * np.log(chance) + (1 - chance) * np.log1p(-chance))
    return found


def make_candidates(config: RunConfig, catalog: Catalog, policy: ModelConfig) -> Candidates:
    """What users of a run's policy may have in mind; UserError for a prior about an unknown rubric."""
    steer, known = config.steer, [one.id for one in catalog.rubrics]
    for name in steer.prior:
        if name not in known:
            raise UserError(f"steer.prior: no rubric {name}{did_you_mean(name, known)}")
    return Candidates(catalog, config.train.beta, steer.lapse, steer.certainty, steer.prior, policy.identity)


def read_questions(run: RunDir, candidates: Candidates) -> list[Question]:
    """The questions that `cpt steer fit` wrote for this model; none if it wrote none."""
    found = run.read_json(QUESTIONS)
    if not found or found["key"] != candidates.key:
        return []
    return [Question(**{**one, "margins": tuple(one["margins"])}) for one in found["questions"]]
