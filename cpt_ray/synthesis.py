"""Synthesis: plan, direct, write, judge, pair. Rubrics and prompts in, twin pairs out."""

from __future__ import annotations

import difflib
import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_ray.card import write_card
from cpt_ray.config import EMBEDDED, JudgeConfig, ModelConfig, PriceConfig, Range, RunConfig, SynthesisConfig
from cpt_ray.console import say
from cpt_ray.duplicates import NearDuplicates
from cpt_ray.engine import Completion, Engine, Request, sampled
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.grading import aggregate, grade_answer, judged_criterion, ungraded, voted_criteria
from cpt_ray.losses import OF_PAIRS, Stage
from cpt_ray.measures import terms_of
from cpt_ray.pairing import cell_id_of, control_directive, pair_cells, targets_of
from cpt_ray.pool import SHARDS_IN_FLIGHT, Line, Step, Tally, ledger_entry, run_lines, thoughts_note
from cpt_ray.prompting import (
    JOINT_HASH,
    RATIONALE_HASH,
    TEMPLATES_HASH,
    ChatMessage,
    director_messages,
    joint_writer_messages,
    judge_messages,
    level_labels,
    policy_messages,
    rationale_messages,
    rationale_schema,
    writer_messages,
)
from cpt_ray.prompts import read_prompts
from cpt_ray.records import (
    CONTROL,
    CriterionGrade,
    Directive,
    Generation,
    Grade,
    Prompt,
    Reject,
    Unit,
    content_id,
)
from cpt_ray.rows import reasons
from cpt_ray.rubric import Criterion, Rubric, directive_leak, load_rubrics
from cpt_ray.rundir import RunDir, derive

GRADE_FORMAT = 4
"""Goes up when a row of `grades` means something else than before."""
REPEATS_FORMAT = 2
"""The same for `repeats`."""
DIRECTOR_OVERSAMPLING = 4
"""Directives sampled per one wanted: some leak, some repeat each other."""
_RUBRICS = dict[str, Rubric]


@dataclass(frozen=True)
class Plan:
    """What a run consists of; a pure function of the run file and what it names."""

    config: RunConfig
    rubrics: tuple[Rubric, ...]
    prompts: tuple[Prompt, ...]
    rejects: tuple[Reject, ...] = ()
    """Rows that repeat a prompt."""

    @property
    def by_id(self) -> _RUBRICS:
        """Rubrics by id."""
        return {rubric.id: rubric for rubric in self.rubrics}

    def prompts_of(self, split: str) -> list[Prompt]:
        """Prompts of one split, in file order."""
        return [prompt for prompt in self.prompts if prompt.split == split]


def make_plan(config: RunConfig) -> Plan:
    """Reads and checks everything the run file names, before anything expensive starts."""
    rubrics = load_rubrics(config.rubric_paths)
    prompts = read_prompts(config.prompts)
    plan = Plan(config=config, rubrics=rubrics, prompts=tuple(prompts), rejects=tuple(prompts.rejects))
    for model in (config.writer, config.director, config.judge, *config.judges, config.policy):
        is_elsewhere = model.endpoint is not None or Path(model.path).is_dir()
        if not is_elsewhere and difflib.get_close_matches(model.model, [EMBEDDED], cutoff=0.8):
            raise UserError(f'model: found {model.model!r} (did you mean "{EMBEDDED}"?)')
    for name in (name for names in config.synthesis.combine for name in names):
        if name not in plan.by_id:
            raise UserError(f"synthesis.combine: no rubric {name!r}{did_you_mean(name, plan.by_id)}")
    check_leakage(plan.prompts)
    return plan


def check_leakage(prompts: Sequence[Prompt]) -> None:
    """UserError if a held-out prompt is a train prompt but for case, width, normal form, spaces and punctuation."""
    train = {_plain(one.text): one.text for one in prompts if one.split == "train"}
    for one in prompts:
        if one.split == "held_out" and (same := train.get(_plain(one.text))):
            raise UserError(
                f"prompts: {one.text[:80]!r} is held out, but {same[:80]!r} is trained on and has the same words; "
                "remove one of them"
            )


def _plain(text: str) -> str:
    return " ".join(terms_of(text))


