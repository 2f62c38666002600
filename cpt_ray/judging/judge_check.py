"""How good the judge is: it grades some answers by a rubric that is not trained on, and is compared with a measure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from cpt_ray.engines.engine import Engine
from cpt_ray.engines.ledger import Tally, ledger_entry
from cpt_ray.engines.step import Line, Runner
from cpt_ray.judging.agreement import agreement
from cpt_ray.judging.judge import JudgeStep
from cpt_ray.judging.spread import survey, surveyed_shards, with_points
from cpt_ray.plan import Plan, Shards, read_judge_check
from cpt_ray.tables.records import Generation, Grade
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName


@dataclass(frozen=True, kw_only=True)
class CheckStep(JudgeStep):
    """generations -> grades of some of them."""

    count: int
    stage: str = "check-judge"
    table: str = "judge_checks"

    def output(self, shard: str) -> str:
        """Depends on how many as well."""
        return ShardName.parse(super().output(shard)).made_of(self.stage, self.count)

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Grades some of one shard."""
        rows = run.read("generations", [shard], Generation)
        # evenly spread, because neighbours answer the same prompt
        rows = rows[:: max(1, len(rows) // self.count)][: self.count]
        tally = Tally(0)
        grades = [grade for rubric in self.rubrics.values() for grade in self._grade(engine, rubric, rows, tally)]
        for grade in grades:
            if grade.judged is None:
                tally.reject("ungraded")
        run.write(
            self.table, self.output(shard), grades, tally.close(sum(grade.judged is not None for grade in grades))
        )


def check_judge(plan: Plan, run: RunDir, shards: Shards, runner: Runner) -> dict[str, Any] | None:
    """`agreement` of judge and measure, with the rubric's title and the judge's name; None if it is not asked for."""
    rubric = read_judge_check(plan.config)
    if rubric is None:
        return None
    first = surveyed_shards([passes[0].generations for passes in shards.passes.values()])
    rubric = with_points(rubric, survey([rubric], run.read("generations", first, Generation))[rubric.id])
    step = CheckStep(rubrics={rubric.id: rubric}, model=plan.config.judge, count=num_checked(plan, len(first)))
    runner(run, [Line(list(first), [step])])
    names = [step.output(name) for name in first]
    run.add_to_ledger(step.stage, ledger_entry(run, step.table, names, step.model.price))
    grades = run.read(step.table, names, Grade)
    scores = [(grade.judged, grade.measured) for grade in grades]
    both = [(judged, measured) for judged, measured in scores if judged is not None and measured is not None]
    named = {"rubric": rubric.title, "judge": plan.config.judge.model, "asked": len(grades)}
    return named | agreement(rubric, both)


def num_checked(plan: Plan, num_shards: int) -> int:
    """Answers of each shard that is looked at."""
    return math.ceil(plan.config.evaluate.judge_check_answers / num_shards)
