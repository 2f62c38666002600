"""What the writer is asked for, pass by pass, and the policy for controls.

The first pass asks for the same of every prompt. Each later one is planned from what the passes before it left: it asks
only for the levels that a prompt's pool of answers still lacks.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import SynthesisConfig
from cpt_ray.grids import GradedAnswer, LevelNames, missing_levels
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.by_hash import fraction, shuffled
from cpt_ray.tables.records import CONTROL, Prompt, Unit, content_id, joined


@dataclass(frozen=True)
class WriterUnits:
    """Makes the units of the writer, of any pass."""

    rubrics: tuple[Rubric, ...]
    settings: SynthesisConfig
    writer_key: str
    """Changes when the writer's answers would."""
    seed: int

    @property
    def key(self) -> str:
        """Changes when what the first pass asks of a prompt does."""
        if self.settings.ask == "prompt":
            return content_id("prompt", self.layouts[0], self.settings.first_pass, self.writer_key, self.seed)
        combine = self.settings.combine
        hashes, layouts = [rubric.content_hash for rubric in self.rubrics], self.layouts[1 : 3 if combine else 2]
        return content_id(hashes, combine, layouts, self.settings.first_pass, self.writer_key, self.seed)

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
        for names, prompt, sample in itertools.product(self.settings.combine, prompts, samples):
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
    settings: SynthesisConfig
    policy_key: str
    seed: int

    @property
    def key(self) -> str:
        """Changes when any unit could."""
        return content_id(self.rubric_ids, self.settings.control, self.settings.neutral_directives, *self._asked)

    @functools.cached_property
    def _asked(self) -> tuple[str, int, str]:
        return self.policy_key, self.seed, layout_hash("policy")

    def first_pass(self, prompts: Sequence[Prompt]) -> Iterator[Unit]:
        """One unit for a share of all (prompt, rubric)."""
        for rubric_id in self.rubric_ids:
            for prompt in prompts:
                if fraction(content_id("controlled", rubric_id, prompt.prompt_id)) < self.settings.control:
                    yield self._unit(rubric_id, prompt)

    def _unit(self, rubric_id: str, prompt: Prompt) -> Unit:
        directive = control_directive(self.settings.neutral_directives, cell_id_of(rubric_id, prompt.prompt_id, 0))
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


def control_directive(neutral: Sequence[str], cell_id: str) -> str | None:
    """What a control answer of this grid is given as a system message: nothing in half of the grids."""
    # the lowest bit says whether there is a directive, the others which one
    number = int(content_id(cell_id, CONTROL), 16)
    return neutral[number // 2 % len(neutral)] if neutral and number % 2 else None


def cell_id_of(rubric_id: str, prompt_id: str, number: int) -> str:
    """Id of a prompt's grid, by its number among those of the same rubric."""
    return content_id(rubric_id, prompt_id, number)