def run_info(plan: Plan) -> dict[str, Any]:
    """What a run was made of, for run.yaml and the report."""
    config = plan.config
    roles = {role: getattr(config, role) for role in ("writer", "director", "judge", "policy")}
    return {
        "name": config.name,
        "seed": config.seed,
        "models": {role: model.model for role, model in roles.items()},
        "judges": [model.model for model in config.judges],
        "rubrics": {rubric.id: rubric.version for rubric in plan.rubrics},
        "hashes": {
            "rubrics": {rubric.id: rubric.content_hash for rubric in plan.rubrics},
            "prompts": content_id(*(prompt.prompt_id for prompt in plan.prompts)),
            "templates": TEMPLATES_HASH,
            "models": {role: model.identity for role, model in roles.items()},
        },
    }


# ---------------------------------------------------------------- plan


@dataclass(frozen=True)
class Units(Iterable[Unit]):
    """The units of one shard, made when they are looked at: a plan of millions costs no memory, nor their hashes."""

    rubrics: tuple[Rubric, ...]
    rubric_hashes: tuple[str, ...]
    prompts: Sequence[Prompt]
    sample: int
    model_key: str
    """Of the writer; of the policy in control units."""
    seed: int
    neutral_directives: tuple[str, ...] | None = None
    """In control units: what may be told instead of a rubric's directive."""

    @property
    def key(self) -> str:
        """Changes when any unit in it does."""
        prompts = content_id(*(one.prompt_id for one in self.prompts))
        settings = (self.neutral_directives, self._templates, self.model_key, self.seed)
        return content_id(self.rubric_hashes, prompts, self.sample, *settings)

    @property
    def _templates(self) -> str:
        return TEMPLATES_HASH if len(self.rubrics) == 1 else JOINT_HASH

    def __iter__(self) -> Iterator[Unit]:
        for prompt in self.prompts:
            for level, score in self._targets(prompt):
                yield self._unit(prompt, level, score)

    def _targets(self, prompt: Prompt) -> list[tuple[str, float | None]]:
        if self.neutral_directives is not None:
            return [(CONTROL, None)]
        if len(self.rubrics) == 1:
            return [(level.name, level.score) for level in self.rubrics[0].levels]
        # Several rubrics: as many answers as the shorter scale has levels, no level of either rubric twice.
        count = min(len(rubric.levels) for rubric in self.rubrics)
        orders = [
            sorted(rubric.levels, key=lambda level: content_id(prompt.prompt_id, self.sample, rubric.id, level.name))
            for rubric in self.rubrics
        ]
        return [("+".join(order[at].name for order in orders), None) for at in range(count)]

    def _unit(self, prompt: Prompt, level: str, score: float | None) -> Unit:
        rubric_id = "+".join(one.id for one in self.rubrics)
        if self.neutral_directives is not None:
            told = control_directive(self.neutral_directives, cell_id_of(rubric_id, prompt.prompt_id, self.sample))
            key: tuple[Any, ...] = (self.rubric_hashes, level, told, prompt.text, self.sample)
        else:
            rubrics = self.rubric_hashes[0] if len(self.rubrics) == 1 else self.rubric_hashes
            key = (rubrics, level, prompt.text, self.sample, self._templates)
        return Unit(
            unit_id=content_id(*key, self.model_key, self.seed),
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            rubric_id=rubric_id,
            level=level,
            score=score,
            sample=self.sample,
        )


