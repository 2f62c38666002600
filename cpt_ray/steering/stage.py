"""`cpt steer fit | infer | evaluate`: reward models from simulated users, a user's configuration, and the comparison.

Users to learn from choose between the writer's answers to train prompts; held-out users between the answers of the
evaluation, to held-out prompts. Utilities come from the rubrics' measures where there are any, else from the judge:
never from the policy.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cpt_ray.config import ModelConfig, SteerConfig
from cpt_ray.configuration import CATALOG_FILE, Catalog
from cpt_ray.console import say
from cpt_ray.errors import UserError
from cpt_ray.records import Generation, Grade, Prompt, SteeredAnswer, Trial, content_id
from cpt_ray.rubric import Rubric
from cpt_ray.rundir import RunDir
from cpt_ray.steering.answers import read_answers
from cpt_ray.steering.fitting import Fit, Tensors, fit_policy, fit_reward_models, reference_logps, standardise
from cpt_ray.steering.inference import Candidates, Choice, Preferences, Question
from cpt_ray.steering.page import render_page, table_lines
from cpt_ray.steering.policy import ConditionalPolicy, Sequences
from cpt_ray.steering.reward import RewardModel, accuracy
from cpt_ray.steering.tables import (
    AdapterActor,
    AnswerActor,
    EmbedActor,
    LogprobActor,
    PolicyScorer,
    fill_table,
    sequence,
)
from cpt_ray.steering.users import (
    Answer,
    Floats,
    Population,
    Taste,
    User,
    draw_taste,
    grade_by_measures,
    make_answer,
)
from cpt_ray.synthesis import Plan, Shards

COUNTS = (0, 1, 3, 5, 10)
"""Numbers of choices that results are given for, up to steer.choices."""
RESULTS = "report/steering.json"
QUESTIONS = "steering/questions.json"
NUM_QUESTIONS = 200
PROMPT_HEAD = "The user compared pairs of answers. Answer in the way this user likes."
RESAMPLES = 1000
POLICY_USERS, POLICY_PAIRS, POLICY_PROMPTS = 40, 10, 4
"""How many held-out users, pairs and prompts of each a conditional policy is tried on: it is run for each of them."""

_Sides = Sequence[tuple[list[int], list[int]]]
"""Per user, the prompts of its context and of its targets."""
_Configure = Callable[[int, int], dict[str, str] | None]


@dataclass(frozen=True)
class Steering:
    """What all three commands start from."""

    plan: Plan
    run: RunDir
    shards: Shards | None
    """The run's tables; None where the answers come with the data."""

    @property
    def config(self) -> SteerConfig:
        """The run file's section."""
        return self.plan.config.steer

    @cached_property
    def policy(self) -> ModelConfig:
        """The tuned model."""
        return self.plan.config.policy.model_copy(update={"model": str(self.run.model.absolute())})

    @cached_property
    def catalog(self) -> Catalog:
        """What the tuned model can be asked for; UserError if there is none."""
        found = self.run.read_json(CATALOG_FILE)
        if not found:
            raise UserError(f"{self.run.path}: no tuned model; run `cpt train` with this run file first")
        return Catalog.from_json(found)

    def candidates(self, reading: Any = "levels") -> Candidates:
        """What users may have in mind."""
        return Candidates(
            self.catalog,
            self.plan.config.train.beta,
            lapse=self.config.lapse,
            certainty=self.config.certainty,
            reading=reading,
            policy=self.policy.identity,
        )

    def _answer(self, prompt_id: str, prompt: str, text: str, rubric_id: str, score: float | None) -> Answer:
        scores = {rubric_id: score} if score is not None else {}
        return make_answer(prompt_id, prompt, text, scores | grade_by_measures(self.plan.rubrics, text))

    @cached_property
    def learned_from(self) -> Population:
        """The writer's answers, to train prompts."""
        rubrics = [one for one in self.plan.rubrics if one.id not in self.config.held_out_rubrics]
        if self.shards is None:
            return self._crowd(self._given["train"], rubrics)
        grades = {one.unit_id: one.score for one in self.run.read("grades", self.shards.grades, Grade)}
        rows = self.run.read("generations", self.shards.generations, Generation)
        answers = [
            self._answer(one.prompt_id, one.prompt, one.text, one.rubric_id, grades.get(one.unit_id)) for one in rows
        ]
        return self._crowd(answers, rubrics)

    def _crowd(self, answers: Sequence[Answer], rubrics: Sequence[Rubric]) -> Population:
        distinct = list({one.answer_id: one for one in answers}.values())
        return Population(distinct, rubrics, self.plan.config.seed, self.config.kinds)

    @cached_property
    def _given(self) -> dict[str, list[Answer]]:
        """The data's own answers, by split."""
        assert self.config.answers is not None
        return read_answers(self.plan.config.prompts, self.config.answers, self.plan.rubrics, self.plan.prompts)

    @cached_property
    def held_out(self) -> Population:
        """Both models' answers in the evaluation, to held-out prompts; UserError if it was not run."""
        if self.shards is None:
            return self._crowd(self._given["held_out"], self.plan.rubrics)
        names = sorted(path.stem for path in (self.run.path / "evaluation").glob("*.parquet"))
        rows = [one for one in self.run.read("evaluation", names, Trial) if one.text]
        if not rows:
            raise UserError(f"{self.run.path}: no evaluation; run `cpt evaluate` with this run file first")
        answers = [self._answer(one.prompt_id, one.prompt, one.text, one.rubric_id, one.score) for one in rows]
        return self._crowd(answers, self.plan.rubrics)

    def users(self, crowd: Population, count: int, salt: int) -> list[User]:
        """Users of all kinds in turn."""
        rng = np.random.default_rng([self.plan.config.seed, salt])
        kinds, settings = self.config.kinds, self.config
        tastes = [draw_taste(rng, crowd.rubrics, kinds[at % len(kinds)]) for at in range(count)]
        sizes = (settings.choices, settings.targets, settings.conflicting)
        return [crowd.user(rng, taste, *sizes) for taste in tastes]

    @cached_property
    def test_users(self) -> list[User]:
        """Held-out users and their twins."""
        return with_twins(self.users(self.held_out, max(1, self.config.test_users // 2), 1))

    def embeddings(self, answers: Sequence[Answer]) -> NDArray[np.float32]:
        """[answers, E], from the table or made now."""
        model = self.config.embedder or self.policy
        rows = self.table("steering_embeddings", answers, EmbedActor, [model], model)
        return np.array([one.vector for one in rows], dtype=np.float32)

    def logprobs(self, answers: Sequence[Answer]) -> Floats:
        """[answers, 1 + directives], from the table or made now."""
        directives = self.candidates().directives
        rows = self.table("steering_logprobs", answers, LogprobActor, [self.policy, directives], self.policy)
        return np.array([one.logprobs for one in rows])

    def table(
        self, name: str, rows: Sequence[Any], actor: Any, arguments: Sequence[Any], model: ModelConfig
    ) -> list[Any]:
        """`fill_table`, keyed by the model and what the actor is made of."""
        key = content_id(model.answer_key, [str(one) for one in arguments if not isinstance(one, ModelConfig)])
        return fill_table(
            self.run, name, rows, actor, arguments, model, key, shard_rows=self.plan.config.synthesis.shard_rows
        )


def with_twins(users: Sequence[User]) -> list[User]:
    """Users, each followed by its twin."""
    return [one for user in users for one in (user, user.twin())]


# ---------------------------------------------------------------- fit


@dataclass(frozen=True)
class Fitted:
    """The trained models, and the data they are tried on."""

    models: list[RewardModel]
    """One per seed."""
    static: list[RewardModel]
    """The same, trained without any choices."""
    policies: list[ConditionalPolicy]
    """One per form of NP-DPO."""
    vectors: NDArray[np.float32]
    """Standardised embeddings of the held-out answers."""
    learned: NDArray[np.float32]
    """Raw embeddings of the answers learned from, which set the standard."""

    def embed(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw embeddings of other answers, standardised alike."""
        return standardise(np.concatenate([self.learned, vectors]), len(self.learned))[len(self.learned) :]


def fit(steering: Steering) -> Fitted:
    """Embeddings, reward models and the questions worth asking; only what is missing is made."""
    crowd, held_out = steering.learned_from, steering.held_out
    users = steering.users(crowd, steering.config.users, 0)
    vectors = steering.embeddings([*crowd.answers, *held_out.answers])
    num_learned = len(crowd.answers)
    scaled = standardise(vectors, num_learned)
    settings = steering.config.model_dump(
        include={"kinds", "users", "held_out_rubrics", "choices", "targets", "conflicting", "size", "variational",
                 "steps", "learning_rate", "batch_users"}
    )  # fmt: skip
    key = content_id(settings, [one.answer_id for one in crowd.answers], float(np.abs(vectors).sum()))
    folder = steering.run.path.absolute() / "steering" / key
    tensors = Tensors.of(scaled[:num_learned], users)
    models, static = (
        fit_reward_models(Fit(steering.config, folder, steering.plan.config.seed, kind), tensors)
        for kind in ("np-btl", "static")
    )
    answers = [*crowd.answers, *held_out.answers]
    policies = _fit_policies(steering, key, tensors, answers) if steering.config.forms else []
    if steering.shards is not None:
        _write_questions(steering)
    return Fitted(models, static, policies, scaled[num_learned:], vectors[:num_learned])


def _fit_policies(steering: Steering, key: str, tensors: Tensors, answers: Sequence[Answer]) -> list[ConditionalPolicy]:
    """NP-DPO on the same users."""
    config = steering.config
    settings = config.model_dump(
        include={"policy_beta", "policy_learning_rate", "policy_steps", "policy_users", "policy_pairs"}
    )
    folder = steering.run.path.absolute() / "steering" / content_id(key, settings, steering.policy.identity)
    texts = policy_texts(steering, answers[: len(tensors.embeddings)])
    fits = [Fit(config, folder, steering.plan.config.seed, form) for form in config.forms]
    return [fit_policy(one, tensors, texts, steering.policy.path) for one in fits]


def policy_texts(steering: Steering, answers: Sequence[Answer]) -> Sequences:
    """Token ids of each (prompt, answer) without a directive, and where the answer starts."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(steering.policy.path)
    kwargs = steering.policy.chat_template_kwargs
    return [sequence(tokenizer, None, one.prompt, one.text, kwargs) for one in answers]


def _write_questions(steering: Steering) -> None:
    """Pairs with their margins known, so that asking them costs a server nothing."""
    crowd, candidates = steering.learned_from, steering.candidates()
    known = steering.run.read_json(QUESTIONS)
    if known and known["key"] == candidates.key:
        return
    rng = np.random.default_rng(steering.plan.config.seed)
    pool = np.flatnonzero(crowd.conflicting) if crowd.conflicting.any() else np.arange(len(crowd.pairs))
    pairs = crowd.pairs[rng.permutation(pool)[:NUM_QUESTIONS]]
    places = sorted(set(pairs.flatten().tolist()))
    rewards = candidates.rewards(steering.logprobs([crowd.answers[at] for at in places]))
    rows = dict(zip(places, rewards, strict=True))
    questions = [
        Question(
            prompt=crowd.answers[first].prompt,
            first=crowd.answers[first].text,
            second=crowd.answers[second].text,
            margins=tuple((rows[first] - rows[second]).tolist()),
        )
        for first, second in pairs.tolist()
    ]
    steering.run.write_json(QUESTIONS, {"key": candidates.key, "questions": [one.to_json() for one in questions]})


def read_questions(run: RunDir, candidates: Candidates) -> list[Question]:
    """The questions that `fit` wrote for this model; none if it wrote none."""
    found = run.read_json(QUESTIONS)
    if not found or found["key"] != candidates.key:
        return []
    return [Question(**{**one, "margins": tuple(one["margins"])}) for one in found["questions"]]


# ---------------------------------------------------------------- infer


def infer(steering: Steering, choices: Sequence[Choice]) -> dict[str, Any]:
    """The belief after some choices, and the next question."""
    candidates, state = steering.candidates(), Preferences()
    questions = read_questions(steering.run, candidates)
    candidates.add(state, choices, PolicyScorer(steering.policy), questions)
    following = candidates.next_question(state, questions)
    ask = {"prompt": following.prompt, "first": following.first, "second": following.second} if following else None
    return candidates.belief(state).to_json() | {"question": ask}


def read_choices(path: Path) -> list[Choice]:
    """Choices, one JSON object a line; UserError that names the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    choices = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found = Choice(**json.loads(line))
        except (json.JSONDecodeError, TypeError):
            found = None
        if found is None or not all(isinstance(one, str) for one in (found.prompt, found.chosen, found.rejected)):
            raise UserError(f'{path}:{number}: expected {{"prompt": "...", "chosen": "...", "rejected": "..."}}')
        choices.append(found)
    if not choices:
        raise UserError(f"{path}: no choices in it")
    return choices


# ---------------------------------------------------------------- evaluate


class Bank:
    """The policy's answers to held-out prompts, so that any number of users can be scored by looking up."""

    def __init__(self, steering: Steering):
        candidates = steering.candidates()
        self.configurations: list[dict[str, str]] = [
            {name: steering.plan.by_id[name].levels[at].name for name, at in one.items()}
            for one in candidates.configurations
        ]
        held_out = {one.prompt_id: one.prompt for one in steering.held_out.answers}
        self.prompts = [Prompt(prompt_id=name, text=held_out[name], split="held_out") for name in sorted(held_out)]
        directives = [steering.catalog.resolve(one).directive for one in self.configurations]
        config = steering.config
        planned = [
            planned_answer(directive, prompt, sample)
            for at, directive in enumerate(directives)
            for prompt in self.prompts
            for sample in range(config.samples if at else max(config.samples, config.best_of))
        ]
        rows = answer(steering, planned)
        self.answers = [steering._answer(one.prompt_id, one.prompt, one.text, "", None) for one in rows]
        index = {directive: at for at, directive in enumerate(directives)}
        numbers = {one.prompt_id: at for at, one in enumerate(self.prompts)}
        self.configuration_of = np.array([index[one.directive] for one in rows])
        self.prompt_of = np.array([numbers[one.prompt_id] for one in rows])

    def grid(self, liked: Floats) -> Floats:
        """Mean utility of the answers under each configuration to each prompt, [configurations, prompts]."""
        shape = (len(self.configurations), len(self.prompts))
        cell = self.configuration_of * shape[1] + self.prompt_of
        known = ~np.isnan(liked)
        sums, counts = (
            np.bincount(cell[known], weights, minlength=shape[0] * shape[1]) for weights in (liked[known], None)
        )
        found: Floats = np.where(counts, sums / np.maximum(counts, 1), np.nan).reshape(shape)
        return found


def planned_answer(directive: str | None, prompt: Prompt, sample: int) -> SteeredAnswer:
    """A row still without text."""
    return SteeredAnswer(directive=directive, prompt_id=prompt.prompt_id, prompt=prompt.text, sample=sample, text="")


def answer(steering: Steering, planned: Sequence[SteeredAnswer]) -> list[SteeredAnswer]:
    """The planned rows with the policy's answers."""
    seed = steering.plan.config.seed
    return steering.table("steering_answers", planned, AnswerActor, [steering.policy, seed], steering.policy)


def pairs_in_prompt(choices: Sequence[tuple[Answer, Answer]]) -> str:
    """A system prompt that shows (chosen, rejected) pairs: the baseline that needs no training."""
    shown = [f"{one.prompt}\nLiked: {one.text}\nNot liked: {other.text}" for one, other in choices]
    return "\n\n".join([PROMPT_HEAD, *shown])


def describe(steering: Steering) -> None:
    """What `fit` would learn from, without doing it: the data are read and checked."""
    config = steering.config
    for title, crowd, count in (
        ("learned from", steering.learned_from, 2 * config.users),
        ("held out", steering.held_out, len(steering.test_users)),
    ):
        say(
            f"{title:<13}{len(crowd.prompts)} prompts, {len(crowd.answers)} answers, {len(crowd.pairs)} pairs "
            f"({crowd.conflicting.mean():.0%} conflicting); {count} users, twins included"
        )
    steering.users(steering.learned_from, len(config.kinds), 0)  # says whether there are pairs enough
    model = config.embedder or steering.plan.config.policy
    say(f"embeddings   {model.model}, {model.num_actors} actors with {model.num_gpus:g} GPUs each")
    say(
        f"training     {config.seeds} seeds x {config.steps} steps of {config.batch_users} users and their twins, on "
        f"{config.num_workers} {'GPU' if config.use_gpu else 'CPU'} workers; NP-DPO: {list(config.forms) or 'none'}"
    )


def compare_rewards(steering: Steering) -> dict[str, Any]:
    """`fit`, then the reward models' accuracy on held-out users, printed and saved."""
    fitted = fit(steering)
    counts = [one for one in COUNTS if one <= steering.config.choices]
    return _write(steering, _reward_accuracy(steering, fitted, counts))


def _reward_accuracy(steering: Steering, fitted: Fitted, counts: Sequence[int]) -> dict[str, Any]:
    """Results so far: users, and accuracy [users, counts, seeds] of the reward models."""
    users = steering.test_users
    tried = Tensors.of(fitted.vectors, users)
    results: dict[str, Any] = {"counts": list(counts), "num_users": len(users)}
    results |= {"kinds": [_kind(one.taste) for one in users], "accuracy": {}, "satisfaction": {}}
    for name, models in (("static reward model", fitted.static), ("NP-BTL", fitted.models)):
        rows = [[accuracy(model, tried.tasks(num_choices=count)).numpy() for count in counts] for model in models]
        results["accuracy"][name] = np.array(rows).transpose(2, 1, 0)
    return results


def evaluate(steering: Steering) -> dict[str, Any]:
    """Accuracy on target pairs and satisfaction with answers, per method and number of choices; writes the report."""
    fitted = fit(steering)
    users, crowd = steering.test_users, steering.held_out
    counts = [one for one in COUNTS if one <= steering.config.choices]
    logprobs = steering.logprobs(crowd.answers)
    bank = Bank(steering)
    liked = [np.array([one.taste.utility(a.scores, crowd.spans) for a in bank.answers]) for one in users]
    grids = [bank.grid(one) for one in liked]
    sides = [_sides(bank, crowd, one) for one in users]
    results = _reward_accuracy(steering, fitted, counts)
    tried = Tensors.of(fitted.vectors, users)
    results["satisfaction"]["NP-BTL, best of n"] = _rerank(steering, fitted, bank, tried, liked, sides, counts)
    for reading in ("levels", "reward"):
        candidates = steering.candidates(reading)
        rewards = candidates.rewards(logprobs)
        margins = [rewards[one.context[:, 0]] - rewards[one.context[:, 1]] for one in users]
        name = "inferred directive" if reading == "levels" else "inferred directive (peaked)"
        target = [rewards[one.targets[:, 0]] - rewards[one.targets[:, 1]] for one in users]
        results["accuracy"][name] = np.array(
            [
                [_share(candidates.predict(margins[at][:count], target[at])) for count in counts]
                for at in range(len(users))
            ]
        )[..., None]
        found = _satisfaction(bank, grids, sides, counts, lambda at, n, c=candidates, m=margins: _told(c, m[at][:n]))
        results["satisfaction"][name] = found
        if reading == "levels":
            asked = [_interview(candidates, crowd, one, rewards, max(counts)) for one in users]
            results["satisfaction"]["inferred directive, asked"] = _satisfaction(
                bank, grids, sides, counts, lambda at, n, c=candidates, m=asked: _told(c, m[at][:n])
            )
    for policy in fitted.policies:
        name = f"NP-DPO {policy.form}"
        results["accuracy"][name] = _policy_accuracy(steering, policy, tried, counts)
        if policy.form == "gated_lora":
            results["satisfaction"][name] = _policy_satisfaction(steering, policy, tried, users, bank, sides, counts)
    results["satisfaction"]["static"] = _satisfaction(bank, grids, sides, counts, lambda at, n: None)
    best = [
        bank.configurations[int(np.nanargmax(np.nanmean(one[:, side[0]], axis=1)))]
        for one, side in zip(grids, sides, strict=True)
    ]
    results["satisfaction"]["oracle"] = _satisfaction(bank, grids, sides, counts, lambda at, n: best[at])
    results["satisfaction"]["pairs in the prompt"] = _in_prompt(steering, users, bank, sides, counts)
    return _write(steering, results)


def _kind(taste: Taste) -> str:
    return f"{taste.kind}, flipped" if taste.flipped else taste.kind


def _sides(bank: Bank, crowd: Population, user: User) -> tuple[list[int], list[int]]:
    """Prompts of a user's context, and of its targets, as indices of the bank's."""
    numbers = {one.prompt_id: at for at, one in enumerate(bank.prompts)}
    parts = [{numbers[crowd.answers[at].prompt_id] for at in part.flatten()} for part in (user.context, user.targets)]
    return sorted(parts[0]), sorted(parts[1])


def _share(margins: Floats) -> float:
    return float(np.mean(margins > 0) + 0.5 * np.mean(margins == 0))


def _told(candidates: Candidates, margins: Floats) -> dict[str, str] | None:
    """What is set after these choices; of more than two rubrics known, the two surest."""
    found = candidates.belief_from(margins)
    if not found.configuration or len(found.configuration) <= 2:
        return found.configuration
    surest = sorted(found.configuration, key=lambda name: -found.confidence[name])[:2]
    return {name: level for name, level in found.configuration.items() if name in surest}


def _satisfaction(
    bank: Bank, grids: Sequence[Floats], sides: _Sides, counts: Sequence[int], configure: _Configure
) -> Floats:
    """[users, counts, 1], on the targets' prompts, under the configuration for (user, number of choices)."""
    found = [
        [np.nanmean(own[bank.configurations.index(configure(at, count) or {})][sides[at][1]]) for count in counts]
        for at, own in enumerate(grids)
    ]
    return np.array(found)[..., None]


def _interview(candidates: Candidates, crowd: Population, user: User, rewards: Floats, count: int) -> Floats:
    """Margins of the choices that the user makes when each question is the one that says most, [count, directives]."""
    liked = crowd.utilities(user.taste)
    avoided = {crowd.answers[at].prompt_id for at in user.targets.flatten()}
    inside = np.array([one.prompt_id not in avoided for one in crowd.answers])
    pool = crowd.pairs[inside[crowd.pairs].all(axis=1)]
    rng = np.random.default_rng(0)
    pool = pool[rng.permutation(len(pool))[:NUM_QUESTIONS]]
    offered = rewards[pool[:, 0]] - rewards[pool[:, 1]]
    told: list[Floats] = []
    for _ in range(count):
        gains = candidates.information_gain(np.array(told), offered)
        best = int(np.argmax(gains))
        first, second = pool[best]
        is_first = (liked[first] > liked[second]) != (rng.random() < user.taste.noise)
        told.append(offered[best] if is_first else -offered[best])
        pool, offered = np.delete(pool, best, axis=0), np.delete(offered, best, axis=0)
    return np.array(told)


def _rerank(
    steering: Steering,
    fitted: Fitted,
    bank: Bank,
    tried: Tensors,
    liked: Sequence[Floats],
    sides: _Sides,
    counts: Sequence[int],
) -> Floats:
    """Satisfaction with the best of n answers without a directive, by each reward model, [users, counts, seeds]."""
    rows = np.flatnonzero(bank.configuration_of == 0)
    vectors = torch.tensor(fitted.embed(steering.embeddings([bank.answers[at] for at in rows])))
    groups = [np.flatnonzero(bank.prompt_of[rows] == at) for at in range(len(bank.prompts))]
    found = np.zeros((len(liked), len(counts), len(fitted.models)))
    for seed, model in enumerate(fitted.models):
        for at_count, count in enumerate(counts):
            with torch.no_grad():
                z = model.encoder(tried.tasks(num_choices=count).context)[0]
                rewards = model.reward(z, vectors.expand(len(z), -1, -1)).numpy()
            for at, own in enumerate(liked):
                best = [rows[groups[one][np.argmax(rewards[at, groups[one]])]] for one in sides[at][1]]
                found[at, at_count, seed] = np.nanmean(own[best])
    return found


def _in_prompt(steering: Steering, users: Sequence[User], bank: Bank, sides: _Sides, counts: Sequence[int]) -> Floats:
    """Satisfaction where the policy is shown the pairs themselves, [users, counts, 1]; NaN where they do not fit."""
    crowd = steering.held_out
    planned = []
    for at, user in enumerate(users):
        for count in counts[1:]:
            pairs = [(crowd.answers[one], crowd.answers[other]) for one, other in user.context[:count].tolist()]
            prompt = bank.prompts[sides[at][1][0]]
            planned += [planned_answer(pairs_in_prompt(pairs), prompt, sample) for sample in range(2)]
    rows = iter(answer(steering, planned))
    found = np.full((len(users), len(counts), 1), np.nan)
    for at, user in enumerate(users):
        for at_count in range(1, len(counts)):
            said = [one.text for one in (next(rows), next(rows)) if one.text]
            found[at, at_count, 0] = _mean_liking(steering, user, said, crowd.spans)
    return found


@torch.no_grad()
def _policy_accuracy(steering: Steering, policy: ConditionalPolicy, tried: Tensors, counts: Sequence[int]) -> Floats:
    """Implicit accuracy of the first users, [users, counts, 1]; NaN for the others."""
    texts = policy_texts(steering, steering.held_out.answers)
    num_users = min(POLICY_USERS, len(tried.context))
    pairs = tried.targets[:num_users, :POLICY_PAIRS]
    places = sorted(set(pairs.flatten().tolist()))
    reference = torch.zeros(len(texts))
    reference[places] = reference_logps(policy, [texts[at] for at in places])
    found = np.full((len(tried.context), len(counts), 1), np.nan)
    for at_count, count in enumerate(counts):
        context = tried.tasks(slice(0, num_users), count).context
        for at in range(num_users):
            own = context[at : at + 1].expand(pairs.shape[1], *context.shape[1:])
            margins = policy.margins(own, pairs[at].tolist(), texts, reference)
            found[at, at_count, 0] = _share(margins.double().numpy())
    return found


@torch.no_grad()
def _policy_satisfaction(
    steering: Steering,
    policy: ConditionalPolicy,
    tried: Tensors,
    users: Sequence[User],
    bank: Bank,
    sides: _Sides,
    counts: Sequence[int],
) -> Floats:
    """With answers under the first users' own adapters, by vLLM, [users, counts, 1]; NaN for the others."""
    folder = steering.run.path.absolute() / "steering" / "adapters"
    weights = content_id(*(float(one.double().sum()) for one in policy.own_state().values()))
    num_users = min(POLICY_USERS, len(users))
    planned = []
    for count in counts:
        z = policy.encoder(tried.tasks(slice(0, num_users), count).context)[0]
        for at in range(num_users):
            name = f"user-{content_id(weights, z[at].tolist())}"
            policy.fold(z[at], folder / name, steering.policy.path)
            prompts = [bank.prompts[one] for one in sides[at][1][:POLICY_PROMPTS]]
            planned += [planned_answer(name, one, 0) for one in prompts]
    arguments = [steering.policy, folder, policy.rank, steering.plan.config.seed]
    rows = steering.table("steering_answers", planned, AdapterActor, arguments, steering.policy)
    found = np.full((len(users), len(counts), 1), np.nan)
    left, spans = iter(rows), steering.held_out.spans
    for at_count in range(len(counts)):
        for at in range(num_users):
            said = [next(left).text for _ in sides[at][1][:POLICY_PROMPTS]]
            found[at, at_count, 0] = _mean_liking(steering, users[at], said, spans)
    return found


def _mean_liking(steering: Steering, user: User, texts: Sequence[str], spans: dict[str, float]) -> float:
    """Mean utility of texts; NaN if none has one."""
    values = [user.taste.utility(grade_by_measures(steering.plan.rubrics, one), spans) for one in texts]
    known = [one for one in values if not np.isnan(one)]
    return float(np.mean(known)) if known else float("nan")


def _write(steering: Steering, results: dict[str, Any]) -> dict[str, Any]:
    """Means with intervals in place of the values, saved, drawn and printed."""
    kinds = np.array(results["kinds"])
    rng = np.random.default_rng(steering.plan.config.seed)
    for metric in ("accuracy", "satisfaction"):
        for name, values in results[metric].items():
            per_kind = {kind: _means(values[kinds == kind]) for kind in sorted(set(kinds))}
            entry = {"mean": _means(values), "ci": _interval(values, rng), "per_kind": per_kind}
            if metric == "satisfaction":  # own context less the flipped one's, for a twin likes what its user dislikes
                entry["steer_gap"] = [None if one is None else 2 * one - 1 for one in entry["mean"]]
                entry["steer_gap_ci"] = [one and [2 * end - 1 for end in one] for one in entry["ci"]]
            results[metric][name] = entry
    del results["kinds"]
    steering.run.write_json(RESULTS, results)
    page = steering.run.write_text("report/steering.html", render_page(results))
    say("\n".join(table_lines(results)))
    say(f"report       {page}")
    return results


def _means(values: Floats) -> list[float | None]:
    """Per count, over users and seeds."""
    return [float(np.nanmean(one)) if not np.isnan(one).all() else None for one in values.transpose(1, 0, 2)]


def _interval(values: Floats, rng: np.random.Generator) -> list[list[float] | None]:
    """95% per count: users and seeds are drawn again, each with replacement; a user and its twin go together."""
    tried = ~np.isnan(values).all(axis=(1, 2))
    pairs = values[tried].reshape(int(tried.sum()) // 2, 2, *values.shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of nothing, where a method has no value
        means = np.array(
            [
                np.nanmean(
                    pairs[rng.integers(len(pairs), size=len(pairs))][
                        ..., rng.integers(values.shape[2], size=values.shape[2])
                    ],
                    axis=(0, 1, 3),
                )
                for _ in range(RESAMPLES)
            ]
        )
    ends = [np.percentile(one, [2.5, 97.5]) if not np.isnan(one).any() else None for one in means.T]
    return [None if one is None else one.tolist() for one in ends]
