"""Commands say in a line what keeps them from their work, before they start anything."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import yaml

from cpt_ray.capacity import NodeType, NodeTypes
from cpt_ray.cli import main
from cpt_ray.config import JOB_ENV
from cpt_ray.engines.worker import Attempts, endpoint_key
from cpt_ray.errors import UserError
from cpt_ray.pipeline import _check_room
from cpt_ray.plan import make_plan, plan_units
from cpt_ray.serving.examples import print_next
from cpt_ray.tables.rundir import RunDir
from tests.builders import rubric_dict
from tests.fake_runs import make_run


def test_a_run_directory_serves_one_process_at_a_time(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    with run.locked(), pytest.raises(UserError, match="another process"), RunDir(tmp_path / "run").locked():
        pass
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot be written"), RunDir(blocked / "run").locked():
        pass


@pytest.mark.parametrize("command", ["run", "train", "evaluate"])
def test_a_reference_that_no_node_can_hold_is_refused_before_the_stages_in_front_of_it(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = NodeTypes([NodeType("node", {"CPU": 8, "GPU": 1}, 8)])
    for module in ("pipeline", "training.checks"):
        monkeypatch.setattr(f"cpt_ray.{module}.node_types", lambda: nodes)
    sharded = ("train.sharding=fsdp", "train.use_gpu=true", "train.num_workers=8")
    plan, _ = make_run(tmp_path, *sharded)  # a GPU on each of eight nodes for its workers, eight on one for the rest
    with pytest.raises(
        UserError, match=r"the untuned policy needs \{CPU: 1, GPU: 8\} on one node; .*train.num_workers"
    ):
        _check_room(command, plan)
    _check_room("synthesize", plan)
    plan, _ = make_run(tmp_path, "steer.use_gpu=true", "steer.num_workers=9")
    with pytest.raises(UserError, match=r"the training of steer needs .*steer.num_workers"):
        _check_room("steer", plan)
    plan, _ = make_run(tmp_path, *sharded[1:])
    _check_room(command, plan)


def test_a_rubric_that_cannot_check_the_judge_is_named_before_anything_starts(tmp_path: Path) -> None:
    measured = str(tmp_path / "measured.yaml")
    only = rubric_dict()
    (tmp_path / "measured.yaml").write_text(
        yaml.safe_dump(only | {"criteria": [only["criteria"][1] | {"weight": 100}]})
    )
    with pytest.raises(UserError, match=r"measured\.yaml: no measure to compare the judge with"):
        make_run(tmp_path, f"evaluate.judge_check={measured}")
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        make_run(tmp_path, f"evaluate.judge_check={tmp_path / 'gone.yaml'}")


def test_a_saved_configuration_that_no_rubric_has_is_named_before_anything_starts(tmp_path: Path) -> None:
    make_run(tmp_path, "serve.configurations={poet: {ornament: high}, plain: {ornament: 10}}")
    with pytest.raises(UserError, match=r"serve\.configurations\.poet: configuration\.ornament: no level 'hihg'"):
        make_run(tmp_path, "serve.configurations={poet: {ornament: hihg}}")
    with pytest.raises(UserError, match=r"serve\.configurations\.poet: configuration: no rubric 'ornamant'"):
        make_run(tmp_path, "serve.configurations={poet: {ornamant: high}}")


def test_a_held_out_prompt_in_other_letters_fails_the_run(tmp_path: Path) -> None:
    plan, _ = make_run(tmp_path)
    leaked = plan.prompts_of("held_out")[0].text.upper().strip(".") + "!"
    for at in range(50):  # whichever of these is in the other split
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"prompt": leaked + "!" * at}))
    with pytest.raises(UserError, match="has the same words"):
        make_plan(plan.config)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.tables.files.uuid.uuid4", lambda: uuid.UUID(int=0))
    plan, run = make_run(tmp_path)
    name, units = next(iter(plan_units(plan).items()))
    path = run.shard("units", name)
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.{uuid.UUID(int=0).hex}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"cannot be written \(No space left on device\); free some space"):
        run.write("units", name, units)
    assert list(path.parent.iterdir()) == []
    run.attempts.mkdir(parents=True)
    (run.attempts / f".write-x.{uuid.UUID(int=0).hex}.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"write-x: cannot be written \(No space left on device\); free some space"):
        Attempts(run.attempts).begin("write-x", "on write of shard x")


def test_verbose_shows_where_an_error_came_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["synthesize", "no-such-file.yaml"]) == 1
    assert "Traceback" not in capsys.readouterr().err
    assert main(["synthesize", "no-such-file.yaml", "--verbose"]) == 1
    shown = capsys.readouterr().err
    assert "in read_yaml" in shown
    assert shown.splitlines()[-1].startswith("error: no-such-file.yaml: cannot be read")


def test_a_missing_key_is_noticed_before_anything_starts_that_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = "judge.endpoint={base_url: 'http://127.0.0.1:1/v1', api_key_env: NO_SUCH_KEY}"
    _, run = make_run(tmp_path, endpoint)
    for command in ("run", "synthesize", "evaluate"):
        assert main([command, str(tmp_path / "run.yaml"), endpoint]) == 1
        assert "set the environment variable NO_SUCH_KEY" in capsys.readouterr().err
    for key in ("sk-one sk-two", "sk-\u00e9", "sk-one\nsk-two"):
        monkeypatch.setenv("NO_SUCH_KEY", key)
        assert main(["synthesize", str(tmp_path / "run.yaml"), endpoint]) == 1
        shown = capsys.readouterr().err
        assert "the environment variable NO_SUCH_KEY cannot be a key" in shown
        assert "sk-" not in shown
    monkeypatch.setenv("NO_SUCH_KEY", " sk-mine\n")
    judge = make_run(tmp_path, endpoint)[0].config.judge
    assert (found := endpoint_key(judge))
    assert found.get_secret_value() == "sk-mine"
    assert main(["train", str(tmp_path / "run.yaml"), endpoint]) == 1
    assert "nothing is there; run `cpt synthesize`" in capsys.readouterr().err
    assert not run.path.exists()


def test_a_run_file_is_checked_without_starting_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, run = make_run(tmp_path)
    assert main(["check", str(tmp_path / "run.yaml"), str(tmp_path / "rubric.yaml")]) == 0
    shown = capsys.readouterr()
    answers = sum(len(list(units)) for units in plan_units(plan).values())
    assert f"{answers} answers in the first pass" in shown.out + shown.err
    assert "rubric.yaml: ok (Ornament: 3 levels" in shown.out + shown.err
    assert not run.path.exists()
    (tmp_path / "prompts.jsonl").unlink()
    assert main(["check", str(tmp_path / "run.yaml")]) == 1
    assert "prompts.jsonl" in capsys.readouterr().err


def test_what_to_do_next_is_a_job_in_a_job_and_a_command_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_run(tmp_path)[0].config
    print_next(Path("mine.yaml"), config, ["run_dir=/shared/my run"])
    assert capsys.readouterr().out.startswith("\nServe it:    cpt serve mine.yaml 'run_dir=/shared/my run'\nTalk to it")
    monkeypatch.setenv(JOB_ENV, "{}")
    print_next(Path("mine.yaml"), config, ["run_dir=/shared/my run"])
    assert capsys.readouterr().out.splitlines()[1:] == [
        "Serve it:    ray job submit --no-wait --address http://HEAD:8265 --working-dir . -- "
        "python jobs/serve.py mine.yaml 'run_dir=/shared/my run'",
        "             (the job's log says how to ask it and what it can be asked for)",
    ]


def test_a_check_takes_overrides_and_says_which_gpus_are_needed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, run = make_run(tmp_path)
    file = str(tmp_path / "run.yaml")
    assert main(["check", file]) == 0
    assert "needs" not in capsys.readouterr().out
    gpus = ["writer.num_gpus=1", "writer.num_actors=[1, 4]", "policy.num_gpus=0.5", "train.use_gpu=true"]
    assert main(["check", gpus[0], file, *gpus[1:], "run_dir=/elsewhere"]) == 0
    assert capsys.readouterr().out.endswith(
        "run directory /elsewhere; needs 1 x {CPU: 1, GPU: 0.5} (policy), "
        "1-4 x {CPU: 1, GPU: 1} (writer, director, judge), 2 x {GPU: 1} (train))\n"
    )
    assert main(["check", file, "trian.beta=1"]) == 1
    assert 'unknown key (did you mean "train"?)' in capsys.readouterr().err
    assert main(["check", str(tmp_path / "rubric.yaml"), "train.beta=1"]) == 1
    error = capsys.readouterr().err
    assert error == "error: train.beta=1: changes an entry of a run file, and none is among the paths; give one\n"
    assert not run.path.exists()
    assert main(["check", file, f"name={'x' * 300}"]) == 1
    assert "name: found 'xxx" in capsys.readouterr().err


def test_a_judge_that_nothing_asks_needs_no_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = "judge.endpoint={base_url: 'http://127.0.0.1:1/v1', api_key_env: NO_SUCH_KEY}"
    make_run(tmp_path, endpoint, criteria=[rubric_dict()["criteria"][1] | {"weight": 100}])
    assert main(["evaluate", str(tmp_path / "run.yaml"), endpoint]) == 1
    assert "nothing is there; run `cpt synthesize`" in capsys.readouterr().err


def test_a_reader_that_has_left_ends_a_command_in_one_line(tmp_path: Path) -> None:
    RunDir(tmp_path).write_text("run.yaml", "name: mine\n")
    command = [sys.executable, "-m", "cpt_ray", "status", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (1, "stopped: nobody reads the output any more\n")


def test_status_needs_only_the_run_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(tmp_path)]) == 1
    assert "no run.yaml there that names a run" in capsys.readouterr().err
    run = RunDir(tmp_path)
    run.write_text("run.yaml", "name: mine\n")
    run.add_to_ledger("write", {"rows_in": 5, "rows_out": 4, "rejected": {"cut off": 1}})
    with run.locked():
        assert main(["status", str(tmp_path)]) == 0
    assert "mine: a process is at work on it" in capsys.readouterr().out
    assert main(["status", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "mine: no process is at work on it" in printed
    assert "rejected: 1 cut off" in printed
