"""Synthesis: direct, write, judge, pair. Rubrics and prompts in, twin pairs out.

Writing goes in passes. A shard of prompts goes through all of them by itself: what its next pass asks for is planned
from the answers and grades that it has. Every shard's name is a function of the plan, so that stages and jobs agree
without communicating; only the levels that the writer's own spread sets are known after the first pass
(`judging/spread.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpt_ray.config import ModelConfig
from cpt_ray.console import say
from cpt_ray.engines.engine import CUT_OFF
from cpt_ray.engines.ledger import ledger_entry, thoughts_note
from cpt_ray.engines.losses import MOST_CUT, NO_LOSS, OF_PAIRS, StageShards, cut_note, reasons
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Line, Runner, Step
from cpt_ray.errors import UserError
from cpt_ray.judging.judge import JudgeStep, first_judge
from cpt_ray.judging.spread import MOST_SHARDS, Spread
from cpt_ray.plan import PairInputs, Pass, Plan, Shards, plan_units, run_info, writer_units
from cpt_ray.synthesis.card import write_card
from cpt_ray.synthesis.direct import DirectStep
from cpt_ray.synthesis.levels import level_lines
from cpt_ray.synthesis.pair_steps import PAIRING, PairStep, RepeatStep, no_engine, paired_together
from cpt_ray.synthesis.write import NextPassStep, WriteStep
from cpt_ray.tables.records import Generation, content_id
from cpt_ray.tables.rundir import JUDGES_FILE, RunDir
from cpt_ray.tables.shard import ShardName, rejects_of
from cpt_ray.units import Units


def name_shards(plan: Plan, units: Mapping[str, Units]) -> Shards:
    """Every shard name of the run, from the plan alone.

    Args:
        plan: as it was made, without the levels that are found later.
    """
    steps, settings = Steps.of(plan, units), plan.config.synthesis
    controls = [name for name in units if ShardName.parse(name).is_control]
    passes = {name: _passes(steps, name) for name in units if name not in controls}
    written = [each.generations for some in passes.values() for each in some]
    grades = {name: [judge.output(name) for judge in steps.judges] for name in (*written, *controls)}
    directives = [steps.direct.output(rubric.id) for rubric in plan.rubrics]
    repeats: dict[str, list[str]] = {}
    if settings.near_duplicates:
        repeats = {RepeatStep.name_of(written, settings.near_duplicates): written}
    pair_inputs = {}
    for some in paired_together(units, passes, controls):
        inputs = PairInputs(some, [grade for name in some for grade in grades[name]], directives, list(repeats))
        pair_inputs[PairStep.name_of(inputs, settings)] = inputs
    return Shards(
        directives=directives,
        passes=passes,
        controls=controls,
        grades=[grade for some in grades.values() for grade in some],
        repeats=repeats,
        pair_inputs=pair_inputs,
        plan_rejects=[ShardName("plan").keyed(content_id([reject.detail for reject in plan.rejects]))]
        if plan.rejects
        else [],
    )


def _passes(steps: Steps, units: str) -> list[Pass]:
    judge = steps.judges[0]
    passes = [Pass(units, judge.output(units))]
    for step in steps.later:
        name = step.output(passes[-1].grades)
        passes.append(Pass(name, judge.output(name)))
    return passes


@dataclass(frozen=True)
class Steps:
    """The steps that call a model."""

    direct: DirectStep
    write: WriteStep
    later: list[NextPassStep]
    control: WriteStep
    judges: list[JudgeStep]

    @classmethod
    def of(cls, plan: Plan, units: Iterable[str]) -> Steps:
        """The steps of a run. `pass_lines` and `extra_judge_lines` add which shards each one reads."""
        config, settings, spread = plan.config, plan.config.synthesis, spread_of(plan, units)
        own: dict[str, Any] = {"rubrics": plan.by_id, "seed": config.seed}
        levels: dict[str, Any] = {"grids": settings.grids, "margin": settings.margin, "spread": spread}
        others = config.judges if any(rubric.judged for rubric in plan.rubrics) else ()
        judges = (first_judge(plan.rubrics, config.judge, config.writer), *others)
        return cls(
            direct=DirectStep(
                **own,
                model=config.director,
                paraphrases=settings.paraphrases,
                held_out=settings.held_out_directives,
            ),
            write=WriteStep(**own, model=config.writer),
            later=[
                NextPassStep(**own, model=config.writer, writer_units=writer_units(plan), spread=spread, number=number)
                for number in range(2, settings.num_passes + 1)
            ],
            control=WriteStep(
                **own, model=config.policy, neutral_directives=settings.neutral_directives, stage="control"
            ),
            judges=[JudgeStep(rubrics=plan.by_id, model=model, **levels) for model in judges],
        )

    def pass_lines(self, shards: Shards) -> list[Line]:
        """Writing, and after each pass the first judge, whose grades the next pass is planned from.

        Where the first pass sets the levels, it is a line of its own: a judge waits for all of it, and must not hold an
        engine that should be writing. Otherwise writing and judging are one line, so that no shard is judged before it
        is written.
        """
        steps: list[Step] = [self.judges[0]]
        for at, step in enumerate(self.later, start=1):
            before = {passes[at - 1].grades: passes[:at] for passes in shards.passes.values()}
            earlier = {
                passes[at].generations: [(each.generations, each.grades) for each in passes[:at]]
                for passes in shards.passes.values()
            }
            steps += [replace(step, before=before), replace(self.judges[0], earlier_passes=earlier)]
        names = list(shards.passes)
        if self.judges[0].spread:
            return [Line(names, [self.write]), Line(names, steps)]
        return [Line(names, [self.write, *steps])]

    def stages(self, shards: Shards) -> list[StageShards]:
        """Every stage of a synthesis that makes shards, in order, as the ledger names it."""
        stages = [
            StageShards("direct", "directives", shards.directives, "director", self.direct.model),
            StageShards("write", "generations", shards.written, "writer", self.write.model),
            StageShards("control", "generations", shards.controls, "policy", self.control.model),
        ]
        for at, judge in enumerate(self.judges):
            names = [judge.output(name) for name in shards.generations]
            name, role = (f"judge-{at + 1}", f"judges[{at - 1}]") if at else ("judge", "judge")
            stages.append(StageShards(name, "grades", names, role, judge.model))
        stages.append(StageShards("repeats", "repeats", list(shards.repeats), "writer", PAIRING))
        stages.append(StageShards("pair", "pairs", shards.pairs, "writer", PAIRING))
        return [stage for stage in stages if stage.shards]

    def extra_judge_lines(self, shards: Shards) -> list[Line]:
        """Grading by every judge but the first, of the answers that the first one graded."""
        first_grades = {name: self.judges[0].output(name) for name in shards.generations}
        return [Line(shards.generations, [replace(judge, first_grades=first_grades)]) for judge in self.judges[1:]]


def spread_of(plan: Plan, units: Iterable[str]) -> Spread | None:
    """Where the levels come from, if the writer's own spread sets any."""
    if not plan.has_spread:
        return None
    return Spread(plan.rubrics, tuple(name for name in units if not ShardName.parse(name).is_control))


