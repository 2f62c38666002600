"""What a dry run says of a run, against what the run then asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.cli import main
from cpt_ray.config import ModelConfig, load_config
from cpt_ray.engines.engine import Completion, FakeEngine, Request
from cpt_ray.engines.pool import LocalRunner
from cpt_ray.errors import UserError
from cpt_ray.estimate.rates import CHARACTERS_PER_TOKEN, Rates, Stage, parameters
from cpt_ray.estimate.stages import Estimate
from cpt_ray.evaluation.stage import evaluate
from cpt_ray.plan import Plan, make_plan, plan_units, run_info
from cpt_ray.synthesis.stage import name_shards, synthesize
from cpt_ray.tables.rundir import RunDir
from tests import toy
from tests.builders import LEVELS, rubric_dict
from tests.fake_runs import GIVEN, MOOD, level_in, make_run
from tests.local_cluster import ROOT

TABLES = ("directives", "units", "generations", "grades", "repeats", "pairs", "rejects")
JUDGED = {"name": "words", "weight": 100, "descriptors": {name: f"{name} words" for name in LEVELS}}


def letters(seed: int | None) -> str:
    """A word of its own, without digits, which a directive may not have."""
    return "".join("abcdefghij"[int(digit)] for digit in str(seed))


class Model:
    """Keeps what it is asked; answers at the level asked for or, if it is `lost`, all at the same one."""

    def __init__(self, is_lost: bool = False):
        self.is_lost, self.written, self.judged = is_lost, list[Request](), list[Request]()

    def __call__(self, request: Request) -> Completion:
        asked = request.messages[-1]["content"]
        if request.labels:
            self.judged.append(request)
            at = next(at for at, level in enumerate(LEVELS) if f"{level} text" in asked)
            return Completion(label_logprobs=tuple(-0.1 if at == each else -9.0 for each in range(3)), num_tokens=1)
        if "tell a writer" in asked:
            return Completion(text=f"Go {level_in(asked)} with a {letters(request.seed)}.", num_tokens=6)
        self.written.append(request)
        level = level_in(asked) if " of 3, " in asked and not self.is_lost else "mid"
        bangs = {"low": ". B. C. D.", "mid": "! B. C! D.", "high": "! B! C! D!"}[level]
        return Completion(text=f"{level} text {letters(request.seed)}{bangs}", num_tokens=7, num_prompt_tokens=9)


def estimated(plan: Plan, run: RunDir, command: str = "synthesize") -> dict[str, Stage]:
    rates = Rates.read(plan, run, is_named=False)
    return {stage.name: stage for stage in Estimate(plan, run, rates, lambda shards: "").stages(command)}


def synthesized(plan: Plan, run: RunDir, model: Model) -> dict[str, Any]:
    """The ledger of a synthesis; an incomplete one where no pair could be made."""
    run.write_run({"config": plan.config.model_dump(mode="json"), **run_info(plan)})
    synthesize(plan, run, LocalRunner(lambda role: FakeEngine(model)))
    return dict(run.read_json("ledger.json"))


def num_files(run: RunDir) -> int:
    return sum(len(run.names(table)) for table in TABLES)


def characters(messages: list[ChatMessage]) -> int:
    return sum(len(message["content"]) for message in messages)


VARIED = ["synthesis.control=0.5", "synthesis.near_duplicates=0.99", "synthesis.samples=3", "synthesis.grids=2"]


@pytest.mark.parametrize("overrides", [[], VARIED], ids=["plain", "control, near-duplicates, three passes"])
@pytest.mark.parametrize("ask", ["levels", "prompt"])
def test_units_files_and_tokens_are_those_that_a_run_then_has(tmp_path: Path, overrides: list[str], ask: str) -> None:
    plan, run = make_run(tmp_path, f"synthesis.ask={ask}", "synthesis.samples=2", *overrides, criteria=[JUDGED])
    stages, model = estimated(plan, run), Model(is_lost=ask == "prompt")
    if ask == "prompt":  # one level alone makes no pair
        with pytest.raises(UserError, match="no pair was made"):
            synthesized(plan, run, model)
    else:
        synthesized(plan, run, model)
    ledger = run.read_json("ledger.json")
    write, controls = stages["write"], stages.get("control")
    asked = [request for request in model.written if request.messages]
    num_controls = controls.rows if controls else 0
    assert num_controls == ledger.get("control", {}).get("rows_in", 0)
    assert num_files(run) == sum(stage.files for stage in stages.values())
    assert not any(s.there for s in stages.values())
    assert ledger["direct"]["rows_in"] == stages["direct"].rows == stages["direct"].most
    assert len(asked) == ledger["write"]["rows_in"] + num_controls
    assert (
        ledger["write"]["generated_tokens"] <= write.most_written == write.most * 20  # max_tokens
    )
    if ask == "prompt":  # every pass is needed, and asks for as much as it may
        assert ledger["write"]["rows_in"] == write.most
        assert ledger["judge"]["rows_in"] == stages["judge"].most == len(model.judged)
    else:  # the first pass is enough
        first = len(plan.prompts_of("train")) * 3
        assert ledger["write"]["rows_in"] == (first if "synthesis.grids=2" not in overrides else 2 * first)
        assert stages["judge"].requests >= len(model.judged)


def test_judges_but_the_first_are_estimated_by_judged_rubrics_alone(tmp_path: Path) -> None:
    measure = {"name": "word_count", "values": {"low": 4, "mid": 6, "high": 8}}
    size = {"name": "size", "weight": 100, "descriptors": {name: f"{name} size" for name in LEVELS}, "measure": measure}
    second = rubric_dict(id="size", title="Size", criteria=[size])
    plan, run = make_run(tmp_path, 'judges=[{"model": "other"}]', second=second, criteria=[JUDGED])
    stages, ledger = estimated(plan, run), synthesized(plan, run, Model())
    rows = {name: ledger[name]["rows_in"] for name in ("judge", "judge-2")}
    assert rows == {name: stages[name].rows for name in rows}
    assert rows["judge"] == 3 * rows["judge-2"]  # by the measure all answers, which are half each rubric's


@pytest.mark.parametrize("ask", ["levels", "prompt"])
def test_units_are_counted_without_being_made(tmp_path: Path, ask: str) -> None:
    more = ["synthesis.combine=[[ornament, mood]]", "synthesis.control=0.4", "synthesis.samples=2"]
    plan, _ = make_run(tmp_path, *more, f"synthesis.ask={ask}", "synthesis.first_pass=2", second=MOOD, levels=GIVEN)
    units = plan_units(plan)
    assert {name: planned.count for name, planned in units.items()} == {
        name: len(list(planned)) for name, planned in units.items()
    }


def test_the_prompts_tokens_are_counted_on_what_the_writer_is_asked(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, levels=GIVEN)
    write, model = estimated(plan, run)["write"], Model()
    synthesized(plan, run, model)
    assert write.rows == write.most == len(model.written)
    total = sum(characters(request.messages) for request in model.written)
    assert write.prompt_tokens == round(total / CHARACTERS_PER_TOKEN)


def test_an_earlier_run_of_the_same_models_gives_its_rates_to_another(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "synthesis.samples=3", "synthesis.grids=2", levels=GIVEN)
    ledger = synthesized(plan, run, Model())
    ledger["write"]["engine_seconds"] = 1.0  # this engine's may be rounded to none
    run.write_json("ledger.json", ledger)
    rates = Rates.read(plan, run, is_named=True)
    stages = {stage.name: stage for stage in Estimate(plan, RunDir(tmp_path / "other"), rates, str).stages("run")}
    assert stages["write"].rows == ledger["write"]["rows_in"] < stages["write"].most
    assert stages["write"].written == ledger["write"]["generated_tokens"]
    assert "write" not in rates.assumed
    assert "answer-base" in rates.assumed
    other, _ = make_run(tmp_path, "writer.model=another")
    assert "writer" not in Rates.read(other, run, is_named=True).same
    with pytest.raises(UserError, match=r"--rates: .*no ledger of a run is there"):
        Rates.read(plan, RunDir(tmp_path / "nothing"), is_named=True)


def test_what_is_complete_is_not_counted_again_and_a_price_makes_a_cost(tmp_path: Path) -> None:
    plan, run = make_run(tmp_path, "writer.price={generated: 1000000}", levels=GIVEN)
    before = estimated(plan, run)
    assert before["write"].cost == before["write"].written  # a unit of money each
    synthesized(plan, run, Model())
    after = estimated(plan, run)
    assert all(stage.there == stage.files for stage in after.values())
    assert sum(stage.seconds for stage in after.values()) == 0
    assert after["write"].cost == 0
    lost = next(iter(run.names("generations")))
    run.shard("generations", lost).unlink()
    assert 0 < estimated(plan, run)["write"].left < 1


def test_the_evaluation_asks_for_what_the_dry_run_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.evaluation.stage.base_log_probs", lambda *_: {})
    plan, run = make_run(tmp_path, "evaluate.trained_directives=1", levels=GIVEN)
    synthesized(plan, run, Model())
    stages = estimated(plan, run, "evaluate")
    evaluate(plan, run, name_shards(plan, plan_units(plan)), LocalRunner(lambda role: FakeEngine(Model())))
    ledger = run.read_json("ledger.json")
    for name in ("answer-tuned", "answer-base", "grade"):
        assert ledger[name]["rows_in"] == stages[name].rows
    tables = [stages[name] for name in ("answer-tuned", "answer-base", "grade")]
    assert sum(stage.files for stage in tables) == len(run.names("evaluation")) + len(run.names("evaluation_answers"))


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    status = main([*arguments, "--dry-run"])
    out, err = capsys.readouterr()
    return status, out + err


def test_a_dry_run_starts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, said = dry_run(capsys, "run", str(toy.RUN_FILE), f"run_dir={tmp_path}/run", "prompts.limit=40")
    assert status == 0
    assert not (tmp_path / "run").exists()
    lines = {line.split()[0]: line.split() for line in said.splitlines()}
    assert {"direct", "write", "judge", "pair", "train", "answer-tuned", "grade", "total", "assumed"} <= lines.keys()
    assert "in the first pass, at most" in said
    assert "nothing was started or written" in said


def test_bad_input_is_refused_as_by_the_command_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, place = str(toy.RUN_FILE), f"run_dir={tmp_path}/run"
    assert "writer.sampling.temperature" in dry_run(capsys, "run", file, place, "writer.sampling.temperature=-1")[1]
    assert dry_run(capsys, "evaluate", file, place) == (1, f"error: {tmp_path}/run: nothing is there; run `cpt "
                                                          "synthesize` with this run file first\n")  # fmt: skip
    assert "no ledger of a run is there" in dry_run(capsys, "run", file, place, "--rates", str(tmp_path))[1]
    assert main(["run", file, place, "--rates", str(tmp_path)]) == 1
    assert "--rates: is read by --dry-run alone" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_quickstart_is_estimated_near_what_it_takes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Known of it (README): 62,981 written tokens, 1,426 pairs trained on twice, some 20 minutes on two cores."""
    monkeypatch.chdir(ROOT)
    plan = make_plan(load_config(Path("jobs/quickstart.yaml")))
    stages = estimated(plan, RunDir(tmp_path), "run")
    assert stages["write"].most == 2 * len(plan.prompts_of("train")) * 6
    assert 0.8 * 62_981 < stages["write"].written < 1.25 * 62_981 < stages["write"].most_written
    assert 0.8 * 1_426 < stages["train"].rows < 1.25 * 1_426
    assert 0.6 * 20 < sum(stage.seconds for stage in stages.values()) / 60 < 1.7 * 20


@pytest.mark.parametrize(
    ("name", "number"), [("Qwen/Qwen3-32B", 32e9), ("a:SmolLM2-135M-Instruct.Q4_1.gguf", 135e6), ("Qwen3-0.6B", 0.6e9)]
)
def test_a_models_size_is_read_off_its_name(name: str, number: float) -> None:
    assert parameters(ModelConfig.model_construct(model=name)) == number
