"""Synthesis: plan, direct, write, judge, pair. Rubrics and prompts in, twin pairs out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.console import say
from cpt_ray.engine import Completion, Engine, Request, seed_of
from cpt_ray.errors import UserError
from cpt_ray.grading import grade_answer
from cpt_ray.pairing import pair_cells
from cpt_ray.pool import Line, Tally, ledger_entry, run_lines
from cpt_ray.prompting import (
    TEMPLATES_HASH,
    director_messages,
    judge_messages,
    level_labels,
    writer_messages,
)
from cpt_ray.prompts import read_prompts
from cpt_ray.records import Directive, Generation, Grade, Pair, Prompt, Reject, Unit, content_id
from cpt_ray.rubric import Rubric, directive_leak, load_rubrics
from cpt_ray.rundir import RunDir, derive

DIRECTOR_OVERSAMPLING = 4
"""Directives sampled per one wanted: some leak, some repeat each other."""
_RUBRICS = dict[str, Rubric]


@dataclass(frozen=True)
class Plan:
    """What a run consists of; a pure function of the run file and what it names."""

    config: RunConfig
    rubrics: tuple[Rubric, ...]
    prompts: tuple[Prompt, ...]

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
    return Plan(config=config, rubrics=rubrics, prompts=tuple(read_prompts(config.prompts)))


def run_info(plan: Plan) -> dict[str, Any]:
    """What a run was made of, for run.yaml and the report."""
    config = plan.config
    roles = {role: getattr(config, role) for role in ("writer", "director", "judge", "policy")}
    return {
        "name": config.name,
        "seed": config.seed,
        "models": {role: model.model for role, model in roles.items()},
        "rubrics": {rubric.id: rubric.version for rubric in plan.rubrics},
        "hashes": {
            "rubrics": {rubric.id: rubric.content_hash for rubric in plan.rubrics},
            "prompts": content_id(*(prompt.prompt_id for prompt in plan.prompts)),
            "templates": TEMPLATES_HASH,
            "models": {role: model.identity for role, model in roles.items()},
        },
    }


# ---------------------------------------------------------------- plan


def plan_units(plan: Plan) -> dict[str, list[Unit]]:
    """Every unit, by shard name. A shard holds whole cells of one (rubric, sample), so that it can be paired alone."""
    config = plan.config
    prompts = plan.prompts_of("train")
    shards: dict[str, list[Unit]] = {}
    for rubric in plan.rubrics:
        per_shard = max(1, config.synthesis.shard_rows // len(rubric.levels))
        for sample in range(config.synthesis.samples):
            for start in range(0, len(prompts), per_shard):
                units = [
                    _unit(rubric, level_at, prompt, sample, config)
                    for prompt in prompts[start : start + per_shard]
                    for level_at in range(len(rubric.levels))
                ]
                ids = content_id(*(unit.unit_id for unit in units))
                shards[f"{rubric.id}-{sample:03d}-{start // per_shard:05d}-{ids[:12]}"] = units
    return shards


def _unit(rubric: Rubric, level_at: int, prompt: Prompt, sample: int, config: RunConfig) -> Unit:
    level = rubric.levels[level_at]
    key = (rubric.content_hash, level.name, prompt.text, sample, TEMPLATES_HASH, config.writer.answer_key, config.seed)
    return Unit(
        unit_id=content_id(*key),
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        rubric_id=rubric.id,
        level=level.name,
        score=level.score,
        sample=sample,
    )


# ---------------------------------------------------------------- write


@dataclass(frozen=True)
class WriteStep:
    """units -> generations (+ rejects): the writer answers with rubric and target in front of it."""

    rubrics: _RUBRICS
    model: ModelConfig
    seed: int
    stage: str = "write"
    table: str = "generations"

    def output(self, shard: str) -> str:
        """The same name: a unit's id hashes all that its answer depends on."""
        return shard

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Writes one shard of answers."""
        units = run.read("units", [shard], Unit)
        tally = Tally(len(units))
        completions = engine.run([self._request(unit) for unit in units])
        tally.add(completions)
        rows, rejects = [], []
        for unit, one in zip(units, completions, strict=True):
            if one.error:
                tally.reject(one.error)
                rejects.append(_reject(self.stage, unit.unit_id, unit.rubric_id, unit.level, one))
            else:
                rows.append(_generation(unit, one))
        run.write("rejects", f"{self.stage}-{shard}", rejects)
        run.write(self.table, shard, rows, tally.close(len(rows)))

    def _request(self, unit: Unit) -> Request:
        rubric, sampling = self.rubrics[unit.rubric_id], self.model.sampling
        return Request(
            messages=writer_messages(rubric, rubric.level(unit.level), unit.prompt),
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed_of(unit.unit_id, self.seed),
        )


def _generation(unit: Unit, one: Completion) -> Generation:
    return Generation(
        unit_id=unit.unit_id,
        prompt_id=unit.prompt_id,
        prompt=unit.prompt,
        rubric_id=unit.rubric_id,
        level=unit.level,
        sample=unit.sample,
        text=one.text,
        num_tokens=one.num_tokens,
    )


def _reject(stage: str, subject_id: str, rubric_id: str, level: str, one: Completion) -> Reject:
    return Reject(
        stage=stage, subject_id=subject_id, rubric_id=rubric_id, level=level, reason=one.error, detail=one.detail
    )


# ---------------------------------------------------------------- judge


def judge_answers(
    engine: Engine, rubric: Rubric, answers: Sequence[tuple[str, str, str]], judge: str, tally: Tally
) -> list[Grade]:
    """Grades (unit_id, prompt, answer) of one rubric: one request per judged criterion, one token each."""
    labels = tuple(level_labels(rubric))
    requests = [
        Request(messages=judge_messages(rubric, criterion, prompt, text), max_tokens=1, labels=labels)
        for _, prompt, text in answers
        for criterion in rubric.judged
    ]
    completions = engine.run(requests)
    tally.add(completions)
    grades, at = [], iter(completions)
    for unit_id, _, text in answers:
        verdicts = {criterion.name: dict(enumerate(next(at).label_logprobs, start=1)) for criterion in rubric.judged}
        grades.append(grade_answer(rubric, unit_id, text, verdicts, judge))
    return grades


@dataclass(frozen=True)
class JudgeStep:
    """generations -> grades."""

    rubrics: _RUBRICS
    model: ModelConfig
    stage: str = "judge"
    table: str = "grades"

    def output(self, shard: str) -> str:
        """Depends on the answers and the judge."""
        return derive(shard, "judge", self.model.answer_key, TEMPLATES_HASH)

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Grades one shard of answers."""
        rows = run.read("generations", [shard], Generation)
        tally = Tally(len(rows))
        grades: list[Grade] = []
        if rows:
            rubric = self.rubrics[rows[0].rubric_id]
            answers = [(row.unit_id, row.prompt, row.text) for row in rows]
            grades = judge_answers(engine, rubric, answers, self.model.model, tally)
        for grade in grades:
            if grade.score is None:
                tally.reject("ungraded")
        graded = sum(grade.score is not None for grade in grades)
        run.write(self.table, self.output(shard), grades, tally.close(graded))


