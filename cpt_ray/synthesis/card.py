"""The dataset card: README.md of the run directory, which `datasets.load_dataset` reads; and judges.json."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from cpt_ray.console import flat
from cpt_ray.grids import levels_by_rubric
from cpt_ray.judging.agreement import agreement
from cpt_ray.plan import Plan, Shards
from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.grading import aggregate
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.synthesis.levels import LevelCounts
from cpt_ray.tables.records import CONTROL, Generation, Grade, Pair, content_id, parts_of
from cpt_ray.tables.rundir import CARD_FILE, JUDGES_FILE, RunDir

EXAMPLE_CHARACTERS = 600
MAX_SURVEYED = 50
"""Shards of pairs, of 500 prompts each, that the card's numbers are of, evenly spread, where there are more."""
Scores = dict[str, list[tuple[float, float]]]
"""Rubric id to two graders' scores of the same answers."""


class _Survey:
    """One pass over the tables, a shard of pairs and what it was made of at a time."""

    def __init__(self, plan: Plan, run: RunDir, shards: Shards):
        self.rubrics, self._how = plan.by_id, plan.config.synthesis.aggregate
        self.written: Counter[tuple[str, str]] = Counter()
        self.pairs: Counter[tuple[str, str]] = Counter()
        self.tokens: dict[tuple[str, str], list[int]] = defaultdict(list)
        self.confusion: Counter[tuple[str, str, str]] = Counter()
        """(rubric, target, level of the grade or "ungraded")."""
        self.graders: dict[tuple[str, str], Scores] = defaultdict(lambda: defaultdict(list))
        """(judge, judge or "measured")."""
        self.examples: dict[str, Pair] = {}
        self.words: dict[str, tuple[int, int]] = {}
        """Per rubric_id of the pairs: words of the chosen and of the rejected answers."""
        self.levels = LevelCounts(run, shards.pairs)
        every = math.ceil(len(shards.pair_inputs) / MAX_SURVEYED)
        surveyed = list(shards.pair_inputs.items())[::every]
        self.share = f"{len(surveyed)} of {len(shards.pair_inputs)} shards"
        for name, inputs in surveyed:
            self._answers(
                run.read("generations", inputs.generations, Generation), run.read("grades", inputs.grades, Grade)
            )
            self._pairs(run.read("pairs", [name], Pair))

    def _answers(self, generations: Iterable[Generation], grades: Iterable[Grade]) -> None:
        verdicts: dict[str, dict[str, list[Grade]]] = defaultdict(lambda: defaultdict(list))
        for grade in grades:
            verdicts[grade.unit_id][grade.rubric_id].append(grade)
        for generation in generations:
            self.written[generation.rubric_id, generation.level] += 1
            self.tokens[generation.rubric_id, generation.level].append(generation.num_tokens)
            for rubric_id, grades_of_answer in verdicts[generation.unit_id].items():
                self._compare(self.rubrics[rubric_id], grades_of_answer)
            if generation.rubric_id and generation.level != CONTROL:
                rubrics = [self.rubrics[name] for name in parts_of(generation.rubric_id)]
                for rubric, level in levels_by_rubric(rubrics, parts_of(generation.level)):
                    if grades_by_rubric := verdicts[generation.unit_id][rubric.id]:
                        score = aggregate(rubric, grades_by_rubric, self._how).score
                        found_level = "ungraded" if score is None else nearest_level(rubric.levels, score).name
                        self.confusion[rubric.id, level, found_level] += 1

    def _compare(self, rubric: Rubric, grades: Sequence[Grade]) -> None:
        for first, second in itertools.combinations(grades, 2):
            if first.judged is not None and second.judged is not None:
                self.graders[first.judge, second.judge][rubric.id].append((first.judged, second.judged))
        for grade in grades:
            if grade.judged is not None and grade.measured is not None:
                self.graders[grade.judge, "measured"][rubric.id].append((grade.judged, grade.measured))

    def _pairs(self, pairs: Iterable[Pair]) -> None:
        for pair in pairs:
            self.pairs[pair.rubric_id, pair.level] += 1
            self.examples.setdefault(pair.rubric_id, pair)
            chosen, rejected = (len(text[0].content.split()) for text in (pair.chosen, pair.rejected))
            before = self.words.get(pair.rubric_id, (0, 0))
            self.words[pair.rubric_id] = before[0] + chosen, before[1] + rejected

    def judges(self) -> list[dict[str, Any]]:
        """How far the judges agree with each other and with what is measured, per rubric."""
        return [
            {"judge": judge, "against": other, "rubric": name, **agreement(self.rubrics[name], scores)}
            for (judge, other), by_rubric in self.graders.items()
            for name, scores in by_rubric.items()
        ]


