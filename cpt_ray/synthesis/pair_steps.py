"""The steps that call no model: finding near-duplicates, and pairing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import PAIR_SETTINGS, ModelConfig, Range, SynthesisConfig
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.step import Step
from cpt_ray.judging.judge import Gradings
from cpt_ray.plan import PairInputs, Pass, Rubrics
from cpt_ray.synthesis.duplicates import NearDuplicates
from cpt_ray.synthesis.levels import level_counts
from cpt_ray.synthesis.pairing import pair_answers
from cpt_ray.tables.records import Directive, Generation, Grade, Reject, Unit
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName, rejects_of
from cpt_ray.units import Units

REPEATS_FORMAT = 3
"""Goes up when a row of `repeats` means something else than before."""
PAIR_FORMAT = 4
"""The same for `pairs`."""
PAIRED_PROMPTS = 500
"""Prompts of a shard of pairs, or more."""
PAIRING = ModelConfig(model="pairing", num_actors=Range(1, 64))
"""Resources of the steps that call no model."""


def no_engine(model: ModelConfig) -> None:
    """The `open_engine` of steps that call no model: their engine is None."""


@dataclass(frozen=True, kw_only=True)
class RepeatStep(Step):
    """All generations -> repeats: those that nearly repeat an earlier answer that was asked to be the same."""

    generations: dict[str, list[str]]
    """By shard: all of a run, since any may repeat any; about 5 KB of memory each."""
    threshold: float
    model: ModelConfig = PAIRING
    stage: str = "repeats"
    table: str = "repeats"

    @staticmethod
    def name_of(generations: Sequence[str], threshold: float) -> str:
        """The one output shard's name: depends on all that is compared."""
        return ShardName("answers").made_of("repeats", REPEATS_FORMAT, threshold, generations)

    def __call__(self, engine: None, run: RunDir, shard: str) -> None:
        """Compares a run's answers."""
        seen: dict[tuple[str, str], NearDuplicates] = defaultdict(lambda: NearDuplicates(self.threshold))
        tally, repeats = Tally(0), []
        for name in self.generations[shard]:
            rows = run.read("generations", [name], Generation)
            tally.counts["rows_in"] += len(rows)
            for row in rows:
                if original := seen[row.rubric_id, row.level].add(row.unit_id, row.text):
                    repeats.append(Reject.of(self.stage, row, row.unit_id, "near duplicate", original))
        run.write(self.table, shard, repeats, tally.close(len(repeats)))


@dataclass(frozen=True, kw_only=True)
class PairStep(Step):
    """generations + grades + directives -> pairs (+ rejects)."""

    rubrics: Rubrics
    pair_inputs: dict[str, PairInputs]
    settings: SynthesisConfig
    model: ModelConfig = PAIRING
    stage: str = "pair"
    table: str = "pairs"

    @staticmethod
    def name_of(inputs: PairInputs, settings: SynthesisConfig) -> str:
        """An output shard's name: depends on what is paired, by which rules, and on how the policy is asked."""
        rules = settings.model_dump(include=PAIR_SETTINGS) | {"format": PAIR_FORMAT, "layout": layout_hash("policy")}
        if not settings.offset:  # which pairs of earlier versions do not have
            del rules["offset"]
        made_of = (inputs.generations, inputs.grades, inputs.directives, inputs.repeats, rules)
        return ShardName.parse(inputs.generations[0]).made_of("pair", *made_of)

    def __call__(self, engine: None, run: RunDir, shard: str) -> None:
        """Pairs the answers of one shard."""
        rubrics, inputs = list(self.rubrics.values()), self.pair_inputs[shard]
        rows = run.read("generations", inputs.generations, Generation)
        tally = Tally(len(rows))
        gradings = Gradings.of(rubrics, run.read("grades", inputs.grades, Grade), self.settings.aggregate)
        directives = run.read("directives", inputs.directives, Directive)
        repeats = {row.subject_id: row.detail for row in run.read("repeats", inputs.repeats, Reject)}
        paired = pair_answers(rubrics, rows, gradings, directives, self.settings, repeats)
        for reject in paired.rejects:
            tally.reject(reject.reason)
        units = run.read("units", [name for name in inputs.generations if not ShardName.parse(name).is_control], Unit)
        tally.counts.update(level_counts(paired, units, rows, gradings))
        run.write("rejects", rejects_of(self.stage, shard), paired.rejects)
        run.write(self.table, shard, paired.pairs, tally.close(len(paired.pairs)))


def paired_together(
    units: Mapping[str, Units], passes: Mapping[str, Sequence[Pass]], controls: Sequence[str]
) -> Iterator[list[str]]:
    """Shards of answers whose prompts are paired as one: enough of them that differences can cancel each other out."""
    beside = {ShardName.parse(name).number: name for name in controls}  # of the same prompts
    together, num_prompts = list[str](), 0
    for name, some in passes.items():
        together += [each.generations for each in some]
        number = ShardName.parse(name).number
        together += [beside[number]] if number in beside else []
        num_prompts += len(units[name].prompts)
        if num_prompts >= PAIRED_PROMPTS:
            yield together
            together, num_prompts = [], 0
    if together:
        yield together
