"""What a refused command leaves behind: nothing that was not there before."""

from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir

PACKAGE = Path(__file__).parent.parent / "cpt_ray"


def refused(run: RunDir, *written: str) -> None:
    """A command that writes these files and then ends with a user's error."""
    with pytest.raises(UserError, match="no good"), run.locked():
        for name in written:
            run.write_text(name, '{"plan": {}}')
        raise UserError("no good")


def tree(folder: Path) -> set[str]:
    return {str(one.relative_to(folder)) for one in folder.rglob("*")}


PLANNED = ("run.yaml", "ledger.json", "units/a.parquet", "attempts/start-1")


@pytest.mark.parametrize("written", [(), ("run.yaml",), PLANNED])
def test_a_refused_command_leaves_no_folder(tmp_path: Path, written: tuple[str, ...]) -> None:
    refused(RunDir(tmp_path / "runs" / "a"), *written)
    assert tree(tmp_path) == set()


def test_what_was_there_before_stays(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "notes.txt").touch()
    refused(RunDir(tmp_path / "runs" / "a"), *PLANNED)
    assert tree(tmp_path) == {"runs", "runs/notes.txt"}
    (tmp_path / "runs" / "a").mkdir()
    refused(RunDir(tmp_path / "runs" / "a"), *PLANNED)
    assert tree(tmp_path) == {"runs", "runs/notes.txt", "runs/a"}
    (tmp_path / "runs" / "a" / "run.yaml").touch()
    refused(RunDir(tmp_path / "runs" / "a"), *PLANNED)
    assert tree(tmp_path) == {"runs", "runs/notes.txt", "runs/a", "runs/a/run.yaml"}


@pytest.mark.parametrize(
    "result", ["ray.log", "generations/a.parquet", "checkpoints/key/state.json", "keys.json", "rejects/a.parquet"]
)
def test_a_result_keeps_all_that_tells_of_it(tmp_path: Path, result: str) -> None:
    refused(RunDir(tmp_path), *PLANNED, result)
    assert {*PLANNED, result, ".lock"} <= tree(tmp_path)


def test_a_file_that_a_command_misses_is_its_own_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing here"), RunDir(tmp_path / "a").locked():
        raise FileNotFoundError("nothing here")


def test_who_is_refused_because_another_is_at_work_touches_nothing(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    with run.locked():
        run.write_text("run.yaml", "name: a")
        for _ in range(2):
            with pytest.raises(UserError, match="another process works on this run"), RunDir(tmp_path / "a").locked():
                raise AssertionError("it is locked")
        assert tree(run.path) == {".lock", "run.yaml"}


def test_a_run_directory_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UserError, match="cannot be written"), RunDir(tmp_path / "a").locked():
        raise AssertionError("there is no folder")


def test_a_stage_in_the_ledger_is_a_result(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a")
    with pytest.raises(UserError), run.locked():
        run.add_to_ledger("write", {"rejected": {"refused": 24}})
        raise UserError("all answers were refused")
    assert run.read_json("ledger.json") == {"write": {"rejected": {"refused": 24}}}


def test_an_accident_or_a_stop_keeps_everything(tmp_path: Path) -> None:
    for error in (RuntimeError, KeyboardInterrupt):
        run = RunDir(tmp_path / error.__name__)
        with pytest.raises(error), run.locked():
            run.write_text("ray.log", "why")
            raise error
        assert tree(run.path) == {".lock", "ray.log"}


@pytest.mark.parametrize(("name", "text"), [("ledger.json", "{"), ("run.yaml", "name: [")])
def test_a_broken_file_of_a_run_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str
) -> None:
    (tmp_path / "run.yaml").write_text("name: a")
    (tmp_path / name).write_text(text)
    assert main(["status", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / name}: cannot be read (")


@pytest.mark.parametrize("error", [None, errno.EPERM, errno.EXDEV])
def test_a_shard_that_is_there_first_stays(error: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise OSError(error, "no hard links here")

    if error:
        monkeypatch.setattr(os, "link", no_links)
    run = RunDir(tmp_path)
    for count in (1, 2):
        run.write("units", "a", [], {"rows_in": count})
    assert run.counts("units", "a") == {"rows_in": 1}
    assert [path.name for path in run.table("units").iterdir()] == ["a.parquet"]


def test_a_shard_that_cannot_be_put_in_place_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"a.parquet: cannot be written \(No space left on device\)"):
        RunDir(tmp_path).write("units", "a", [])
    assert not [*(tmp_path / "units").iterdir()]


@pytest.mark.parametrize("text", ["", "[]", "a: b"])
def test_a_folder_that_is_no_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "run.yaml"):
        assert main(["status", str(path)]) == 1
        assert (
            f"error: {path}: no run.yaml there that names a run; give the directory of a run" in capsys.readouterr().err
        )


READS_AND_WRITES = {"read_json", "read_yaml", "write_json"}


def test_no_other_module_names_a_path_of_the_run_directory() -> None:
    places = []
    for path in {*PACKAGE.rglob("*.py")} - {PACKAGE / "tables" / "rundir.py"}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.BinOp(left=ast.Attribute(attr="path"), op=ast.Div(), right=ast.Constant() | ast.JoinedStr()):
                    places.append(f"{path.name}:{node.lineno}")
                case ast.Call(func=ast.Attribute(value=ast.Name("run"), attr=name), args=[ast.Constant(), *_]):
                    places += [f"{path.name}:{node.lineno}"] * (name in READS_AND_WRITES)
    assert places == []