def write_card(plan: Plan, run: RunDir, shards: Shards, info: Mapping[str, Any]) -> None:
    """Writes the card and judges.json, unless the card there is of the same pairs and shards already."""
    path, pairs_hash = run.path / CARD_FILE, content_id(shards.pairs)
    tables = {name: getattr(shards, name) for name in ("pairs", "directives", "generations", "grades", "rejects")}
    files = {table: _files(run, table, names) for table, names in tables.items()}
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    if pairs_hash in known and known.startswith(_head(info, files)):
        return
    survey = _Survey(plan, run, shards)
    judges = survey.judges()
    run.write_json(JUDGES_FILE, judges)
    run.write_text(CARD_FILE, _card(survey, judges, files, info, pairs_hash))


def _files(run: RunDir, table: str, names: Sequence[str]) -> list[str]:
    """Patterns for whole folders, or the names where they hold shards of other settings too.

    A folder of rejects is looked at by stage, since those of a training and an evaluation come later.
    """
    there = run.names(table)
    stages = {name.partition("-")[0] + "-" for name in names} if table == "rejects" else {""}
    if {name for name in there if name.startswith(tuple(stages))} <= {*names}:
        return [f"{table}/{stage}*.parquet" for stage in sorted(stages)]
    return [f"{table}/{name}.parquet" for name in names if name in there]


