"""Held-out users, and the tuned policy's answers that they like more or less.

Values are [users, counts, seeds], counts being the numbers of choices; NaN where a method was not tried.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.steering.actors import AnswerActor
from cpt_ray.steering.answers import Answer, grade_by_measures
from cpt_ray.steering.reward import Tasks, Tensors, accuracy
from cpt_ray.steering.stage import Fitted, Steering
from cpt_ray.steering.users import Floats, Indices
from cpt_ray.tables.records import Prompt, SteeredAnswer

COUNTS = (0, 1, 3, 5, 10)
"""Numbers of choices that results are given for, up to steer.choices."""

UserAndCount = tuple[int, int]
"""A user and a number of their choices."""
Configuration = dict[str, str] | None


class HeldOutUsers:
    """Held-out users, and what was learned."""

    def __init__(self, steering: Steering, fitted: Fitted):
        self.steering, self.fitted, self.users = steering, fitted, steering.test_users
        self.counts = [count for count in COUNTS if count <= steering.config.choices]
        self.tensors = Tensors.of(fitted.vectors, self.users, list(steering.plan.by_id))
        self.others = torch.randperm(len(self.users), generator=torch.Generator().manual_seed(0))
        """A user for each user, by chance: whose choices should tell nothing."""

    def table_of(self, value: Callable[[int, int], float], num_users: int | None = None) -> Floats:
        """[users, counts, 1] of `value(user, count)`; NaN from user `num_users` on."""
        values = np.full((len(self.users), len(self.counts), 1), np.nan)
        for at in range(len(self.users))[:num_users]:
            values[at, :, 0] = [value(at, count) for count in self.counts]
        return values

    def reward_accuracy(self) -> dict[str, Floats]:
        """Accuracy of the reward models, by method."""
        chosen, oracle = [self.tensors.tasks(num_choices=count) for count in self.counts], self.tensors.oracle_tasks()
        exchanged = [Tasks(tasks.context[self.others], tasks.targets) for tasks in chosen]
        methods = {
            "static": (self.fitted.static, [tasks.first(0) for tasks in chosen]),
            "NP-BTL": (self.fitted.models, chosen),
            "NP-BTL, another's choices": (self.fitted.models, exchanged),
            "NP-BTL, oracle": (self.fitted.oracle, [oracle] * len(chosen)),
        }
        return {
            name: np.array([[accuracy(model, tasks).numpy() for tasks in counts] for model in models]).T
            for name, (models, counts) in methods.items()
        }

    def liking(self, at: int, texts: Sequence[str]) -> float:
        """Mean utility of texts for a user; NaN if none has one."""
        rubrics, spans = self.steering.plan.rubrics, self.steering.held_out_population.spans
        taste = self.users[at].taste
        return float(np.nanmean([taste.utility(grade_by_measures(rubrics, text), spans) for text in texts]))

    def answered(
        self, planned: Sequence[SteeredAnswer], actor: Any = AnswerActor, **made_of: Any
    ) -> list[SteeredAnswer]:
        """The planned rows with the policy's answers."""
        made_of["seed"] = self.steering.plan.config.seed
        return self.steering.table("steering_answers", planned, actor, self.steering.policy, **made_of)

    def liking_by_count(
        self, planned: Mapping[UserAndCount, Sequence[SteeredAnswer]], actor: Any = AnswerActor, **made_of: Any
    ) -> Floats:
        """How much users like the policy's answers to the rows of each user and number of choices.

        NaN where there are none: "" is what comes of a prompt that does not fit.
        """
        rows = self.answered([row for pair in planned.values() for row in pair], actor, **made_of)
        pairs_of_rows = [pair for pair, own in planned.items() for _ in own]
        texts: dict[UserAndCount, list[str]] = defaultdict(list)
        for pair, row in zip(pairs_of_rows, rows, strict=True):
            texts[pair] += [row.text] if row.text else []
        num_users = 1 + max(at for at, _ in planned)
        return self.table_of(lambda at, count: self.liking(at, texts[at, count]), num_users)


