"""What a run consists of: its rubrics and prompts, and what the writer is asked for, pass by pass.

The first pass asks for the same of every prompt. Each later one is planned from what the passes before it left: it asks
only for the levels that a prompt's pool of answers still lacks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_ray.chat.layout import PROBES, layout_hash
from cpt_ray.config import RunConfig, SynthesisConfig
from cpt_ray.engines.pool import SHARDS_IN_FLIGHT
from cpt_ray.errors import UserError
from cpt_ray.grids import GradedAnswer, LevelNames, missing_levels
from cpt_ray.prompts import check_leakage, read_prompts
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.rubrics.rubric import Rubric, check_rubric_names, load_rubric, load_rubrics
from cpt_ray.tables.by_hash import fraction, shuffled
from cpt_ray.tables.records import CONTROL, Prompt, Reject, Unit, content_id, joined
from cpt_ray.tables.shard import ShardName, rejects_of

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

    def prompts_of(self, split: str) -> list[Prompt]:
        """Prompts of one split, in file order."""
        return [prompt for prompt in self.prompts if prompt.split == split]


def make_plan(config: RunConfig) -> Plan:
    """Reads and checks everything the run file names, before anything expensive starts."""
    rubrics = load_rubrics(config.rubric_paths)
    prompts = read_prompts(config.prompts)
    plan = Plan(config=config, rubrics=rubrics, prompts=tuple(prompts), rejects=tuple(prompts.rejects))
    check_rubric_names("synthesis.combine", itertools.chain.from_iterable(config.synthesis.combine), plan.by_id)
    check_leakage(plan.prompts)
    read_judge_check(config)  # now: it is used hours later, and must not fail then
    if not config.serve.adapters:  # which have rubrics of their own
        Catalog.of_levels(rubrics).with_saved(config.serve.configurations)
    return plan


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


# ---------------------------------------------------------------- units


@dataclass(frozen=True)
class WriterUnits:
    """Makes the units of the writer, of any pass."""

    rubrics: tuple[Rubric, ...]
    combine: tuple[tuple[str, str], ...]
    settings: SynthesisConfig
    writer_key: str
    """Changes when the writer's answers would."""
    seed: int

    @property
    def key(self) -> str:
        """Changes when what the first pass asks of a prompt does."""
        if self.settings.ask == "prompt":
            return content_id("prompt", self.layouts[0], self.settings.first_pass, self.writer_key, self.seed)
        hashes, layouts = [rubric.content_hash for rubric in self.rubrics], self.layouts[1 : 3 if self.combine else 2]
        return content_id(hashes, self.combine, layouts, self.settings.first_pass, self.writer_key, self.seed)

    @functools.cached_property
    def layouts(self) -> tuple[str, ...]:
        """Layout hashes of a writer's request with no rubric, with one, with several."""
        return tuple(map(layout_hash, ("policy", "write", "write jointly")))

    def first_pass(self, prompts: Sequence[Prompt]) -> Iterator[Unit]:
        """Units of the first pass. What has the same rubric in front of it comes together, for the prefix cache."""
        samples = range(self.settings.first_pass)
        if self.settings.ask == "prompt":
            for prompt in prompts:
                yield from (self.unit(prompt.prompt_id, prompt.text, sample=sample) for sample in samples)
            return
        for rubric, prompt in itertools.product(self.rubrics, prompts):
            for level, sample in itertools.product(rubric.levels, samples):
                yield self.unit(prompt.prompt_id, prompt.text, (rubric,), (level.name,), sample)
        by_id = {rubric.id: rubric for rubric in self.rubrics}
        for names, prompt, sample in itertools.product(self.combine, prompts, samples):
            rubrics = tuple(by_id[name] for name in names)
            for joint in _joint(rubrics, prompt.prompt_id, sample):
                yield self.unit(prompt.prompt_id, prompt.text, rubrics, joint, sample)

    def later_pass(self, asked: Sequence[Unit], answers: Sequence[GradedAnswer]) -> list[Unit]:
        """Units of a later pass for one prompt: what its answers lack, as often as `synthesis.samples` still allows.

        Args:
            asked: all units of this prompt so far.
        """
        settings, prompt = self.settings, (asked[0].prompt_id, asked[0].prompt)
        lacking = {rubric: missing_levels(rubric, answers, settings.grids, settings.margin) for rubric in self.rubrics}
        if settings.ask == "prompt":
            most = max(sum(levels.values()) for levels in lacking.values())
            samples = range(len(asked), min(settings.samples, len(asked) + most))
            return [self.unit(*prompt, sample=sample) for sample in samples]
        units = []
        for rubric, levels in lacking.items():
            for level, count in levels.items():
                before = sum((unit.rubric_id, unit.level) == (rubric.id, level) for unit in asked)
                samples = range(before, min(settings.samples, before + count))
                units += [self.unit(*prompt, (rubric,), (level,), sample) for sample in samples]
        return units

    def unit(
        self, prompt_id: str, prompt: str, rubrics: tuple[Rubric, ...] = (), level: LevelNames = (), sample: int = 0
    ) -> Unit:
        """One answer to be written, under these rubrics' levels or, without any, under nothing."""
        hashes = [rubric.content_hash for rubric in rubrics]
        layout = self.layouts[min(len(rubrics), 2)]
        return Unit(
            unit_id=content_id(hashes, joined(level), prompt, sample, layout, self.writer_key, self.seed),
            prompt_id=prompt_id,
            prompt=prompt,
            rubric_id=joined(rubric.id for rubric in rubrics),
            level=joined(level),
            score=rubrics[0].level(level[0]).score if len(rubrics) == 1 else None,
            sample=sample,
        )


