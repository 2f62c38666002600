"""Held-out users, and the tuned policy's answers that they like more or less."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.steering.actors import AnswerActor
from cpt_ray.steering.answers import Answer, grade_by_measures
from cpt_ray.steering.fitting import Tensors
from cpt_ray.steering.reward import Tasks, accuracy
from cpt_ray.steering.stage import Fitted, Steering
from cpt_ray.steering.users import Floats
from cpt_ray.tables.records import Prompt, SteeredAnswer

COUNTS = (0, 1, 3, 5, 10)
"""Numbers of choices that results are given for, up to steer.choices."""


Configuration = dict[str, str] | None


class Arena:
    """Held-out users, and what was learned."""

    def __init__(self, steering: Steering, fitted: Fitted):
        self.steering, self.fitted, self.users = steering, fitted, steering.test_users
        self.counts = [one for one in COUNTS if one <= steering.config.choices]
        self.tried = Tensors.of(fitted.vectors, self.users, list(steering.plan.by_id))
        self.others = torch.randperm(len(self.users), generator=torch.Generator().manual_seed(0))
        """A user for each user, by chance: whose choices should tell nothing."""

    def filled(self, value: Callable[[int, int], float], num_users: int | None = None) -> Floats:
        """[users, counts, 1] of `value(user, count)`; NaN from user `num_users` on."""
        found = np.full((len(self.users), len(self.counts), 1), np.nan)
        for at in range(len(self.users))[:num_users]:
            found[at, :, 0] = [value(at, count) for count in self.counts]
        return found

    def reward_accuracy(self) -> dict[str, Floats]:
        """Of the reward models."""
        chosen = [self.tried.tasks(num_choices=count) for count in self.counts]
        oracle, found = self.tried.tasks(told=True), {}
        for name, models, tasks in (
            ("static", self.fitted.static, [one.first(0) for one in chosen]),
            ("NP-BTL", self.fitted.models, chosen),
            ("NP-BTL, another's choices", self.fitted.models, [self._exchanged(one) for one in chosen]),
            ("NP-BTL, oracle", self.fitted.oracle, [oracle for _ in chosen]),
        ):
            rows = [[accuracy(model, one).numpy() for one in tasks] for model in models]
            found[name] = np.array(rows).transpose(2, 1, 0)
        return found

    def _exchanged(self, tasks: Tasks) -> Tasks:
        """With another user's choices."""
        return Tasks(tasks.context[self.others], tasks.targets)

    def liking(self, at: int, texts: Sequence[str]) -> float:
        """Mean utility of texts for a user; NaN if none has one."""
        rubrics, spans = self.steering.plan.rubrics, self.steering.held_out.spans
        values = [self.users[at].taste.utility(grade_by_measures(rubrics, one), spans) for one in texts]
        known = [one for one in values if not np.isnan(one)]
        return float(np.mean(known)) if known else float("nan")

    def answered(self, planned: Sequence[SteeredAnswer]) -> list[SteeredAnswer]:
        """The planned rows with the policy's answers."""
        policy, seed = self.steering.policy, self.steering.plan.config.seed
        return self.steering.table("steering_answers", planned, AnswerActor, policy, seed=seed)


