"""Two workers at the same shard leave the first one's, whole, with its rejects."""

from __future__ import annotations

from pathlib import Path

import pytest

from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.plan import plan_units
from cpt_ray.synthesis.stage import Steps
from cpt_ray.tables.address import ChangedError, StoreError
from cpt_ray.tables.records import Generation, Reject, Unit
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import StorePath
from tests.builders import make_generation
from tests.fake_runs import GIVEN, make_run, synthesized


def test_of_two_workers_on_one_shard_the_first_ones_answers_counts_and_rejects_stay(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    name, planned = next(iter(plan_units(plan).items()))
    units = list(planned)
    run.write("units", name, units)
    step = Steps.of(plan, plan_units(plan)).write

    def engine_without(lost: Unit, text: str) -> FakeEngine:
        def reply(request: Request) -> Completion:
            is_lost = request == step.request(lost)
            return Completion(error="filtered", detail=text) if is_lost else Completion(text=text, num_tokens=3)

        return FakeEngine(reply)

    class Overtaken:
        """An engine that answers only after another worker has made the whole shard."""

        def run(self, requests: list[Request]) -> list[Completion]:
            step(engine_without(units[0], "first"), run, name)
            return engine_without(units[1], "second").run(requests)

    step(Overtaken(), run, name)
    rejects = run.read("rejects", [f"write-{name}"], Reject)
    assert [(row.subject_id, row.detail) for row in rejects] == [(units[0].unit_id, "first")]
    answers = run.read("generations", [name], Generation)
    assert {row.unit_id for row in answers} == {unit.unit_id for unit in units[1:]}
    assert {row.text for row in answers} == {"first"}
    assert run.counts("generations", name)["generated_tokens"] == 3 * len(answers)


def test_rejects_that_a_killed_process_owed_are_there_after_the_next_run(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    synthesized(plan, run)
    before = {name: run.read("rejects", [name], Reject) for name in run.names("rejects")}
    assert any(rows for name, rows in before.items() if name.startswith("write-"))
    for name in before:
        if not name.startswith("pair-"):
            run.shard("rejects", name).unlink()
    synthesized(plan, run)
    assert {name: run.read("rejects", [name], Reject) for name in run.names("rejects")} == before


def test_a_shard_that_is_made_anew_has_its_own_rejects(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    rows = [make_generation("low")]
    for number in (1, 2):
        reject = Reject.of_row("write", f"row{number}", "filtered", "")
        run.write("generations", "00000", rows, rejects=("write", [reject]))
        assert run.read("rejects", ["write-00000"], Reject) == [reject]
        run.shard("generations", "00000").unlink()  # its rejects stay, as those of an earlier version's dead process


@pytest.mark.parametrize(("answers", "is_there"), [([StoreError("reset"), None], False), ([ChangedError("own")], True)])
def test_a_put_of_what_is_new_is_repeated_until_it_is_there(
    monkeypatch: pytest.MonkeyPatch, answers: list[Exception | None], is_there: bool
) -> None:
    calls = iter(answers)

    def put_if(path: StorePath, content: bytes, version: None) -> None:
        if error := next(calls):
            raise error

    monkeypatch.setattr(StorePath, "put_if", put_if)
    monkeypatch.setattr(StorePath, "exists", lambda path: is_there)
    StorePath("s3://b", "k").put_new(b"x")
    assert next(calls, "none left") == "none left"


def test_a_put_of_what_is_new_ends_with_the_stores_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def put_if(path: StorePath, content: bytes, version: None) -> None:
        raise next(errors)

    monkeypatch.setattr(StorePath, "put_if", put_if)
    monkeypatch.setattr(StorePath, "exists", lambda path: False)
    errors = iter([StoreError("reset"), StoreError("reset"), StoreError("down")])
    with pytest.raises(StoreError, match="down"):
        StorePath("s3://b", "k").put_new(b"x")
    errors = iter([ChangedError("conflict")] * 3)
    with pytest.raises(StoreError, match="s3://b/k: cannot be written; others write it at the same time"):
        StorePath("s3://b", "k").put_new(b"x")
