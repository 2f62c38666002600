"""`cpt steer fit | infer`: models from simulated users, and a user's configuration.

Users to learn from choose between the writer's answers to train prompts; held-out users between the answers of the
evaluation, to held-out prompts. Utilities come from the rubrics' measures where there are any, else from the judge:
never from the policy.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer

from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import POLICY_SETTINGS, REWARD_SETTINGS, ModelConfig, SteerConfig
from cpt_ray.console import Advance, progress, say
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Line, Runner
from cpt_ray.errors import UserError
from cpt_ray.judging.judge import Gradings
from cpt_ray.plan import Plan, Shards
from cpt_ray.prompts import read_jsonl
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.rubrics.rubric import Rubric, check_rubric_names
from cpt_ray.steering.actors import EmbedActor, Fill, LogprobActor
from cpt_ray.steering.answers import Answer, grade_by_measures, make_answer, read_answers
from cpt_ray.steering.choices import Choice, PreferenceState, Question, parse_choices
from cpt_ray.steering.fitting import ModelToFit, load_policy, load_reward_models, train_missing
from cpt_ray.steering.inference import Candidates, make_candidates, read_questions
from cpt_ray.steering.policy import VERSION, AnswerTokens, ConditionalPolicy, SavedForm
from cpt_ray.steering.reward import RewardModel, Tensors
from cpt_ray.steering.scoring import PolicyScorer, answer_tokens
from cpt_ray.steering.users import Floats, Population, User, draw_taste
from cpt_ray.tables.records import Generation, Grade, Trial, content_id
from cpt_ray.tables.rundir import CATALOG_FILE, QUESTIONS_FILE, TABLES, RunDir
from cpt_ray.tables.shard import ShardName
from cpt_ray.tables.store_path import AnyPath

NUM_QUESTIONS = 200
"""How many questions are kept for users, or offered to a held-out user."""


@dataclass(frozen=True)
class Steering:
    """What all three commands start from."""

    plan: Plan
    run: RunDir
    shards: Shards | None
    """The run's tables; None where the answers come with the data."""
    runner: Runner = run_lines

    @property
    def config(self) -> SteerConfig:
        """The run file's section."""
        return self.plan.config.steer

    @property
    def folder(self) -> AnyPath:
        """Of the trained models."""
        return self.run.steering.absolute()

    @cached_property
    def policy(self) -> ModelConfig:
        """The tuned model."""
        return self.plan.config.policy.model_copy(update={"model": str(self.run.model.absolute())})

    @cached_property
    def catalog(self) -> Catalog:
        """What the tuned model can be asked for; UserError if there is none."""
        catalog = self.run.read_json(CATALOG_FILE)
        if not catalog:
            raise UserError(f"{self.run.path}: no tuned model; run `cpt train` with this run file first")
        return Catalog.from_json(catalog)

    @cached_property
    def candidates(self) -> Candidates:
        """What users may have in mind."""
        return make_candidates(self.plan.config, self.catalog, self.policy)

    def answer(self, prompt_id: str, prompt: str, text: str, scores: Mapping[str, float | None]) -> Answer:
        """Graded by rubric id: by the measures where a rubric has them, else as `scores` says."""
        known = {name: score for name, score in scores.items() if score is not None}
        return make_answer(prompt_id, prompt, text, known | grade_by_measures(self.plan.rubrics, text))

    @cached_property
    def training_population(self) -> Population:
        """The writer's answers, to train prompts."""
        check_rubric_names("steer.held_out_rubrics", self.config.held_out_rubrics, self.plan.by_id)
        rubrics = [rubric for rubric in self.plan.rubrics if rubric.id not in self.config.held_out_rubrics]
        if not rubrics:
            raise UserError("steer.held_out_rubrics: names every rubric; leave one to learn from")
        if self.shards is None:
            return self._population(self._given["train"], rubrics)
        rows_of_judges = self.run.read("grades", self.shards.grades, Grade)
        grades = Gradings.of(self.plan.rubrics, rows_of_judges, self.plan.config.synthesis.aggregate).combined
        answers = []
        for row in self.run.read("generations", self.shards.generations, Generation):
            keys = {rubric.id: (row.unit_id, rubric.id) for rubric in self.plan.rubrics}
            scores = {name: grades[key].score for name, key in keys.items() if key in grades}
            answers.append(self.answer(row.prompt_id, row.prompt, row.text, scores))
        return self._population(answers, rubrics)

    def _population(self, answers: Sequence[Answer], rubrics: Sequence[Rubric]) -> Population:
        distinct = list({answer.answer_id: answer for answer in answers}.values())
        return Population(distinct, rubrics, self.plan.config.seed, self.config.kinds)

    @cached_property
    def _given(self) -> dict[str, list[Answer]]:
        """The data's own answers, by split."""
        assert self.config.answers is not None
        return read_answers(self.plan.config.prompts, self.config.answers, self.plan.rubrics, self.plan.prompts)

    @cached_property
    def held_out_population(self) -> Population:
        """Both models' answers in the evaluation, to held-out prompts; UserError if it was not run."""
        if self.shards is None:
            return self._population(self._given["held_out"], self.plan.rubrics)
        names = sorted(self.run.names("evaluation"))
        rows = [row for row in self.run.read("evaluation", names, Trial) if row.text]
        if not rows:
            raise UserError(f"{self.run.path}: no evaluation; run `cpt evaluate` with this run file first")
        answers = [self.answer(row.prompt_id, row.prompt, row.text, {row.rubric_id: row.score}) for row in rows]
        return self._population(answers, self.plan.rubrics)

    def users(
        self, population: Population, count: int, salt: int, advance: Advance = lambda amount, note: None
    ) -> list[User]:
        """Users of all kinds in turn; `advance` is called for each."""
        rng, config = np.random.default_rng([self.plan.config.seed, salt]), self.config
        tastes = [draw_taste(rng, population.rubrics, config.kinds[at % len(config.kinds)]) for at in range(count)]
        users = []
        for taste in tastes:
            users.append(population.user(rng, taste, config.choices, config.targets, config.conflicting))
            advance(1, "")
        return users

    @cached_property
    def test_users(self) -> list[User]:
        """Held-out users, each followed by its twin."""
        drawn = self.users(self.held_out_population, max(1, self.config.test_users // 2), 1)
        return [each for user in drawn for each in (user, user.twin())]

    def embeddings(self, answers: Sequence[Answer]) -> NDArray[np.float32]:
        """[answers, E], from the table or made now."""
        model = self.config.embedder or self.policy
        rows = self.table("steering_embeddings", answers, EmbedActor, model)
        return np.array([row.vector for row in rows], dtype=np.float32)

    def logprobs(self, answers: Sequence[Answer]) -> Floats:
        """[answers, directives], from the table or made now."""
        directives = self.candidates.directives
        rows = self.table("steering_logprobs", answers, LogprobActor, self.policy, directives=directives)
        return np.array([row.logprobs for row in rows])

    def answer_tokens(self, answers: Sequence[Answer]) -> Sequence[AnswerTokens]:
        """Of each (prompt, answer), without a directive."""
        tokenizer, kwargs = AutoTokenizer.from_pretrained(self.policy.path), self.policy.chat_template_kwargs
        return [answer_tokens(tokenizer, None, answer.prompt, answer.text, kwargs) for answer in answers]

    def table(self, name: str, rows: Sequence[Any], actor: Any, model: ModelConfig, **made_of: Any) -> list[Any]:
        """The table's rows for `rows`, in order; shards that are not there yet are made by a pool of actors.

        Args:
            actor: one of those in actors.py.
            made_of: its arguments beside `model`, of which the shards' names are hashes.
        """
        layout = () if actor is EmbedActor else (layout_hash("policy"),)  # embeddings are of bare texts
        key = content_id(model.answer_key, [str(argument) for argument in made_of.values()], *layout)
        label, size = name.removeprefix("steering_"), self.plan.config.synthesis.shard_rows
        shards: dict[str, Sequence[Any]] = {}
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            shards[ShardName(label, start // size).keyed(content_id(repr(part), key))] = part
        missing = {shard: part for shard, part in shards.items() if not self.run.has(name, shard)}
        fill = Fill(stage=f"steer {label}", table=name, model=model, shards=missing)
        self.runner(self.run, [Line(list(shards), [fill])], functools.partial(actor, **made_of))
        return self.run.read(name, list(shards), TABLES[name])


# ---------------------------------------------------------------- fit


@dataclass(frozen=True)
class Scale:
    """Of the raw embeddings learned from: with it, all have mean 0 and deviation 1 in each dimension."""

    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[answers, E], standardised."""
        return (vectors - self.mean) / self.deviation


@dataclass(frozen=True)
class Fitted:
    """The trained models, and the data they are tried on."""

    models: list[RewardModel]
    """One per seed."""
    static: list[RewardModel]
    """The same, trained without any choices."""
    oracle: list[RewardModel]
    """The same, given the taste instead."""
    policies: list[ConditionalPolicy]
    """One per form of NP-DPO."""
    vectors: NDArray[np.float32]
    """Standardised embeddings of the held-out answers."""
    scale: Scale


def fit(steering: Steering) -> Fitted:
    """Embeddings, models and the questions worth asking; only what is missing is made."""
    config, seed = steering.config, steering.plan.config.seed
    with progress("steer users", config.users, "users") as advance:
        advance(0, "reading the answers")
        population, held_out = steering.training_population, steering.held_out_population
        users = steering.users(population, config.users, 0, advance)
    vectors = steering.embeddings([*population.answers, *held_out.answers])
    if broken := int((~np.isfinite(vectors).all(axis=1)).sum()):
        problem = f"{broken} of {len(vectors)} embeddings are not finite numbers"
        raise UserError(f"steer.embedder: {problem}; give another one")
    learned, tried = np.split(vectors, [len(population.answers)])
    scale = Scale(learned.mean(axis=0), learned.std(axis=0) + 1e-6)
    settings = config.model_dump(include=REWARD_SETTINGS)
    graded = [[answer.answer_id, dict(answer.scores)] for answer in population.answers]
    key = content_id(settings, seed, graded, float(np.abs(vectors).sum()))
    tensors = Tensors.of(scale(learned), users, list(steering.plan.by_id))
    fits = [ModelToFit(config, steering.folder / key, seed, kind) for kind in ("np-btl", "static", "oracle")]
    train_missing(fits, {"tensors": tensors.__dict__})
    models, static, oracle = (load_reward_models(each, vectors.shape[1]) for each in fits)
    policies = _fit_policies(steering, key, tensors, fits[0].path(0), scale) if config.forms else []
    if steering.shards is not None:
        _write_questions(steering)
    return Fitted(models, static, oracle, policies, scale(tried), scale)


def _fit_policies(
    steering: Steering, key: str, tensors: Tensors, reward: AnyPath, scale: Scale
) -> list[ConditionalPolicy]:
    """NP-DPO on the same users."""
    config, answers, policy = steering.config, steering.training_population.answers, steering.policy
    settings = config.model_dump(include=POLICY_SETTINGS)
    folder = steering.folder / content_id(key, settings, policy.identity, VERSION)
    fits = [ModelToFit(config, folder, steering.plan.config.seed, form, policy.model, reward) for form in config.forms]
    prompts = [answer.prompt_id for answer in answers]
    train_missing(fits, {"tensors": tensors.__dict__, "tokens": steering.answer_tokens(answers), "prompts": prompts})
    for each in fits:
        saved = SavedForm(
            weights=str(each.path(0)).removeprefix(f"{steering.run.path.absolute()}/"),
            policy=policy.identity,
            embedder=(config.embedder or policy).identity,
            size=config.size,
            mean=scale.mean.tolist(),
            deviation=scale.deviation.tolist(),
        )
        steering.run.write_json(SavedForm.file(each.method), asdict(saved))
    return [load_policy(each, tensors.embeddings.shape[1]) for each in fits]


def _write_questions(steering: Steering) -> None:
    """Pairs with their margins known, so that asking them costs a server nothing."""
    population, candidates = steering.training_population, steering.candidates
    saved = steering.run.read_json(QUESTIONS_FILE)
    if saved and saved["key"] == candidates.key:
        return
    rng = np.random.default_rng(steering.plan.config.seed)
    pool = np.flatnonzero(population.conflicting) if population.conflicting.any() else np.arange(len(population.pairs))
    pairs = population.pairs[rng.permutation(pool)[:NUM_QUESTIONS]]
    places, ranks = np.unique(pairs, return_inverse=True)
    values = candidates.values(steering.logprobs([population.answers[at] for at in places]))[ranks.reshape(pairs.shape)]
    questions = []
    for pair, margins in zip(pairs, values[:, 0] - values[:, 1], strict=True):
        first, second = (population.answers[at] for at in pair)
        question = Question(prompt=first.prompt, first=first.text, second=second.text, margins=tuple(margins.tolist()))
        questions.append(asdict(question))
    steering.run.write_json(QUESTIONS_FILE, {"key": candidates.key, "questions": questions})


def describe(steering: Steering) -> None:
    """What `fit` would learn from, without doing it: the data are read and checked."""
    config = steering.config
    for title, population, count in (
        ("learned from", steering.training_population, 2 * config.users),
        ("held out", steering.held_out_population, len(steering.test_users)),
    ):
        say(
            f"{title:<13}{len(population.prompts)} prompts, {len(population.answers)} answers, "
            f"{len(population.pairs)} pairs ({population.conflicting.mean():.0%} conflicting); "
            f"{count} users, twins included"
        )
    steering.users(steering.training_population, len(config.kinds), 0)  # says whether there are pairs enough
    model = config.embedder or steering.plan.config.policy
    say(f"embeddings   {model.model}, {model.num_actors} actors with {model.num_gpus:g} GPUs each")
    say(
        f"training     {config.seeds} seeds x {config.steps} steps of {config.batch_users} users and their twins, on "
        f"{config.num_workers} {'GPU' if config.use_gpu else 'CPU'} workers; NP-DPO: {list(config.forms) or 'none'}"
    )


# ---------------------------------------------------------------- infer


def infer(steering: Steering, choices: Sequence[Choice]) -> dict[str, Any]:
    """The belief after some choices, and the next question."""
    candidates, state = steering.candidates, PreferenceState()
    questions = read_questions(steering.run, candidates)
    candidates.add(state, choices, PolicyScorer(steering.policy), questions)
    following = candidates.next_question(state, questions)
    return candidates.belief(state.margins).to_json() | {"question": following.to_json() if following else None}


def read_choices(path: Path) -> list[Choice]:
    """Choices, one JSON object a line; UserError that names what is wrong."""
    return parse_choices(list(read_jsonl(path)), str(path))