class Bank:
    """The policy's answers under every configuration, so that any number of users can be scored by looking up."""

    def __init__(self, arena: Arena):
        self.arena, steering = arena, arena.steering
        levels = {one.id: [level.name for level in one.levels] for one in steering.catalog.rubrics}
        self.configurations = [
            {name: levels[name][at] for name, at in one.items()} for one in steering.candidates.configurations
        ]
        texts = {one.prompt_id: one.prompt for one in steering.held_out.answers}
        self.prompts = [Prompt(prompt_id=name, text=texts[name], split="held_out") for name in sorted(texts)]
        directives = [steering.catalog.resolve(one).directive for one in self.configurations]
        config = steering.config
        planned = [
            planned_answer(directive, prompt, sample)
            for at, directive in enumerate(directives)
            for prompt in self.prompts
            for sample in range(config.samples if at else max(config.samples, config.best_of))
        ]
        rows = arena.answered(planned)
        self.answers = [steering.answer(one.prompt_id, one.prompt, one.text, {}) for one in rows]
        index = {directive: at for at, directive in enumerate(directives)}
        numbers = {one.prompt_id: at for at, one in enumerate(self.prompts)}
        self.configuration_of = np.array([index[one.directive] for one in rows])
        self.prompt_of = np.array([numbers[one.prompt_id] for one in rows])
        crowd = steering.held_out
        prompt_at = np.array([numbers[one.prompt_id] for one in crowd.answers])
        self.shown = [np.unique(prompt_at[one.context]) for one in arena.users]
        """Per user, the prompts of its context."""
        self.tested = [np.unique(prompt_at[one.targets]) for one in arena.users]
        """And of its targets: satisfaction is on these."""
        spans = crowd.spans
        self.liked = [np.array([one.taste.utility(a.scores, spans) for a in self.answers]) for one in arena.users]
        self.grids = [self._grid(one) for one in self.liked]
        """Per user, mean utility [configurations, prompts]."""

    def _grid(self, liked: Floats) -> Floats:
        shape = (len(self.configurations), len(self.prompts))
        cell, known = self.configuration_of * shape[1] + self.prompt_of, ~np.isnan(liked)
        sums, counts = (
            np.bincount(cell[known], weights, minlength=shape[0] * shape[1]) for weights in (liked[known], None)
        )
        found: Floats = np.where(counts, sums / np.maximum(counts, 1), np.nan).reshape(shape)
        return found

    def under(self, configure: Callable[[int, int], Configuration]) -> Floats:
        """Satisfaction under the configuration for (user, number of choices)."""
        return self.arena.filled(
            lambda at, count: float(
                np.nanmean(self.grids[at][self.configurations.index(configure(at, count) or {}), self.tested[at]])
            )
        )

    def best(self, at: int) -> Configuration:
        """The configuration whose answers to the context's prompts the user likes most; none if none is measured."""
        liked = np.nanmean(self.grids[at][:, self.shown[at]], axis=1)
        return None if np.isnan(liked).all() else self.configurations[int(np.nanargmax(liked))]

    def nearest(self, at: int, count: int) -> Configuration:
        """The configuration whose scores are nearest to the mean of the chosen answers': what it leaves open is as in
        all answers. The simplest that reads choices at all."""
        crowd = self.arena.steering.held_out
        chosen = [crowd.answers[one] for one in self.arena.users[at].context[:count, 0]]
        usual, wanted = (_mean_scores(crowd.rubrics, some) for some in (crowd.answers, chosen))
        scores = {one.id: {level.name: level.score for level in one.levels} for one in crowd.rubrics}

        def distance(configuration: Mapping[str, str]) -> float:
            told = {name: scores[name][level] for name, level in configuration.items() if name in scores}
            gaps = [(told.get(name, usual[name]) - score) / crowd.spans[name] for name, score in wanted.items()]
            return float(np.linalg.norm(gaps))

        return min(self.configurations, key=distance)

    def everybodys(self) -> Configuration:
        """The configuration that all users together like most on what they were shown."""
        liked = [np.nanmean(grid[:, shown], axis=1) for grid, shown in zip(self.grids, self.shown, strict=True)]
        return self.configurations[int(np.nanargmax(np.nanmean(liked, axis=0)))]

    def by_chance(self) -> Floats:
        """Mean satisfaction under a configuration drawn at random."""
        return self.arena.filled(lambda at, count: float(np.nanmean(self.grids[at][:, self.tested[at]])))

    def reranked(self) -> Floats:
        """Satisfaction with the best of n answers without a directive, by each seed's reward model."""
        arena, fitted = self.arena, self.arena.fitted
        rows = np.flatnonzero(self.configuration_of == 0)
        vectors = torch.tensor(fitted.embed(arena.steering.embeddings([self.answers[at] for at in rows])))
        groups = [np.flatnonzero(self.prompt_of[rows] == at) for at in range(len(self.prompts))]
        found = np.zeros((len(arena.users), len(arena.counts), len(fitted.models)))
        for seed, model in enumerate(fitted.models):
            for at_count, count in enumerate(arena.counts):
                with torch.no_grad():
                    z = model.encoder(arena.tried.tasks(num_choices=count).context)
                    rewards = model.reward(z, vectors.expand(len(z), -1, -1)).numpy()
                for at, own in enumerate(self.liked):
                    best = [rows[groups[one][np.argmax(rewards[at, groups[one]])]] for one in self.tested[at]]
                    found[at, at_count, seed] = np.nanmean(own[best])
        return found


def _mean_scores(rubrics: Sequence[Rubric], answers: Sequence[Answer]) -> dict[str, float]:
    """By rubric, over the answers that have a score; rubrics without any are left out."""
    scores = {rubric.id: [one.scores[rubric.id] for one in answers if rubric.id in one.scores] for rubric in rubrics}
    return {name: float(np.mean(some)) for name, some in scores.items() if some}


def planned_answer(directive: str | None, prompt: Prompt, sample: int) -> SteeredAnswer:
    """A row still without text."""
    return SteeredAnswer(directive=directive, prompt_id=prompt.prompt_id, prompt=prompt.text, sample=sample, text="")