def _head(info: Mapping[str, Any], files: Mapping[str, list[str]]) -> str:
    configs: list[dict[str, Any]] = [{"config_name": name, "data_files": names} for name, names in files.items()]
    configs[0]["default"] = True
    head = yaml.safe_dump({"pretty_name": info["name"], "configs": configs}, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n"


def _card(
    survey: _Survey,
    judges: Sequence[Mapping[str, Any]],
    files: Mapping[str, list[str]],
    info: Mapping[str, Any],
    pairs_hash: str,
) -> str:
    lineage = flat({"seed": info["seed"], "pairs": pairs_hash, "models": info["models"], "hashes": info["hashes"]})
    parts = [
        f"{_head(info, files)}\n# {info['name']}\n",
        "Preference pairs for configurable preference tuning: under the directive in `prompt`, `chosen` is the answer "
        "whose grade confirms what the directive stands for; every pair has a twin with the answers swapped. "
        "`datasets.load_dataset` takes this folder; with a second argument, `directives`, `generations`, `grades` or "
        "`rejects`. Each names the shards of the present settings, whatever older ones are in the folders.\n",
        *_answer_tables(survey),
        *_level_tables(survey),
        *_grid_tables(survey),
        *_grade_tables(survey, judges),
        "## Examples\n",
        *(_example(pair) for pair in survey.examples.values()),
        "## Lineage\n",
        _table(("what", "hash or name"), lineage),
    ]
    return "\n".join(parts)


def _answer_tables(survey: _Survey) -> list[str]:
    counts = [
        (rubric or "nothing", level or "-", written, *_quantiles(survey.tokens[rubric, level]))
        for (rubric, level), written in sorted(survey.written.items())
    ]
    return [
        f"## Answers, by what was asked for\n\nOf {survey.share}. Tokens: 10th, 50th and 90th percentile of an "
        "answer's length.\n",
        _table(("rubric", "level", "answers", "p10", "p50", "p90"), counts),
    ]


def _level_tables(survey: _Survey) -> list[str]:
    levels = [(rubric.id, level.name) for rubric in survey.rubrics.values() for level in rubric.levels]
    return [
        "## Levels, by what the grades say\n\nHit: answers at the level they were asked to be at. Answers: all at the "
        "level, whatever they were asked to be.\n",
        _table(
            ("rubric", "level", "asked", "hit", "answers", "in pairs", "pairs (chosen)"),
            [_level_row(survey, *level) for level in levels],
        ),
        "## How far apart the levels are\n\nMean score (0-100) of the answers in pairs. They were taken for being far "
        "out by the first judge (or by the measure), which therefore overstates how far out they are. The other judges "
        "had no part in it ('-': there is no other; `judges` in the run file adds one).\n",
        _table(
            ("rubric", "level", "by what took them", "by the other judges"),
            [(*level, *survey.levels.mean_scores(*level)) for level in levels],
        ),
    ]


def _grid_tables(survey: _Survey) -> list[str]:
    shifts = [
        (rubric, survey.levels.grids(rubric), other, *both)
        for rubric in survey.rubrics
        for other, both in survey.levels.shifts(rubric).items()
    ]
    balance = [(name, *words, words[0] / words[1] if words[1] else None) for name, words in survey.words.items()]
    return [
        "## What else differs within a grid\n\nThe grid's highest level less its lowest, on what its rubric does not "
        "dial, in standard deviations, mean over all grids: of all answers at those levels, and of those that were "
        "taken.\n",
        _table(("rubric", "grids", "differs in", "all answers", "taken"), shifts),
        "## Length of chosen against rejected\n",
        _table(("rubric", "words chosen", "words rejected", "ratio"), balance),
    ]


def _grade_tables(survey: _Survey, judges: Sequence[Mapping[str, Any]]) -> list[str]:
    columns = ("judge", "against", "rubric", "n", "same_level", "weighted_kappa", "spearman_rho")
    return [
        "## Grade against target\n\nRows: the level asked for; columns: the level of the grade.\n",
        *(_confusion(survey, rubric) for rubric in survey.rubrics.values()),
        "## Judges\n\nEach judge's mean score per level, to calibrate it by, is in `judges.json`.\n",
        _table(columns, [[row[column] for column in columns] for row in judges]),
    ]


def _level_row(survey: _Survey, rubric: str, level: str) -> tuple[Any, ...]:
    counts = survey.levels.level(rubric, level)
    return rubric, level, *(counts[what] for what in ("asked", "hit", "at", "kept")), survey.pairs[rubric, level]


def _quantiles(tokens: Sequence[int]) -> list[int]:
    return [int(quantile) for quantile in np.percentile(tokens, [10, 50, 90])]


def _confusion(survey: _Survey, rubric: Rubric) -> str:
    names = [level.name for level in rubric.levels]
    columns = [*names, "ungraded"]
    rows = [(name, *(survey.confusion[rubric.id, name, column] for column in columns)) for name in names]
    return _table((rubric.id, *columns), rows)


def _example(pair: Pair) -> str:
    blocks = [(message.role, message.content) for message in pair.prompt]
    blocks += [
        (f"chosen ({pair.level})", pair.chosen[0].content),
        (f"rejected ({pair.rejected_level})", pair.rejected[0].content),
    ]
    quoted = (
        f"**{name}**\n\n" + "\n".join(f"> {line}" for line in text[:EXAMPLE_CHARACTERS].splitlines())
        for name, text in blocks
    )
    return f"### {pair.rubric_id}\n\n" + "\n\n".join(quoted) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *([_cell(value) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")