# ---------------------------------------------------------------- direct


@dataclass(frozen=True)
class DirectStep:
    """rubric -> directives (+ rejects): given in the rubric, or written by the director."""

    rubrics: _RUBRICS
    model: ModelConfig
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
            Request(
                messages=director_messages(rubric, level),
                max_tokens=self.model.sampling.max_tokens,
                temperature=self.model.sampling.temperature,
                top_p=self.model.sampling.top_p,
                seed=seed_of(f"{rubric.content_hash}/{level.name}/{number}", self.seed),
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
                problem = Completion(error=error, detail=detail or text)
                rejects.append(_reject(self.stage, content_id(text), rubric.id, level, problem))
            else:
                owner[text] = level
                texts[level].append(text)
        rows = [row for level in rubric.levels for row in self._split(rubric, level.name, texts[level.name])]
        return rows, rejects

    def _split(self, rubric: Rubric, level: str, texts: list[str]) -> list[Directive]:
        if len(texts) < 2:
            raise UserError(
                f"rubric {rubric.id}, level {level}: {len(texts)} usable directive(s), at least 2 are needed "
                "(one is held out); give some under the level's `directives:` or use another director"
            )
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


# ---------------------------------------------------------------- the stage


@dataclass(frozen=True)
class Shards:
    """Names of a run's complete shards, per table."""

    directives: list[str]
    generations: list[str]
    grades: list[str]
    pairs: list[str]


def name_shards(plan: Plan, units: Sequence[str]) -> Shards:
    """Every shard name of the run: a function of the plan, so stages and jobs agree without talking."""
    write, judge, direct = steps_of(plan)
    generations = [write.output(name) for name in units]
    grades = [judge.output(name) for name in generations]
    directives = {rubric.id: direct.output(rubric.id) for rubric in plan.rubrics}
    by_rubric = {name: directives[rubric_of(name)] for name in grades}
    pairs = [derive(name, "pair", by_rubric[name]) for name in grades]
    return Shards(list(directives.values()), generations, grades, pairs)


def rubric_of(unit_shard: str) -> str:
    """The rubric id in a unit shard's name (`<rubric>-<sample>-<chunk>-<hash>`)."""
    return unit_shard.rsplit("-", 3)[0]


def steps_of(plan: Plan) -> tuple[WriteStep, JudgeStep, DirectStep]:
    """The three steps that call a model."""
    config = plan.config
    return (
        WriteStep(rubrics=plan.by_id, model=config.writer, seed=config.seed),
        JudgeStep(rubrics=plan.by_id, model=config.judge),
        DirectStep(
            rubrics=plan.by_id,
            model=config.director,
            paraphrases=config.synthesis.paraphrases,
            held_out=config.synthesis.held_out_directives,
            seed=config.seed,
        ),
    )


def synthesize(plan: Plan, run: RunDir) -> Shards:
    """plan, direct, write, judge, pair; what is complete already is not done again."""
    start = time.monotonic()
    units = plan_units(plan)
    for name, rows in units.items():
        if not run.has("units", name):
            run.write("units", name, rows)
    num_units = sum(len(rows) for rows in units.values())
    splits = [len(plan.prompts_of(split)) for split in ("train", "held_out")]
    say(
        f"plan         {len(plan.rubrics)} rubrics, {splits[0]} prompts (+ {splits[1]} held out): "
        f"{num_units} units in {len(units)} shards"
    )
    run.add_to_ledger("plan", {"rows_in": sum(splits), "rows_out": num_units})
    shards = name_shards(plan, list(units))
    write, judge, direct = steps_of(plan)
    rubric_ids = [rubric.id for rubric in plan.rubrics]
    run_lines(run, [Line(rubric_ids, [direct]), Line(list(units), [write, judge])])
    pair(plan, run, shards)
    for stage, table, names in (
        ("direct", "directives", shards.directives),
        ("write", "generations", shards.generations),
        ("judge", "grades", shards.grades),
        ("pair", "pairs", shards.pairs),
    ):
        run.add_to_ledger(stage, ledger_entry(run, table, names))
    ledger: dict[str, Any] = run.read_json("ledger.json")
    for stage in ("direct", "write", "judge", "pair"):
        say(f"{stage:<12} {_summary(ledger[stage])}")
    say(f"             {time.monotonic() - start:.0f} s for synthesis")
    return shards


def _summary(entry: dict[str, Any]) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(entry["rejected"].items()))
    text = f"{entry.get('rows_in', 0):.0f} in, {entry.get('rows_out', 0):.0f} out"
    return text + (f" (rejected: {rejected})" if rejected else "")