class AnswerBank:
    """Answers of the policy under every configuration, sampled once: users are scored by looking them up."""

    def __init__(self, held_out: HeldOutUsers):
        self.held_out, steering = held_out, held_out.steering
        population, config = steering.held_out_population, steering.config
        levels = {rubric.id: [level.name for level in rubric.levels] for rubric in steering.catalog.rubrics}
        self.configurations = [
            {name: levels[name][level] for name, level in configuration.items()}
            for configuration in steering.candidates.configurations
        ]
        """The first is none."""
        prompt_of = {answer.prompt_id: answer.prompt for answer in population.answers}
        self.prompts = [Prompt(prompt_id=name, text=prompt_of[name], split="held_out") for name in sorted(prompt_of)]
        self._best_of = max(config.samples, config.best_of)
        planned = [
            planned_answer(steering.catalog.resolve(configuration).directive, prompt, sample)
            for configuration in self.configurations
            for prompt in self.prompts
            for sample in range(config.samples if configuration else self._best_of)
        ]
        rows = held_out.answered(planned)
        answers = [steering.answer(row.prompt_id, row.prompt, row.text, {}) for row in rows]
        tastes = [user.taste for user in held_out.users]
        liked = np.array([[taste.utility(answer.scores, population.spans) for answer in answers] for taste in tastes])
        self._undirected = answers[: len(self.prompts) * self._best_of]
        plain, directed = np.split(liked, [len(self._undirected)], axis=1)
        self._plain = plain.reshape(len(liked), len(self.prompts), self._best_of)
        directed = directed.reshape(len(liked), len(self.configurations) - 1, len(self.prompts), config.samples)
        satisfaction = np.concatenate([np.nanmean(self._plain, axis=2)[:, None], np.nanmean(directed, axis=3)], axis=1)
        """[users, configurations, prompts], how much a user likes the answers."""
        self.tested = self._is_about([user.targets for user in held_out.users])
        """[users, prompts], those of the targets: satisfaction is on these."""
        shown = self._is_about([user.context for user in held_out.users])
        self._tested = np.where(self.tested[:, None], satisfaction, np.nan)
        self._shown = np.nanmean(np.where(shown[:, None], satisfaction, np.nan), axis=2)
        """[users, configurations], on the prompts of the context."""

    def _is_about(self, pairs: Sequence[Indices]) -> NDArray[np.bool_]:
        """[users, prompts], whether a user's pairs are about a prompt."""
        names = np.array([prompt.prompt_id for prompt in self.prompts])
        asked = np.array([answer.prompt_id for answer in self.held_out.steering.held_out_population.answers])
        return np.array([np.isin(names, asked[own]) for own in pairs])

    def tested_prompts(self, at: int) -> list[Prompt]:
        """The prompts on which a user's satisfaction is measured."""
        return [self.prompts[place] for place in np.flatnonzero(self.tested[at])]

    def under(self, configure: Callable[[int, int], Configuration]) -> Floats:
        """Satisfaction under the configuration for (user, number of choices)."""
        satisfaction = np.nanmean(self._tested, axis=2)
        return self.held_out.table_of(
            lambda at, count: satisfaction[at, self.configurations.index(configure(at, count) or {})]
        )

    def best(self, at: int) -> Configuration:
        """The configuration whose answers to the context's prompts the user likes most; none if none is measured."""
        liked = self._shown[at]
        return None if np.isnan(liked).all() else self.configurations[int(np.nanargmax(liked))]

    def nearest(self, at: int, count: int) -> Configuration:
        """The configuration whose scores are nearest to the mean of the chosen answers': what it leaves open is as in
        all answers. The simplest that reads choices at all."""
        population = self.held_out.steering.held_out_population
        chosen = [population.answers[place] for place in self.held_out.users[at].context[:count, 0]]
        usual, wanted = (_mean_scores(population.rubrics, answers) for answers in (population.answers, chosen))
        scores = {rubric.id: {level.name: level.score for level in rubric.levels} for rubric in population.rubrics}

        def distance(configuration: Mapping[str, str]) -> float:
            asked = {name: scores[name][level] for name, level in configuration.items() if name in scores}
            gaps = [(asked.get(name, usual[name]) - score) / population.spans[name] for name, score in wanted.items()]
            return float(np.linalg.norm(gaps))

        return min(self.configurations, key=distance)

    def best_for_all(self) -> Configuration:
        """The configuration that all users together like most on what they were shown."""
        return self.configurations[int(np.nanargmax(np.nanmean(self._shown, axis=0)))]

    def random_satisfaction(self) -> Floats:
        """Mean satisfaction under a configuration drawn at random."""
        satisfaction = np.nanmean(self._tested, axis=(1, 2))
        return self.held_out.table_of(lambda at, count: satisfaction[at])

    @torch.no_grad()
    def reranked(self) -> Floats:
        """Satisfaction with the best of n answers without a directive, by each seed's reward model."""
        held_out, fitted = self.held_out, self.held_out.fitted
        vectors = torch.tensor(fitted.scale(held_out.steering.embeddings(self._undirected)))
        satisfaction = np.empty((len(held_out.users), len(held_out.counts), len(fitted.models)))
        for seed, model in enumerate(fitted.models):
            for at, count in enumerate(held_out.counts):
                z = model.encoder(held_out.tensors.tasks(num_choices=count).context)
                rewards = model.reward(z, vectors.expand(len(z), -1, -1)).numpy().reshape(self._plain.shape)
                picked = np.take_along_axis(self._plain, rewards.argmax(axis=2)[..., None], axis=2)[..., 0]
                satisfaction[:, at, seed] = np.nanmean(np.where(self.tested, picked, np.nan), axis=1)
        return satisfaction


def _mean_scores(rubrics: Sequence[Rubric], answers: Sequence[Answer]) -> dict[str, float]:
    """Mean score by rubric, over the answers that have one; rubrics without any are left out."""
    ids = [rubric.id for rubric in rubrics]
    scores = {name: [answer.scores[name] for answer in answers if name in answer.scores] for name in ids}
    return {name: float(np.mean(known)) for name, known in scores.items() if known}


def planned_answer(directive: str | None, prompt: Prompt, sample: int) -> SteeredAnswer:
    """A row still without text."""
    return SteeredAnswer(directive=directive, prompt_id=prompt.prompt_id, prompt=prompt.text, sample=sample, text="")
