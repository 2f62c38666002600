"""Grading answers by rubrics: by the judge's token probabilities or rationales, and by measures."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

from cpt_ray.chat.conversations import (
    judge_messages,
    level_labels,
    rationale_messages,
    rationale_schema,
)
from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import JudgeConfig, ModelConfig
from cpt_ray.engines.engine import Completion, Engine, Request, sampling_request
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.step import Step
from cpt_ray.grids import answers_of, missing_levels
from cpt_ray.judging.spread import Spread
from cpt_ray.plan import Rubrics
from cpt_ray.rubrics.grading import aggregate, grade_answer, judged_criterion, ungraded, voted_criteria
from cpt_ray.rubrics.rubric import Criterion, Rubric
from cpt_ray.tables.records import CONTROL, CriterionGrade, Generation, Grade, parts_of
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName

Grades = Mapping[tuple[str, str], Grade]
"""By (unit_id, rubric_id)."""
GRADE_FORMAT = 5
"""Goes up when a row of `grades` means something else than before."""


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

    def verdict(criterion: Criterion, completion: Completion) -> CriterionGrade:
        if completion.error:
            return ungraded(criterion, f"{completion.error}: {completion.detail}")
        return judged_criterion(rubric, criterion, dict(enumerate(completion.label_logprobs, start=1)))

    return [[verdict(criterion, next(at)) for criterion in rubric.judged] for _ in answers]


def _rationales(
    engine: Engine, rubric: Rubric, answers: Sequence[tuple[str, str, str]], judge: JudgeConfig, tally: Tally
) -> list[list[CriterionGrade]]:
    """One request per answer: all judged criteria, `votes` times."""
    schema = rationale_schema(rubric)
    completions = engine.run(
        [
            sampling_request(
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
    return [_voted(rubric, cast) for cast in votes] if votes else [[] for _ in answers]


def _voted(rubric: Rubric, votes: Sequence[Completion]) -> list[CriterionGrade]:
    if all(vote.error for vote in votes):
        return [ungraded(criterion, f"{votes[0].error}: {votes[0].detail}") for criterion in rubric.judged]
    lost = ", ".join(f"{count} {error}" for error, count in Counter(vote.error for vote in votes if vote.error).items())
    return [
        replace(grade, reason=f"{grade.reason}: {lost}") if lost and grade.score is None else grade
        for grade in voted_criteria(rubric, [vote.text for vote in votes])
    ]


def first_judge(rubrics: Iterable[Rubric], judge: JudgeConfig, answerer: ModelConfig) -> JudgeConfig:
    """The judge; where everything is measured, the role that wrote the answers, so that no engine is started just to
    measure."""
    if any(rubric.judged for rubric in rubrics):
        return judge
    return JudgeConfig.model_validate(answerer.model_dump())


@dataclass(frozen=True, kw_only=True)
class JudgeStep(Step):
    """generations -> grades: measured rubrics of every answer, judged ones of those that could still be needed.

    A judge is asked about an answer by the rubric that it was written to. Where a prompt then lacks a level of a
    rubric, its other answers are judged by that rubric too.
    """

    rubrics: Rubrics
    model: JudgeConfig
    grids: int = 1
    margin: float = 0.0
    spread: Spread | None = None
    """What sets the levels after the first pass; None if the rubrics' files give them all."""
    earlier_passes: Mapping[str, Sequence[tuple[str, str]]] = field(default_factory=dict)
    """By shard of a later pass: the (generations, grades) of the passes before it, whose levels a prompt has
    already."""
    first_grades: Mapping[str, str] | None = None
    """For every judge but the first, by shard of answers: the first judge's grades. The same answers are graded
    again."""
    stage: str = "judge"
    table: str = "grades"

    def output(self, shard: str) -> str:
        """Depends on the answers, the judge and the rubrics."""
        key, rubrics = self._hashed
        settings = (GRADE_FORMAT, rubrics, self.grids, self.margin)
        return ShardName.parse(shard).made_of("judge", key, layout_hash(self.model.mode), *settings)

    @functools.cached_property
    def _hashed(self) -> tuple[str, list[str]]:
        """The model's key and the rubrics', kept: they take longer than the name of a shard, of which there are
        thousands."""
        rubrics = [self.spread.key] if self.spread else [rubric.grading_hash for rubric in self.rubrics.values()]
        return self.model.answer_key, rubrics

    def wait(self, run: RunDir) -> None:
        """Waits until the levels are known."""
        if self.spread:
            self.spread.wait(run)

    def _rubrics(self, run: RunDir) -> Sequence[Rubric]:
        return self.spread.resolve(run) if self.spread else list(self.rubrics.values())

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Grades one shard of answers."""
        rows = run.read("generations", [shard], Generation)
        tally = Tally(0)
        if self.first_grades is None:
            grades = self._grade_needed(engine, run, shard, rows, tally)
        else:
            known = {
                (grade.unit_id, grade.rubric_id) for grade in run.read("grades", [self.first_grades[shard]], Grade)
            }
            grades = []
            for rubric in self._rubrics(run):
                if not rubric.judged:  # a measure would only agree with itself
                    continue
                own = [row for row in rows if (row.unit_id, rubric.id) in known]
                grades += self._grade(engine, rubric, own, tally)
        for grade in grades:
            if grade.score is None:
                tally.reject("ungraded")
        graded = sum(grade.score is not None for grade in grades)
        run.write(self.table, self.output(shard), grades, tally.close(graded))

    def _grade_needed(
        self, engine: Engine, run: RunDir, shard: str, rows: Sequence[Generation], tally: Tally
    ) -> list[Grade]:
        rubrics = self._rubrics(run)
        before = self.earlier_passes.get(shard, ()) if any(rubric.judged for rubric in rubrics) else ()
        old_rows = run.read("generations", [generations for generations, _ in before], Generation)
        old_grades = run.read("grades", [names for _, names in before], Grade)
        grades: list[Grade] = []
        for rubric in rubrics:
            if not rubric.judged:
                grades += self._grade(engine, rubric, rows, tally)
                continue
            own = [row for row in rows if rubric.id in parts_of(row.rubric_id)]
            asked = self._grade(engine, rubric, own, tally)
            lacking = self._lacking(rubric, [*old_rows, *own], [*old_grades, *asked])
            others = [
                row for row in rows if row.level != CONTROL and row not in own and lacking.get(row.prompt_id, True)
            ]
            grades += asked + self._grade(engine, rubric, others, tally)
        return grades

    def _lacking(self, rubric: Rubric, rows: Sequence[Generation], grades: Sequence[Grade]) -> dict[str, bool]:
        """Whether a prompt lacks a level of the rubric; prompts without a row are not in it."""
        return {
            prompt_id: bool(missing_levels(rubric, answers, self.grids, self.margin))
            for prompt_id, answers in answers_of(rows, grades, [rubric]).items()
        }

    def _grade(self, engine: Engine, rubric: Rubric, rows: Sequence[Generation], tally: Tally) -> list[Grade]:
        tally.counts["rows_in"] += len(rows)
        answers = [(row.unit_id, row.prompt, row.text) for row in rows]
        return judge_answers(engine, rubric, answers, self.model, tally) if rows else []


@dataclass(frozen=True)
class Gradings:
    """The judges' grades of some answers."""

    combined: Grades
    """One grade of all judges: it decides the level."""
    first: Grades
    """The first judge's; empty where it is the only one."""
    others: Grades
    """The mean of all but the first; empty where there is but one."""

    @classmethod
    def of(cls, rubrics: Sequence[Rubric], grades: Iterable[Grade], how: str) -> Self:
        """Of grades in the order of the judges; `how`: see `aggregate`."""
        by_id = {rubric.id: rubric for rubric in rubrics}
        by_answer: dict[tuple[str, str], list[Grade]] = defaultdict(list)
        for grade in grades:
            by_answer[grade.unit_id, grade.rubric_id].append(grade)
        several = {key: some for key, some in by_answer.items() if len(some) > 1}
        return cls(
            combined={key: aggregate(by_id[key[1]], some, how) for key, some in by_answer.items()},
            first={key: some[0] for key, some in several.items()},
            others={key: aggregate(by_id[key[1]], some[1:], "mean") for key, some in several.items()},
        )