def _joint(rubrics: Sequence[Rubric], prompt_id: str, sample: int) -> list[LevelNames]:
    """As many levels as the shorter scale has, no level of either rubric twice."""

    def order(rubric: Rubric) -> list[str]:
        names = [level.name for level in rubric.levels]
        return shuffled(names, lambda name: (prompt_id, sample, rubric.id, name))

    return list(zip(*map(order, rubrics), strict=False))


@dataclass(frozen=True)
class ControlUnits:
    """Makes the units of control answers."""

    rubric_ids: tuple[str, ...]
    share: float
    neutral_directives: tuple[str, ...]
    policy_key: str
    seed: int

    @property
    def key(self) -> str:
        """Changes when any unit could."""
        return content_id(self.rubric_ids, self.share, self.neutral_directives, *self._asked)

    @functools.cached_property
    def _asked(self) -> tuple[str, int, str]:
        return self.policy_key, self.seed, layout_hash("policy")

    def first_pass(self, prompts: Sequence[Prompt]) -> Iterator[Unit]:
        """One unit for a share of all (prompt, rubric)."""
        for rubric_id in self.rubric_ids:
            for prompt in prompts:
                if fraction(content_id("controlled", rubric_id, prompt.prompt_id)) < self.share:
                    yield self._unit(rubric_id, prompt)

    def _unit(self, rubric_id: str, prompt: Prompt) -> Unit:
        directive = control_directive(self.neutral_directives, cell_id_of(rubric_id, prompt.prompt_id, 0))
        return Unit(
            unit_id=content_id(CONTROL, rubric_id, directive, prompt.text, *self._asked),
            prompt_id=prompt.prompt_id,
            prompt=prompt.text,
            rubric_id=rubric_id,
            level=CONTROL,
            score=None,
            sample=0,
        )


@dataclass(frozen=True)
class Units(Iterable[Unit]):
    """The first units of one shard, made when they are looked at: a plan of millions costs no memory."""

    source: WriterUnits | ControlUnits
    prompts: Sequence[Prompt]

    @property
    def key(self) -> str:
        """Changes when any unit in it does."""
        return content_id(self.source.key, [prompt.prompt_id for prompt in self.prompts])

    def __iter__(self) -> Iterator[Unit]:
        return self.source.first_pass(self.prompts)

    @property
    def count(self) -> int:
        """How many they are. The writer's are as many for every prompt, so that one is enough to count them."""
        if isinstance(self.source, WriterUnits):
            return len(self.prompts) * sum(1 for _ in self.source.first_pass(self.prompts[:1]))
        return sum(1 for _ in self)


def writer_units(plan: Plan) -> WriterUnits:
    """What makes the run's units."""
    config = plan.config
    return WriterUnits(plan.rubrics, config.synthesis.combine, config.synthesis, config.writer.answer_key, config.seed)


def plan_units(plan: Plan) -> dict[str, Units]:
    """The units of the first pass, and the control units, by shard name.

    A shard holds whole prompts, so that it can be planned on and paired alone. The policy's own answers to a shard's
    prompts are a shard of their own, beside it.
    """
    config, settings = plan.config, plan.config.synthesis
    prompts, writer = plan.prompts_of("train"), writer_units(plan)
    rubric_ids = (*(rubric.id for rubric in plan.rubrics), *map(joined, settings.combine))
    controls = ControlUnits(
        rubric_ids, settings.control, settings.neutral_directives, config.policy.answer_key, config.seed
    )
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


def control_directive(neutral: Sequence[str], cell_id: str) -> str | None:
    """What a control answer of this grid is given as a system message: nothing in half of the grids."""
    # the lowest bit says whether there is a directive, the others which one
    number = int(content_id(cell_id, CONTROL), 16)
    return neutral[number // 2 % len(neutral)] if neutral and number % 2 else None


def cell_id_of(rubric_id: str, prompt_id: str, number: int) -> str:
    """Id of a prompt's grid, by its number among those of the same rubric."""
    return content_id(rubric_id, prompt_id, number)


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