def pair(plan: Plan, run: RunDir, shards: Shards) -> None:
    """generations + grades + directives -> pairs (+ rejects), shard by shard."""
    directives = run.read("directives", shards.directives, Directive)
    for generations, grades, name in zip(shards.generations, shards.grades, shards.pairs, strict=True):
        if run.has("pairs", name):
            continue
        rubric = plan.by_id[rubric_of(generations)]
        rows = run.read("generations", [generations], Generation)
        verdicts = {grade.unit_id: grade for grade in run.read("grades", [grades], Grade)}
        tally = Tally(len(rows))
        pairs, rejects = pair_cells(rubric, rows, verdicts, [one for one in directives if one.rubric_id == rubric.id])
        for reject in rejects:
            tally.reject(reject.reason)
        run.write("rejects", f"pair-{name}", rejects)
        run.write("pairs", name, pairs, tally.close(len(pairs)))
    run.prune("pairs", shards.pairs)
    run.prune("rejects", [f"pair-{name}" for name in shards.pairs], prefix="pair-")
    if not any(run.counts("pairs", name)["rows_out"] for name in shards.pairs):
        raise UserError(
            f"no pair was made: no prompt has two levels whose grades confirm their targets; "
            f"see {run.path / 'rejects'} for the reasons (is the writer or the judge too weak for these rubrics?)"
        )


def load_pairs(run: RunDir, shards: Shards) -> list[Pair]:
    """All pairs of the run."""
    return run.read("pairs", shards.pairs, Pair)