def with_levels(plan: Plan, run: RunDir, units: Iterable[str]) -> Plan:
    """The plan with the levels that the first pass sets; UserError if that pass is not complete."""
    spread = spread_of(plan, units)
    if spread and not spread.is_ready(run):
        raise not_complete(run)
    return replace(plan, rubrics=spread.resolve(run)) if spread else plan


def not_complete(run: RunDir) -> UserError:
    """The error of what needs the tables of a synthesis."""
    return UserError(f"{run.path}: synthesis is not complete for this run file; run `cpt synthesize` first")


def finished_synthesis(plan: Plan, run: RunDir) -> tuple[Plan, Shards]:
    """The plan with its levels, and the names of the synthesis tables; UserError if they are not complete."""
    units = plan_units(plan)
    shards = name_shards(plan, units)
    if not run.names("pairs") >= set(shards.pairs):
        raise not_complete(run)
    return with_levels(plan, run, units), shards


def synthesize(plan: Plan, run: RunDir, runner: Runner = run_lines) -> None:
    """direct, write, judge, pair; what is complete already is not done again."""
    start = time.monotonic()
    units = plan_units(plan)
    _write_units(plan, run, units)
    shards = name_shards(plan, units)
    steps = Steps.of(plan, units)
    runner(
        run,
        [
            Line([rubric.id for rubric in plan.rubrics], [steps.direct]),
            *steps.pass_lines(shards),
            Line(shards.controls, [steps.control, steps.judges[0]]),
        ],
    )
    runner(run, steps.extra_judge_lines(shards))
    # also where no rubric needs it: the evaluation scales its dials by it
    Spread(plan.rubrics, tuple(shards.passes)).read_or_make(run)
    plan = with_levels(plan, run, units)
    _say_spread(plan)
    pair(plan, run, shards, runner)
    conclude(plan, run, shards)
    write_card(plan, run, shards, run_info(plan))
    say(f"             {time.monotonic() - start:.0f} s for synthesis")


def _write_units(plan: Plan, run: RunDir, units: Mapping[str, Units]) -> None:
    complete = run.names("units")
    for name, planned in units.items():
        if name not in complete:
            rows = list(planned)
            run.write("units", name, rows, {"rows_out": len(rows)})
    splits = [len(plan.prompts_of(split)) for split in ("train", "held_out")]
    num_units = sum(planned.count for planned in units.values())
    say(
        f"plan         {len(plan.rubrics)} rubrics, {splits[0]} prompts (+ {splits[1]} held out): "
        f"{num_units} answers in the first pass"
    )
    rows_in = sum(splits) + len(plan.rejects)
    run.add_to_ledger("plan", {"rows_in": rows_in, "rows_out": num_units, "rejected": reasons(plan.rejects)})
    if plan.rejects:
        say(f"note: {len(plan.rejects)} rows repeat an earlier prompt and are left out ({plan.rejects[0].detail})")


