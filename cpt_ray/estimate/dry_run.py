"""What a command will ask for, for a person to read; nothing is started or written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from cpt_ray.capacity import shown_resources
from cpt_ray.config import RunConfig, TuneConfig, load_any_config
from cpt_ray.console import say
from cpt_ray.engines.roles import roles_of
from cpt_ray.estimate.rates import ASSUMED, Rates
from cpt_ray.estimate.stages import Estimate
from cpt_ray.plan import Plan, Shards, check_first_pass, make_plan, plan_units
from cpt_ray.synthesis.stage import finished_synthesis
from cpt_ray.tables.rundir import RunDir


def describe(command: str, plan: Plan, run: RunDir, earlier: str | None, train_key: Callable[[Shards], str]) -> None:
    """Prints what a command will ask for, stage by stage.

    Args:
        earlier: a run directory whose ledger has the rates; this run's own unless given.
        train_key: of the model that would be trained on a run's shards.
    """
    run.check_format()
    if command in ("train", "evaluate"):
        finished_synthesis(plan, run)  # only for its UserError
    rates = Rates.read(plan, RunDir.at(earlier) if earlier else run, is_named=bool(earlier))
    estimate = Estimate(plan, run, rates, train_key)
    stages = estimate.stages(command)
    say(f"{'stage':<14}{'rows':>11}{'at most':>11}{'prompt tokens':>15}{'written':>13}{'at most':>13}{'files':>8}"
        f"{'there':>7}  {'on':<12}{'time':>9}{'cost':>10}")  # fmt: skip
    for stage in stages:
        cost = "-" if stage.cost is None else f"{stage.cost:,.2f}"
        say(f"{stage.name:<14}{stage.rows:>11,}{stage.most:>11,}{stage.prompt_tokens:>15,}{stage.written:>13,}"
            f"{stage.most_written:>13,}{stage.files:>8,}{stage.there:>7,}  {stage.place:<12}"
            f"{_duration(stage.seconds):>9}{cost:>10}")  # fmt: skip
    costs = [stage.cost for stage in stages if stage.cost is not None]
    gpu_hours = sum(stage.seconds / 3600 * stage.engines * stage.model.num_gpus for stage in stages)
    say(
        f"total         {_duration(sum(stage.seconds for stage in stages))}, {gpu_hours:,.1f} GPU hours, cost "
        + (
            f"{sum(costs):,.2f} by the run file's prices, which training has none of"
            if costs
            else "unknown (no role has a price)"
        )
    )
    say(f"units         {estimate.units_line()}")
    say(f"rates         {rates.line()}")
    if not rates.source or rates.assumed:
        say(f"assumed       {ASSUMED}")
        say("              for measured rates, give a run of a few prompts another run_dir, and its folder as --rates")
    say("nothing was started or written (--dry-run)")


def describe_run_file(path: Path, overrides: Sequence[str] = ()) -> None:
    """Checks a run file and prints in a line what it asks for; UserError with a line per problem."""
    config = load_any_config(path, overrides)
    if not isinstance(config, RunConfig):
        say(f"{path}: ok (a training on {config.preferences.source}{_gpus_needed(config)})")
        return
    plan = make_plan(config)
    check_first_pass(plan)
    answers = sum(units.count for units in plan_units(plan).values())
    train, held_out = (len(plan.prompts_of(split)) for split in ("train", "held_out"))
    say(
        f"{path}: ok ({len(plan.rubrics)} rubrics, {train} prompts and {held_out} held out, {answers} answers in the "
        f"first pass; run directory {config.run_dir}{_gpus_needed(config)})"
    )


def _gpus_needed(config: TuneConfig) -> str:
    """As in "; needs 1-4 x {CPU: 1, GPU: 1} (writer, judge), 4 x {GPU: 1} (train)"; nothing where no GPU is."""
    train = config.train
    users: list[tuple[str, object, Mapping[str, float]]] = [("train", train.num_workers, train.worker_resources)]
    if isinstance(config, RunConfig) and config.steer.use_gpu:
        users.append(("steer", config.steer.num_workers, {"GPU": 1}))
    users[:0] = [(name, role.num_actors, role.actor_resources) for name, role in roles_of(config).items()]
    names: dict[str, list[str]] = {}
    for name, count, each in users:
        if each.get("GPU"):
            names.setdefault(f"{count} x {shown_resources(each)}", []).append(name)
    return "".join(f"{', ' if at else '; needs '}{need} ({', '.join(names[need])})" for at, need in enumerate(names))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
