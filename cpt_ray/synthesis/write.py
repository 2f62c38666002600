"""Writing: the answers to a shard of units, and the units of later passes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cpt_ray.chat.conversations import ChatMessage, joint_writer_messages, policy_messages, writer_messages
from cpt_ray.engines.engine import CUT_OFF, Completion, Engine, Request, sampling_request
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.step import Step
from cpt_ray.grids import answers_of, levels_by_rubric
from cpt_ray.judging.spread import Spread
from cpt_ray.plan import Pass, Rubrics
from cpt_ray.rubrics.measures import whole_sentences
from cpt_ray.tables.records import CONTROL, Generation, Grade, Reject, Unit, parts_of
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName
from cpt_ray.units import WriterUnits, cell_id_of, control_directive


@dataclass(frozen=True, kw_only=True)
class WriteStep(Step):
    """units -> generations (+ rejects): the writer answers, with rubric and target in front of it or with nothing."""

    rubrics: Rubrics
    seed: int
    neutral_directives: tuple[str, ...] = ()
    stage: str = "write"
    table: str = "generations"

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Writes one shard of answers."""
        self.write(engine, run, shard, run.read("units", [shard], Unit))

    def write(self, engine: Engine, run: RunDir, shard: str, units: Sequence[Unit]) -> None:
        """Answers some units, as one shard."""
        tally = Tally(len(units))
        completions = engine.run([self.request(unit) for unit in units]) if units else []
        tally.add(completions)
        rows, rejects = [], []
        for unit, completion in zip(units, completions, strict=True):
            if generation := _generation(unit, completion):
                rows.append(generation)
                tally.counts["cut_answers"] += generation.is_cut
            else:
                tally.reject(completion.error)
                rejects.append(Reject.of(self.stage, unit, unit.unit_id, completion.error, completion.detail))
        run.write(self.table, shard, rows, tally.close(len(rows)), (self.stage, rejects))

    def request(self, unit: Unit) -> Request:
        """What the writer is asked for a unit."""
        return sampling_request(self._messages(unit), self.model.sampling, unit.unit_id, self.seed)

    def _messages(self, unit: Unit) -> list[ChatMessage]:
        if unit.level == CONTROL:
            cell_id = cell_id_of(unit.rubric_id, unit.prompt_id, unit.sample)
            directive = control_directive(self.neutral_directives, cell_id)
            return policy_messages(directive, unit.prompt)
        if not unit.rubric_id:
            return policy_messages(None, unit.prompt)
        rubrics = [self.rubrics[name] for name in parts_of(unit.rubric_id)]
        targets = [(rubric, rubric.level(level)) for rubric, level in levels_by_rubric(rubrics, parts_of(unit.level))]
        if len(targets) == 1:
            return writer_messages(*targets[0], unit.prompt)
        return joint_writer_messages(targets, unit.prompt)


def _generation(unit: Unit, completion: Completion) -> Generation | None:
    """The answer, a cut one without its unfinished sentence; None if nothing usable is left."""
    is_cut = completion.error == CUT_OFF
    text = whole_sentences(completion.text) if is_cut else completion.text
    if not text or (completion.error and not is_cut):
        return None
    return Generation(
        unit_id=unit.unit_id,
        prompt_id=unit.prompt_id,
        prompt=unit.prompt,
        rubric_id=unit.rubric_id,
        level=unit.level,
        sample=unit.sample,
        text=text,
        num_tokens=completion.num_tokens - completion.thought_tokens,
        is_cut=is_cut,
    )


@dataclass(frozen=True, kw_only=True)
class NextPassStep(WriteStep):
    """The grades of a pass -> the generations of the next: units for what is missing, and the answers to them."""

    writer_units: WriterUnits
    spread: Spread | None
    """Where the rubrics' levels come from."""
    number: int
    """From 2."""
    before: Mapping[str, Sequence[Pass]] = field(default_factory=dict)
    """By the last pass's shard of grades: all passes so far."""

    def output(self, shard: str) -> str:
        """Depends on the passes before it and on what counts as missing."""
        settings = self.writer_units.settings
        return ShardName.parse(shard).made_of("pass", self.number, settings.grids, settings.margin, settings.samples)

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Plans one shard and writes it."""
        name, passes = self.output(shard), self.before[shard]
        if not run.has("units", name):
            rows = list(self._plan(run, passes))
            run.write("units", name, rows, {"rows_out": len(rows)})
        self.write(engine, run, name, run.read("units", [name], Unit))

    def _plan(self, run: RunDir, passes: Sequence[Pass]) -> Iterator[Unit]:
        names = [each.generations for each in passes]
        asked: dict[str, list[Unit]] = defaultdict(list)
        for unit in run.read("units", names, Unit):
            asked[unit.prompt_id].append(unit)
        grades = run.read("grades", [each.grades for each in passes], Grade)
        rubrics = self.spread.resolve(run) if self.spread else list(self.rubrics.values())
        answers = answers_of(run.read("generations", names, Generation), grades, rubrics)
        writer_units = replace(self.writer_units, rubrics=tuple(rubrics))
        for prompt_id, units in asked.items():
            yield from writer_units.later_pass(units, answers.get(prompt_id, []))
