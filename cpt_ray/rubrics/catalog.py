"""What a client may ask for: {rubric id: level name or score 0-100}, and the directive that stands for it.

A score between two levels gets the directive of the nearer one: the model was tuned on the levels' directives and
on nothing in between. `Catalog` is saved beside the model as catalog.json, so that serving needs neither rubrics nor
tables. The same JSON is what `GET /v1/configurations` returns.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cpt_ray.errors import UserError, did_you_mean, kind_of
from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Directive
from cpt_ray.tables.rundir import CATALOG_FILE

EXAMPLE_PROMPT = "What is a walk in the rain like?"
"""What the examples of a request ask, whatever the run's own prompts are."""
MAX_SHOWN = 60
"""Characters of a client's own text that an error repeats; also bounds the search for the nearest name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogLevel:
    """One level of a rubric and the directive that stands for it."""

    name: str
    score: float
    """Anchor on 0-100."""
    directive: str
    directive_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogRubric:
    """What can be asked for of one rubric."""

    id: str
    title: str
    version: int
    objective: str
    levels: tuple[CatalogLevel, ...]
    """Lowest score first."""

    def find(self, target: Any) -> CatalogLevel:
        """The level that `target` names, or whose anchor is nearest to it if it is a score (a tie goes up)."""
        where = f"configuration.{self.id}"
        if isinstance(target, str):
            for level in self.levels:
                if level.name == target:
                    return level
            names = [level.name for level in self.levels]
            shown = target[:MAX_SHOWN]
            raise UserError(f"{where}: no level {shown!r}{did_you_mean(shown, names)}")
        if isinstance(target, bool) or not isinstance(target, int | float):
            raise UserError(f"{where}: found {kind_of(target)}; give a level's name or a score from 0 to 100")
        if not 0 <= target <= 100:
            raise UserError(f"{where}: {target!r:.{MAX_SHOWN}} is not a score from 0 to 100")
        return nearest_level(self.levels, target)


_RUBRICS = TypeAdapter(tuple[CatalogRubric, ...], config=ConfigDict(extra="forbid"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfiguration:
    """The directive of a configuration, and the levels that it stands for."""

    directive: str | None
    """The system prompt, or None if nothing was asked for."""
    applied: dict[str, str]
    """Rubric id to level name, in rubric order."""


@dataclass(frozen=True, slots=True)
class Catalog:
    """Every configuration of one model."""

    rubrics: tuple[CatalogRubric, ...]
    saved: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    """Named configurations, from the run file's `serve.configurations`."""

    @classmethod
    def build(cls, rubrics: Sequence[Rubric], directives: Sequence[Directive]) -> Self:
        """From a run's rubrics and directives; UserError if a level has no directive the model was trained on."""
        texts: dict[tuple[str, str], Directive] = {}
        for directive in sorted(directives, key=lambda directive: directive.directive_id):
            if directive.split == "train":
                texts.setdefault((directive.rubric_id, directive.level), directive)
        return cls(tuple(_entry(rubric, texts) for rubric in rubrics))

    @classmethod
    def of_levels(cls, rubrics: Sequence[Rubric]) -> Self:
        """Without directives: what configurations can be checked against before there are any."""
        empty = {"directive_id": "", "text": "", "split": "train", "source": ""}
        levels = [(rubric.id, level.name) for rubric in rubrics for level in rubric.levels]
        return cls.build(rubrics, [Directive(rubric_id=rubric, level=level, **empty) for rubric, level in levels])

    def resolve(self, configuration: Any) -> ResolvedConfiguration:
        """The directive for a client's configuration or a saved one's name; UserError, in one line, for neither."""
        if isinstance(configuration, str):
            if configuration not in self.saved:
                shown = configuration[:MAX_SHOWN]
                raise UserError(f"configuration: no saved configuration {shown!r}{did_you_mean(shown, self.saved)}")
            configuration = self.saved[configuration]
        if not isinstance(configuration, Mapping):
            kind = kind_of(configuration)
            raise UserError(f'configuration: found {kind}; give an object like {{"rubric": "level"}}')
        known = {rubric.id: rubric for rubric in self.rubrics}
        if len(configuration) > len(known):
            raise UserError(f"configuration: {len(configuration)} entries, but this model has {len(known)} rubrics")
        for name in configuration:
            if name not in known:
                shown = str(name)[:MAX_SHOWN]
                raise UserError(f"configuration: no rubric {shown!r}{did_you_mean(shown, known)}")
        levels = {name: rubric.find(configuration[name]) for name, rubric in known.items() if name in configuration}
        return ResolvedConfiguration(
            directive=compose_directives([level.directive for level in levels.values()]),
            applied={rubric_id: level.name for rubric_id, level in levels.items()},
        )

    def resolve_text(self, text: str) -> ResolvedConfiguration:
        """The directive for `ornament=high,warmth=30`, or for a saved configuration's name (no "=")."""
        if "=" not in text:
            return self.resolve(text)
        configuration: dict[str, Any] = {}
        for part in text.split(","):
            name, equals, target = (text.strip() for text in part.partition("="))
            if not equals or name in configuration:
                why = "is asked for twice" if equals else "is not rubric=level"
                raise UserError(f"configuration: {(name or part)[:MAX_SHOWN]!r} {why}")
            configuration[name] = float(target) if re.fullmatch(r"-?\d{1,9}(\.\d{1,9})?", target, re.ASCII) else target
        return self.resolve(configuration)

    def with_saved(self, saved: Mapping[str, Mapping[str, Any]]) -> Self:
        """This catalog with named configurations; UserError if one cannot be resolved."""
        for name, configuration in saved.items():
            try:
                self.resolve(configuration)
            except UserError as error:
                raise UserError(f"serve.configurations.{name}: {error}") from None
        return dataclasses.replace(self, saved=dict(saved))

    def to_json(self) -> dict[str, Any]:
        """Plain data, in the shape of an OpenAI list."""
        return {
            "object": "list",
            "data": [dataclasses.asdict(rubric) for rubric in self.rubrics],
            "saved": {name: dict(configuration) for name, configuration in self.saved.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> Self:
        """What `to_json` gave; UserError if it is something else."""
        try:
            return cls(_RUBRICS.validate_python(data["data"]), data.get("saved", {}))
        except (AttributeError, KeyError, TypeError, ValidationError) as error:
            raise UserError(f"{CATALOG_FILE}: written by another version; train the model again") from error


def _entry(rubric: Rubric, texts: Mapping[tuple[str, str], Directive]) -> CatalogRubric:
    levels = []
    for level in rubric.levels:
        directive = texts.get((rubric.id, level.name))
        if directive is None:
            raise UserError(f"rubric {rubric.id}: level {level.name!r} has no train directive; synthesize again")
        levels.append(
            CatalogLevel(
                name=level.name, score=level.score, directive=directive.text, directive_id=directive.directive_id
            )
        )
    return CatalogRubric(
        id=rubric.id, title=rubric.title, version=rubric.version, objective=rubric.objective, levels=tuple(levels)
    )


def compose_directives(texts: Sequence[str]) -> str | None:
    """One system prompt for the directives of a configuration's rubrics, in rubric order."""
    return "\n".join(texts) or None