def _say_spread(plan: Plan) -> None:
    for rubric in plan.rubrics:
        for measure in (criterion.measure for criterion in rubric.measured):
            if measure and measure.points:
                bounds = ", ".join(f"{value:.3g}" for value, _ in measure.points[1:-1])
                say(f"levels       {rubric.id}: the writer's own answers, by {measure.name}, are divided at {bounds}")


def conclude(plan: Plan, run: RunDir, shards: Shards) -> None:
    """The ledger's entries and a line on each; UserError with the reasons if there are no pairs."""
    steps = Steps.of(plan, shards.passes)
    for name in shards.plan_rejects:
        if not run.has("rejects", name):
            run.write("rejects", name, plan.rejects)
    run.prune("rejects", shards.plan_rejects, prefix="plan-")
    stages = steps.stages(shards)
    _show_rejects(run, [stage for stage in stages if stage.table in ("directives", "generations")])
    entries = {stage.name: ledger_entry(run, stage.table, stage.shards, stage.model.price) for stage in stages}
    costs = [entry["cost"] for entry in entries.values() if "cost" in entry]
    num_pairs = entries["pair"].get("rows_out", 0)
    if costs and num_pairs:
        entries["pair"]["cost_per_pair"] = round(sum(costs) / num_pairs, 8)
    for stage, entry in entries.items():
        run.add_to_ledger(stage, entry)
        say(f"{stage:<12} {_summary(entry)}")
    _say_losses(run, [stage for stage in stages if stage.name in ("write", "control", "pair")], entries)
    _say_cut(run, shards, entries["write"], steps.write.model)
    for line in level_lines(plan, run, shards, entries["write"].get("generated_tokens", 0)):
        say(line)


def _show_rejects(run: RunDir, stages: Sequence[StageShards]) -> None:
    """Writes the shards of rejects that a killed process owes."""
    complete = run.names("rejects")
    for stage in stages:
        for name in stage.shards:
            if rejects_of(stage.name, name) not in complete:
                run.show_rejects(stage.name, stage.table, name)


def _say_cut(run: RunDir, shards: Shards, entry: Mapping[str, Any], writer: ModelConfig) -> None:
    """A note if many answers ran into max_tokens."""
    num_cut = int(entry.get("cut_answers", 0)) + entry["rejected"].get(CUT_OFF, 0)
    if num_cut > MOST_CUT * entry.get("rows_in", 0):
        some = shards.written[:: math.ceil(len(shards.written) / MOST_SHARDS)]
        rows = run.read("generations", some, Generation)
        finished = [row.num_tokens for row in rows if not row.is_cut]
        num_cut = round(num_cut * len(some) / len(shards.written))
        if note := cut_note("writer", finished, num_cut, writer.sampling.max_tokens):
            say(f"note: write: {note}")


def _say_losses(run: RunDir, stages: Sequence[StageShards], entries: Mapping[str, dict[str, Any]]) -> None:
    """A note if over half of the answers could not be used; UserError if there is no pair."""
    total = int(sum(entries[stage.name].get("rows_in", 0) for stage in stages if stage.name != "pair"))
    rejected = [entries[stage.name]["rejected"] for stage in stages]
    lost = sum(count for counts in rejected for reason, count in counts.items() if reason not in (*OF_PAIRS, *NO_LOSS))
    if entries["pair"].get("rows_out") and lost <= total / 2:
        return
    why = "; ".join(text for stage in stages for text in stage.losses(run, entries[stage.name], total))
    if not entries["pair"].get("rows_out"):
        raise UserError(f"no pair was made: {why or 'there are no answers'}; see {run.table('rejects')}")
    say(f"note: {lost} of {total} answers cannot be used: {why}; see {run.table('rejects')} and {JUDGES_FILE}")


def _summary(entry: dict[str, Any]) -> str:
    rejected = ", ".join(f"{count} {reason}" for reason, count in sorted(entry["rejected"].items()))
    text = f"{entry.get('rows_in', 0):.0f} in, {entry.get('rows_out', 0):.0f} out"
    return text + (f" (rejected: {rejected})" if rejected else "") + thoughts_note(entry)


def pair(plan: Plan, run: RunDir, shards: Shards, runner: Runner) -> None:
    """generations + grades + directives -> pairs (+ rejects); shards that no longer belong to the run are removed."""
    settings = plan.config.synthesis
    repeats = RepeatStep(generations=shards.repeats, threshold=settings.near_duplicates or 1.0)
    runner(run, [Line(list(shards.repeats), [repeats])], no_engine)
    runner(
        run,
        [Line(shards.pairs, [PairStep(rubrics=plan.by_id, pair_inputs=shards.pair_inputs, settings=settings)])],
        no_engine,
    )
    run.prune("pairs", shards.pairs)
    run.prune("repeats", shards.repeats)
    run.prune("rejects", [rejects_of("pair", name) for name in shards.pairs], prefix="pair-")
