"""What a run consists of: its rubrics and prompts, and the names of its shards."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_ray.chat.layout import PROBES, layout_hash
from cpt_ray.config import RunConfig
from cpt_ray.engines.worker import SHARDS_IN_FLIGHT
from cpt_ray.errors import UserError
from cpt_ray.prompts import check_leakage, read_prompts
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.rubrics.rubric import LEAST_ANSWERS, Rubric, check_rubric_names, load_rubric, load_rubrics
from cpt_ray.tables.records import CONTROL, Prompt, Reject, content_id, joined
from cpt_ray.tables.shard import ShardName, rejects_of
from cpt_ray.units import ControlUnits, Units, WriterUnits

Rubrics = dict[str, Rubric]
"""By id."""


@dataclass(frozen=True)
class Plan:
    """What a run consists of; a pure function of the run file and what it names."""

    config: RunConfig
    rubrics: tuple[Rubric, ...]
    prompts: tuple[Prompt, ...]
    rejects: tuple[Reject, ...] = ()
    """Rows that repeat a prompt."""

    @property
    def by_id(self) -> Rubrics:
        """Rubrics by id."""
        return {rubric.id: rubric for rubric in self.rubrics}

    @property
    def has_spread(self) -> bool:
        """Whether the writer's own answers set any rubric's levels."""
        return any(criterion.is_spread for rubric in self.rubrics for criterion in rubric.criteria)

    def prompts_of(self, split: str) -> list[Prompt]:
        """Prompts of one split, in file order."""
        return [prompt for prompt in self.prompts if prompt.split == split]


def make_plan(config: RunConfig) -> Plan:
    """Reads and checks everything the run file names, before anything expensive starts."""
    rubrics = load_rubrics(config.rubric_paths)
    prompts = read_prompts(config.prompts)
    plan = Plan(config=config, rubrics=rubrics, prompts=tuple(prompts), rejects=tuple(prompts.rejects))
    combined = itertools.chain.from_iterable(config.synthesis.combine)
    check_rubric_names("synthesis.combine", combined, plan.by_id, none="[]")
    for name, others in config.synthesis.offset.items():
        check_rubric_names("synthesis.offset", (name, *others), plan.by_id, none="{}")
    check_leakage(plan.prompts)
    read_judge_check(config)  # now: it is used hours later, and must not fail then
    if not config.serve.adapters:  # which have rubrics of their own
        Catalog.of_levels(rubrics).with_saved(config.serve.configurations)
    return plan


def check_first_pass(plan: Plan) -> None:
    """UserError if a synthesis cannot have the answers that set the levels."""
    if not plan.has_spread:
        return
    prompts = plan.prompts_of("train")
    answers = Units(writer_units(plan), prompts).count
    if answers < LEAST_ANSWERS:
        raise UserError(
            f"synthesis.first_pass: found {answers} answers, to {len(prompts)} prompts; a rubric with `values: spread` "
            f"takes {LEAST_ANSWERS}; raise it (and synthesis.samples), or give more prompts"
        )


def read_judge_check(config: RunConfig) -> Rubric | None:
    """The rubric that the judge is tried on, if one is wanted; UserError if nothing in it can tell right from wrong."""
    if config.evaluate.judge_check is None:
        return None
    rubric = load_rubric(path := Path(config.evaluate.judge_check))
    if not (rubric.measured and rubric.judged):
        raise UserError(f"{path}: no measure to compare the judge with; give it a judged and a measured criterion")
    return rubric


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
            # the key keeps its name; these are layouts, not the models' chat templates
            "templates": content_id({probe: layout_hash(probe) for probe in PROBES}),
            "models": {role: model.identity for role, model in roles.items()},
        },
    }


def writer_units(plan: Plan) -> WriterUnits:
    """What makes the run's units."""
    config = plan.config
    return WriterUnits(plan.rubrics, config.synthesis, config.writer.answer_key, config.seed)


def plan_units(plan: Plan) -> dict[str, Units]:
    """The units of the first pass, and the control units, by shard name.

    A shard holds whole prompts, so that it can be planned on and paired alone. The policy's own answers to a shard's
    prompts are a shard of their own, beside it.
    """
    config, settings = plan.config, plan.config.synthesis
    prompts, writer = plan.prompts_of("train"), writer_units(plan)
    rubric_ids = (*(rubric.id for rubric in plan.rubrics), *map(joined, settings.combine))
    controls = ControlUnits(rubric_ids, settings, config.policy.answer_key, config.seed)
    # shard_rows is what an engine has under way, in that many files
    rows = settings.shard_rows // SHARDS_IN_FLIGHT
    per_shard = max(1, rows // max(1, Units(writer, prompts[:1]).count))
    shards: dict[str, Units] = {}
    for number, start in enumerate(range(0, len(prompts), per_shard)):
        chunk = prompts[start : start + per_shard]
        units = Units(writer, chunk)
        shards[ShardName(number=number).keyed(units.key)] = units
        own = Units(controls, chunk)
        if settings.control and next(iter(own), None):
            shards[ShardName(CONTROL, number).keyed(own.key)] = own
    return shards


@dataclass(frozen=True)
class Pass:
    """The shards of one pass over a shard's prompts."""

    generations: str
    """Also the name of its units."""
    grades: str
    """The first judge's."""


@dataclass(frozen=True)
class PairInputs:
    """Shards that become one shard of pairs."""

    generations: list[str]
    """The writer's, of all passes, and the policy's own answers to some of the same prompts."""
    grades: list[str]
    directives: list[str]
    repeats: list[str]
    """Where the near-duplicates are, if they are looked for."""


@dataclass(frozen=True)
class Shards:
    """Names of a run's complete shards, per table."""

    directives: list[str]
    passes: dict[str, list[Pass]]
    """By the shard of the first pass's units: all passes."""
    controls: list[str]
    """Of the policy's own answers."""
    grades: list[str]
    """Every judge's."""
    repeats: dict[str, list[str]]
    """What each shard of near-duplicates is found in: generations."""
    pair_inputs: dict[str, PairInputs]
    """What each shard of pairs is made of."""
    plan_rejects: list[str]
    """The shard of rejects for rows that repeat a prompt, if there are any."""

    @property
    def written(self) -> list[str]:
        """Every shard of the writer's answers."""
        return [each.generations for passes in self.passes.values() for each in passes]

    @property
    def generations(self) -> list[str]:
        """Every shard of answers."""
        return [*self.written, *self.controls]

    @property
    def pairs(self) -> list[str]:
        """Every shard of pairs."""
        return list(self.pair_inputs)

    @property
    def rejects(self) -> list[str]:
        """Every shard of rejects."""
        stages = {"direct": self.directives, "write": self.written, "control": self.controls, "pair": self.pairs}
        return [*self.plan_rejects, *(rejects_of(stage, name) for stage, names in stages.items() for name in names)]