def plan_units(plan: Plan) -> dict[str, Units]:
    """Every unit, by shard name. A shard holds whole cells of one (rubric, sample), so that it can be paired alone.

    The policy's own answers to some of a shard's prompts are a shard of their own, beside it. A prompt's samples follow
    each other, so that they share what the engine's prefix cache has of it.
    """
    config, chosen = plan.config, plan.config.synthesis
    prompts = plan.prompts_of("train")
    writer_key, policy_key = config.writer.answer_key, config.policy.answer_key
    joint = [tuple(plan.by_id[name] for name in names) for names in chosen.combine]
    shards: dict[str, Units] = {}
    for rubrics in [*((one,) for one in plan.rubrics), *joint]:
        rubric_id = "+".join(one.id for one in rubrics)
        hashes = tuple(one.content_hash for one in rubrics)
        rows = chosen.shard_rows // SHARDS_IN_FLIGHT  # of a file
        per_shard = max(1, rows // min(len(one.levels) for one in rubrics))
        for start, sample in itertools.product(range(0, len(prompts), per_shard), range(chosen.samples)):
            chunk, number = prompts[start : start + per_shard], f"{start // per_shard:05d}"
            units = Units(rubrics, hashes, chunk, sample, writer_key, config.seed)
            shards[f"{rubric_id}-{sample:03d}-{number}-{units.key[:12]}"] = units
            chunk = [one for one in chunk if _is_controlled(rubric_id, one, sample, chosen.control)]
            if chunk:
                units = Units(rubrics, hashes, chunk, sample, policy_key, config.seed, chosen.neutral_directives)
                shards[f"{rubric_id}-{sample:03d}-{CONTROL_MARK}{number}-{units.key[:12]}"] = units
    return shards


CONTROL_MARK = "c"
"""In front of the number of a shard of control units."""


def _is_controlled(rubric_id: str, prompt: Prompt, sample: int, share: float) -> bool:
    number = content_id("controlled", rubric_id, prompt.prompt_id, sample)
    return bool(int(number, 16) < share * 16 ** len(number))


# ---------------------------------------------------------------- write


@dataclass(frozen=True, kw_only=True)
class WriteStep(Step):
    """units -> generations (+ rejects): the writer answers with rubric and target in front of it."""

    rubrics: _RUBRICS
    seed: int
    neutral_directives: tuple[str, ...] = ()
    stage: str = "write"
    table: str = "generations"

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Writes one shard of answers."""
        units = run.read("units", [shard], Unit)
        tally = Tally(len(units))
        completions = engine.run([self.request(unit) for unit in units])
        tally.add(completions)
        rows, rejects = [], []
        for unit, one in zip(units, completions, strict=True):
            if one.error:
                tally.reject(one.error)
                rejects.append(Reject.of(self.stage, unit, unit.unit_id, one.error, one.detail))
            else:
                rows.append(_generation(unit, one))
        run.write("rejects", f"{self.stage}-{shard}", rejects)
        run.write(self.table, shard, rows, tally.close(len(rows)))

    def request(self, unit: Unit) -> Request:
        """What the writer is asked for a unit."""
        return sampled(self._messages(unit), self.model.sampling, unit.unit_id, self.seed)

    def _messages(self, unit: Unit) -> list[ChatMessage]:
        rubrics = rubrics_of(self.rubrics, unit.rubric_id)
        if unit.level == CONTROL:
            told = control_directive(self.neutral_directives, cell_id_of(unit.rubric_id, unit.prompt_id, unit.sample))
            return policy_messages(told, unit.prompt)
        targets = [(rubric, rubric.level(level)) for rubric, level in targets_of(rubrics, unit.level)]
        if len(targets) == 1:
            return writer_messages(*targets[0], unit.prompt)
        return joint_writer_messages(targets, unit.prompt)


def rubrics_of(rubrics: _RUBRICS, rubric_id: str) -> list[Rubric]:
    """The rubrics that a unit's rubric_id names."""
    return [rubrics[name] for name in rubric_id.split("+")]


def _generation(unit: Unit, one: Completion) -> Generation:
    return Generation(
        unit_id=unit.unit_id,
        prompt_id=unit.prompt_id,
        prompt=unit.prompt,
        rubric_id=unit.rubric_id,
        level=unit.level,
        sample=unit.sample,
        text=one.text,
        num_tokens=one.num_tokens - one.thought_tokens,
        is_cut=False,
    )


# ---------------------------------------------------------------- judge


def judge_answers(
    engine: Engine, rubric: Rubric, answers: Sequence[tuple[str, str, str]], judge: JudgeConfig, tally: Tally
) -> list[Grade]:
    """Grades (unit_id, prompt, answer) by one rubric, in the judge's mode."""
    verdicts = (_rationales if judge.mode == "rationale" else _probabilities)(engine, rubric, answers, judge, tally)
    return [
        grade_answer(rubric, unit_id, text, judged, judge.model)
        for (unit_id, _, text), judged in zip(answers, verdicts, strict=True)
    ]


def _probabilities(
    engine: Engine, rubric: Rubric, answers: Sequence[tuple[str, str, str]], judge: JudgeConfig, tally: Tally
) -> list[list[CriterionGrade]]:
    """One request of one token per answer and judged criterion."""
    labels = tuple(level_labels(rubric))
    completions = engine.run(
        [
            Request(messages=judge_messages(rubric, criterion, prompt, text), max_tokens=1, labels=labels)
            for _, prompt, text in answers
            for criterion in rubric.judged
        ]
    )
    tally.add(completions)
    at = iter(completions)

    def verdict(criterion: Criterion, one: Completion) -> CriterionGrade:
        if one.error:
            return ungraded(criterion, f"{one.error}: {one.detail}")
        return judged_criterion(rubric, criterion, dict(enumerate(one.label_logprobs, start=1)))

    return [[verdict(criterion, next(at)) for criterion in rubric.judged] for _ in answers]


def _rationales(
    engine: Engine, rubric: Rubric, answers: Sequence[tuple[str, str, str]], judge: JudgeConfig, tally: Tally
) -> list[list[CriterionGrade]]:
    """One request per answer: all judged criteria, `votes` times."""
    schema = rationale_schema(rubric)
    completions = engine.run(
        [
            sampled(
                rationale_messages(rubric, prompt, text),
                judge.sampling,
                unit_id,
                0,
                json_schema=schema,
                samples=judge.votes,
            )
            for unit_id, prompt, text in answers
        ]
        if rubric.judged
        else []
    )
    tally.add(completions)
    votes = [completions[at : at + judge.votes] for at in range(0, len(completions), judge.votes)]
    return [_voted(rubric, one) for one in votes] if votes else [[] for _ in answers]


def _voted(rubric: Rubric, votes: Sequence[Completion]) -> list[CriterionGrade]:
    if all(one.error for one in votes):
        return [ungraded(one, f"{votes[0].error}: {votes[0].detail}") for one in rubric.judged]
    lost = ", ".join(f"{count} {error}" for error, count in Counter(one.error for one in votes if one.error).items())
    return [
        replace(one, reason=f"{one.reason}: {lost}") if lost and one.score is None else one
        for one in voted_criteria(rubric, [one.text for one in votes])
    ]


@dataclass(frozen=True, kw_only=True)
class JudgeStep(Step):
    """generations -> grades, by each rubric that an answer was written to."""

    rubrics: _RUBRICS
    model: JudgeConfig
    stage: str = "judge"
    table: str = "grades"

    def output(self, shard: str) -> str:
        """Depends on the answers and the judge."""
        templates = RATIONALE_HASH if self.model.mode == "rationale" else TEMPLATES_HASH
        return derive(shard, "judge", self.model.answer_key, templates, GRADE_FORMAT)

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Grades one shard of answers."""
        rows = run.read("generations", [shard], Generation)
        rubrics = rubrics_of(self.rubrics, rubric_of(shard))
        tally = Tally(len(rows) * len(rubrics))
        answers = [(row.unit_id, row.prompt, row.text) for row in rows]
        grades = [grade for rubric in rubrics for grade in judge_answers(engine, rubric, answers, self.model, tally)]
        for grade in grades:
            if grade.score is None:
                tally.reject("ungraded")
        graded = sum(grade.score is not None for grade in grades)
        run.write(self.table, self.output(shard), grades, tally.close(graded))


# ---------------------------------------------------------------- direct


@dataclass(frozen=True, kw_only=True)
class DirectStep(Step):
    """rubric -> directives (+ rejects): given in the rubric, or written by the director."""

    rubrics: _RUBRICS
    paraphrases: int
    held_out: float
    seed: int
    stage: str = "direct"
    table: str = "directives"

    def output(self, shard: str) -> str:
        """Depends on the rubric, its own directives, the director and how many are wanted."""
        rubric = self.rubrics[shard]
        given = [level.directives for level in rubric.levels]
        settings = (self.paraphrases, self.held_out, self.seed, TEMPLATES_HASH)
        return derive(f"{shard}-", rubric.content_hash, given, self.model.answer_key, *settings)

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Makes one rubric's directives."""
        rubric, name = self.rubrics[shard], self.output(shard)
        missing = [level for level in rubric.levels if not level.directives]
        wanted = self.paraphrases * DIRECTOR_OVERSAMPLING
        tally = Tally(wanted * len(missing))
        requests = [
            sampled(
                director_messages(rubric, level),
                self.model.sampling,
                f"{rubric.content_hash}/{level.name}/{number}",
                self.seed,
            )
            for level in missing
            for number in range(wanted)
        ]
        completions = engine.run(requests) if requests else []
        tally.add(completions)
        rows, rejects = self._choose(rubric, [level.name for level in missing for _ in range(wanted)], completions)
        for reject in rejects:
            tally.reject(reject.reason)
        run.write("rejects", f"{self.stage}-{name}", rejects)
        run.write(self.table, name, rows, tally.close(len(rows)))

    def _choose(
        self, rubric: Rubric, levels: list[str], completions: list[Completion]
    ) -> tuple[list[Directive], list[Reject]]:
        texts: dict[str, list[str]] = {level.name: list(level.directives) for level in rubric.levels}
        owner = {text: name for name, given in texts.items() for text in given}
        rejects = []
        for level, one in zip(levels, completions, strict=True):
            text = " ".join(one.text.split())
            error, detail = one.error, one.detail
            if not error and (leak := directive_leak(text, rubric)):
                error, detail = "leak", leak
            elif not error and text in owner:
                error = "repeats another" if owner[text] == level else "same as another level's"
            elif not error and len(texts[level]) >= self.paraphrases:
                error = "not needed"
            if error:
                rejects.append(
                    Reject(
                        stage=self.stage,
                        subject_id=content_id(text),
                        rubric_id=rubric.id,
                        level=level,
                        reason=error,
                        detail=detail or text,
                    )
                )
            else:
                owner[text] = level
                texts[level].append(text)
        for asked in rubric.levels:
            if len(texts[asked.name]) < 2:
                lost = [one for one in rejects if one.level == asked.name]
                why = ", ".join(f"{count} {reason}" for reason, count in Counter(one.reason for one in lost).items())
                example = f"; the director's were: {why}, for example {lost[0].detail!r}" if lost else ""
                raise UserError(
                    f"rubric {rubric.id}, level {asked.name}: {len(texts[asked.name])} usable directive(s), at least 2 "
                    f"are needed (one is held out){example}; give some under the level's `directives:` or use another "
                    "director"
                )
        rows = [row for level in rubric.levels for row in self._split(rubric, level.name, texts[level.name])]
        return rows, rejects

    def _split(self, rubric: Rubric, level: str, texts: list[str]) -> list[Directive]:
        given = set(rubric.level(level).directives)
        num_held_out = min(len(texts) - 1, max(1, round(self.held_out * len(texts))))
        ordered = sorted(texts, key=lambda text: content_id(rubric.id, level, text))
        return [
            Directive(
                directive_id=content_id(rubric.id, level, text),
                rubric_id=rubric.id,
                level=level,
                text=text,
                split="held_out" if at < num_held_out else "train",
                source="rubric" if text in given else self.model.model,
            )
            for at, text in enumerate(ordered)
        ]


# ---------------------------------------------------------------- pair


PAIRING = ModelConfig(model="pairing", num_actors=Range(1, 64))
"""Resources of the steps that call no model."""


def no_engine(model: ModelConfig) -> None:
    """What those steps have for an engine."""


@dataclass(frozen=True, kw_only=True)
class RepeatStep(Step):
    """A rubric's generations -> repeats: those that nearly repeat an earlier answer at the same level."""

    generations: dict[str, list[str]]
    """By shard: all of a rubric, since any may repeat any; about 5 KB of memory each."""
    threshold: float
    model: ModelConfig = PAIRING
    stage: str = "repeats"
    table: str = "repeats"

    def __call__(self, engine: None, run: RunDir, shard: str) -> None:
        """Compares one rubric's answers."""
        seen: dict[str, NearDuplicates] = defaultdict(lambda: NearDuplicates(self.threshold))
        tally, found = Tally(0), []
        for name in self.generations[shard]:
            rows = run.read("generations", [name], Generation)
            tally.counts["rows_in"] += len(rows)
            for one in rows:
                if original := seen[one.level].add(one.unit_id, one.text):
                    found.append(Reject.of(self.stage, one, one.unit_id, "near duplicate", original))
        run.write(self.table, shard, found, tally.close(len(found)))


@dataclass(frozen=True, kw_only=True)
class PairStep(Step):
    """generations + grades + directives -> pairs (+ rejects)."""

    rubrics: _RUBRICS
    groups: dict[str, PairInputs]
    settings: SynthesisConfig
    model: ModelConfig = PAIRING
    stage: str = "pair"
    table: str = "pairs"

    def __call__(self, engine: None, run: RunDir, shard: str) -> None:
        """Pairs the cells of one shard."""
        rubrics, inputs = rubrics_of(self.rubrics, rubric_of(shard)), self.groups[shard]
        rows = run.read("generations", inputs.generations, Generation)
        tally = Tally(len(rows))
        grades = combine_judges(rubrics, run.read("grades", inputs.grades, Grade), self.settings.aggregate)
        directives = run.read("directives", inputs.directives, Directive)
        repeats = {one.subject_id: one.detail for one in run.read("repeats", inputs.repeats, Reject)}
        pairs, rejects = pair_cells(rubrics, rows, grades, directives, self.settings, repeats)
        for reject in rejects:
            tally.reject(reject.reason)
        run.write("rejects", f"{self.stage}-{shard}", rejects)
        run.write(self.table, shard, pairs, tally.close(len(pairs)))


def pairing_steps(plan: Plan, shards: Shards) -> tuple[RepeatStep, PairStep]:
    """The steps that call no model."""
    settings = plan.config.synthesis
    return (
        RepeatStep(generations=shards.repeats, threshold=settings.near_duplicates or 1.0),
        PairStep(rubrics=plan.by_id, groups=shards.groups, settings=settings),
    )


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Shards:
    """Names of a run's complete shards, per table."""

    directives: list[str]
    generations: list[str]
    grades: list[str]
    """Every judge's."""
    repeats: dict[str, list[str]]
    """What each shard of near-duplicates is found in: generations."""
    groups: dict[str, PairInputs]
    """What each shard of pairs is made of."""
    planned: list[str]
    """Of rejects: rows that repeat a prompt; none if there are none."""

    @property
    def pairs(self) -> list[str]:
        """Every shard of pairs."""
        return list(self.groups)

    @property
    def rejects(self) -> list[str]:
        """Every shard of rejects."""
        stages = {"direct": self.directives, "pair": self.pairs}
        found = [f"{stage}-{name}" for stage, names in stages.items() for name in names]
        return [
            *self.planned,
            *found,
            *(f"{'control' if is_control(name) else 'write'}-{name}" for name in self.generations),
        ]


@dataclass(frozen=True)
class PairInputs:
    """Shards that become one shard of pairs."""

    generations: list[str]
    """The writer's, and the policy's own answers to some of the same prompts."""
    grades: list[str]
    directives: list[str]
    repeats: list[str]
    """Where the near-duplicates are, if they are looked for."""


def name_shards(plan: Plan, units: Sequence[str]) -> Shards:
    """Every shard name of the run: a function of the plan, so stages and jobs agree without talking."""
    write, judges, direct = steps_of(plan)
    directives = {rubric.id: direct.output(rubric.id) for rubric in plan.rubrics}
    grades = {name: [judge.output(name) for judge in judges] for name in units}
    chosen = plan.config.synthesis
    rules = (chosen.aggregate, chosen.neutral_directives, chosen.max_length_ratio)
    answers: dict[str, list[str]] = defaultdict(list)
    for name in units if chosen.near_duplicates else ():
        if not is_control(name):
            answers[rubric_of(name)].append(write.output(name))
    repeats = {
        one: derive(f"{one}-", "repeats", REPEATS_FORMAT, chosen.near_duplicates, names)
        for one, names in answers.items()
    }
    beside = {_place(name): name for name in units if is_control(name)}
    groups = {}
    for name in units:
        if not is_control(name):
            names = [name, *([beside[_place(name)]] if _place(name) in beside else [])]
            inputs = PairInputs(
                generations=[write.output(one) for one in names],
                grades=[grade for one in names for grade in grades[one]],
                directives=[directives[one] for one in rubric_of(name).split("+")],
                repeats=[repeats[rubric_of(name)]] if repeats else [],
            )
            groups[derive(name, "pair", inputs.grades, inputs.directives, inputs.repeats, rules)] = inputs
    all_grades = [grade for one in grades.values() for grade in one]
    return Shards(
        directives=list(directives.values()),
        generations=[write.output(one) for one in units],
        grades=all_grades,
        repeats={repeats[one]: names for one, names in answers.items()},
        groups=groups,
        planned=[f"plan-{content_id([one.detail for one in plan.rejects])[:12]}"] if plan.rejects else [],
    )


def rubric_of(unit_shard: str) -> str:
    """The rubric id in a unit shard's name (`<rubric>-<sample>-<chunk>-<hash>`)."""
    return unit_shard.rsplit("-", 3)[0]


def _place(unit_shard: str) -> tuple[str, str]:
    """What a shard of control units has in common with the one whose cells it joins."""
    stem, chunk, _ = unit_shard.rsplit("-", 2)
    return stem, chunk.removeprefix(CONTROL_MARK)


def is_control(unit_shard: str) -> bool:
    """Whether a unit shard's name is one of control units."""
    return unit_shard.rsplit("-", 2)[1].startswith(CONTROL_MARK)


def steps_of(plan: Plan) -> tuple[WriteStep, list[JudgeStep], DirectStep]:
    """The steps that call a model."""
    config = plan.config
    return (
        WriteStep(rubrics=plan.by_id, model=config.writer, seed=config.seed),
        [JudgeStep(rubrics=plan.by_id, model=model) for model in (config.judge, *config.judges)],
        DirectStep(
            rubrics=plan.by_id,
            model=config.director,
            paraphrases=config.synthesis.paraphrases,
            held_out=config.synthesis.held_out_directives,
            seed=config.seed,
        ),
    )


def control_step(plan: Plan) -> WriteStep:
    """The policy's own answers."""
    config = plan.config
    return WriteStep(
        rubrics=plan.by_id,
        model=config.policy,
        seed=config.seed,
        neutral_directives=config.synthesis.neutral_directives,
        stage="control",
    )


def synthesize(plan: Plan, run: RunDir) -> Shards:
    """plan, direct, write, judge, pair; what is complete already is not done again."""
    start = time.monotonic()
    units = plan_units(plan)
    complete = run.names("units")
    for name, planned in units.items():
        if name not in complete:
            rows = list(planned)
            run.write("units", name, rows, {"rows_out": len(rows)})
    num_units = int(ledger_entry(run, "units", units).get("rows_out", 0))
    splits = [len(plan.prompts_of(split)) for split in ("train", "held_out")]
    say(
        f"plan         {len(plan.rubrics)} rubrics, {splits[0]} prompts (+ {splits[1]} held out): "
        f"{num_units} units in {len(units)} shards"
    )
    rows_in, rejected = sum(splits) + len(plan.rejects), reasons(plan.rejects)
    run.add_to_ledger("plan", {"rows_in": rows_in, "rows_out": num_units, "rejected": rejected})
    if plan.rejects:
        say(f"note: {len(plan.rejects)} rows repeat an earlier prompt and are left out ({plan.rejects[0].detail})")
    shards = name_shards(plan, list(units))
    write, judges, direct = steps_of(plan)
    control_shards = [name for name in units if is_control(name)]
    written = [name for name in units if not is_control(name)]
    run_lines(
        run,
        [
            Line([rubric.id for rubric in plan.rubrics], [direct]),
            Line(written, [write, judges[0]]),
            Line(control_shards, [control_step(plan), judges[0]]),
        ],
    )
    run_lines(run, [Line(shards.generations, [judge]) for judge in judges[1:]])
    pair(plan, run, shards)
    conclude(plan, run, shards)
    write_card(plan, run, shards, run_info(plan))
    say(f"             {time.monotonic() - start:.0f} s for synthesis")
    return shards


def conclude(plan: Plan, run: RunDir, shards: Shards) -> None:
    """The ledger's entries and a line on each; UserError with the reasons if there are no pairs."""
    (write, judges, direct), control = steps_of(plan), control_step(plan)
    for name in shards.planned:
        if not run.has("rejects", name):
            run.write("rejects", name, plan.rejects)
    run.prune("rejects", shards.planned, prefix="plan-")
    written = [name for name in shards.generations if not is_control(name)]
    own = [name for name in shards.generations if is_control(name)]
    stages: list[tuple[str, str, Sequence[str], PriceConfig | None]] = [
        ("direct", "directives", shards.directives, direct.model.price),
        ("write", "generations", written, write.model.price),
        *([("control", "generations", own, control.model.price)] if own else []),
        *(
            (
                f"judge-{at}" if at > 1 else "judge",
                "grades",
                [judge.output(name) for name in shards.generations],
                judge.model.price,
            )
            for at, judge in enumerate(judges, start=1)
        ),
        *([("repeats", "repeats", list(shards.repeats), None)] if shards.repeats else []),
        ("pair", "pairs", shards.pairs, None),
    ]
    entries = {stage: ledger_entry(run, table, names, price) for stage, table, names, price in stages}
    costs = [entry["cost"] for entry in entries.values() if "cost" in entry]
    num_pairs = entries["pair"].get("rows_out", 0)
    if costs and num_pairs:
        entries["pair"]["cost_per_pair"] = round(sum(costs) / num_pairs, 8)
    for stage, entry in entries.items():
        run.add_to_ledger(stage, entry)
        say(f"{stage:<12} {_summary(entry)}")
    losing = [Stage("write", "generations", written, "writer", write.model)]
    losing += [Stage("control", "generations", own, "policy", control.model)] if own else []
    _say_losses(run, [*losing, Stage("pair", "pairs", shards.pairs, "writer", write.model)], entries)


def _say_losses(run: RunDir, stages: Sequence[Stage], entries: Mapping[str, dict[str, Any]]) -> None:
    """A note if over half of the answers are in no pair; UserError if all are."""
    total = int(sum(entries[one.name].get("rows_in", 0) for one in stages if one.name != "pair"))
    rejected = [one for stage in stages for one in entries[stage.name]["rejected"].items()]
    lost = sum(count for reason, count in rejected if reason not in OF_PAIRS)
    if entries["pair"].get("rows_out") and lost <= total / 2:
        return
    why = "; ".join(text for one in stages for text in one.losses(run, entries[one.name], total))
    if not entries["pair"].get("rows_out"):
        raise UserError(f"no pair was made: {why or 'there are no answers'}; see {run.path / 'rejects'}")
    say(f"note: {lost} of {total} answers are in no pair: {why}; see {run.path / 'rejects'} and judges.json")


def _summary(entry: dict[str, Any]) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(entry["rejected"].items()))
    text = f"{entry.get('rows_in', 0):.0f} in, {entry.get('rows_out', 0):.0f} out"
    return text + (f" (rejected: {rejected})" if rejected else "") + thoughts_note(entry)


def pair(plan: Plan, run: RunDir, shards: Shards) -> None:
    """generations + grades + directives -> pairs (+ rejects); shards that no longer belong to the run are removed."""
    repeats, paired = pairing_steps(plan, shards)
    run_lines(run, [Line(list(shards.repeats), [repeats])], no_engine)
    run_lines(run, [Line(shards.pairs, [paired])], no_engine)
    run.prune("pairs", shards.pairs)
    run.prune("repeats", shards.repeats)
    run.prune("rejects", [f"pair-{name}" for name in shards.pairs], prefix="pair-")


def combine_judges(rubrics: Sequence[Rubric], grades: Sequence[Grade], how: str) -> dict[tuple[str, str], Grade]:
    """One grade per (unit_id, rubric_id)."""
    by_answer: dict[tuple[str, str], list[Grade]] = defaultdict(list)
    for grade in grades:
        by_answer[grade.unit_id, grade.rubric_id].append(grade)
    by_id = {rubric.id: rubric for rubric in rubrics}
    return {key: aggregate(by_id[key[1]], found, how) for key, found in by_answer.items()}
