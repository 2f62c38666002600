"""Data of UltraFeedback's shape: read, checked and described without starting anything."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from cpt_ray.cli import main
from cpt_ray.steering.comparison import _interval
from tests.local_cluster import ROOT

RUN_FILE = str(ROOT / "jobs" / "ultrafeedback.yaml")


def completion(rng: Random, helpful: Any = None, honest: Any = None) -> dict[str, Any]:
    ratings = {"helpfulness": helpful, "honesty": honest}
    return {
        "model": "m",
        "response": f"Answer {rng.random()}.",
        "annotations": {name: {"Rating": value or str(rng.randint(1, 5))} for name, value in ratings.items()},
    }


def write(path: Path, num_rows: int = 60, **changes: Any) -> str:
    rng = Random(0)
    rows = [
        {"source": "s", "instruction": f"Question {at}?", "completions": [completion(rng) for _ in range(4)]} | changes
        for at in range(num_rows)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def dry_run(source: str, *overrides: str) -> int:
    given = [f"prompts.source={source}", "prompts.held_out=0.3", f"rubrics=[{ROOT}/rubrics/ultrafeedback]", *overrides]
    return main(["steer", "fit", RUN_FILE, given[0], "--dry-run", *given[1:]])


def test_a_dry_run_reads_the_data_and_says_what_would_be_learned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dry_run(write(tmp_path / "data.jsonl"), "steer.users=30", "steer.test_users=10") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "60 users, twins included" in lines[0]
    assert "10 users, twins included" in lines[1]
    prompts = [int(line.split(" prompts,")[0].split()[-1]) for line in lines[:2]]
    assert sum(prompts) == 60
    assert min(prompts) > 0
    assert not (tmp_path / "runs").exists()


def test_ungraded_answers_are_in_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = Random(0)
    ungraded = [completion(rng, "N/A", "N/A") for _ in range(4)]
    assert dry_run(write(tmp_path / "data.jsonl", completions=ungraded)) == 1
    assert "too few graded answers" in capsys.readouterr().err


@pytest.mark.parametrize("grade", ["N/A", "nan", "inf", True])
def test_grades_that_are_no_numbers_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], grade: Any) -> None:
    rng = Random(0)
    answers = [completion(rng, *([grade, None] if at == 0 else [str(at + 1)])) for at in range(4)]
    assert dry_run(write(tmp_path / "data.jsonl", completions=answers)) == 0
    assert "note: 60 of 480 grades are no numbers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["steer.answers.list=answers"], "no list of answers"),
        (["steer.answers.text=body"], "no text 'body'"),
        (["steer.answers.scores={helpfulness: annotations.helpfulness.Score}"], "no field"),
        (["steer.answers.scores={helpfullness: a}"], 'did you mean "helpfulness"'),
        (["steer.conflicting=0.5"], "conflicting"),
        (
            ["steer.held_out_rubrics=[honestly]"],
            "steer.held_out_rubrics: no rubric 'honestly' (did you mean \"honesty\"?)",
        ),
        (["steer.held_out_rubrics=[honesty, helpfulness]"], "steer.held_out_rubrics: names every rubric"),
        (["steer.answers.scale=[1, 4]"], "found the grade 5; steer.answers.scale is [1.0, 4.0]"),
    ],
)
def test_what_does_not_fit_the_data_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], message: str
) -> None:
    assert dry_run(write(tmp_path / "data.jsonl"), *overrides) == 1
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) == 1


def test_inference_needs_a_policy_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "data.jsonl")
    given = [RUN_FILE, f"prompts.source={source}", "prompts.held_out=0.3", f"rubrics=[{ROOT}/rubrics/ultrafeedback]"]
    assert main(["steer", "infer", *given]) == 1
    assert "--choices" in capsys.readouterr().err
    assert main(["steer", "evaluate", *given]) == 1
    assert "tuned policy" in capsys.readouterr().err


def test_users_whose_answers_nobody_measured_are_left_out_of_the_interval_alone_or_with_their_twins() -> None:
    values = np.array([0.2, 0.4, np.nan, 0.6, np.nan, np.nan]).reshape(6, 1, 1)
    rng = np.random.default_rng(0)
    assert _interval(values, rng) == [pytest.approx([0.3, 0.6])]
    assert _interval(values[4:], rng) == [None]
