"""What the roles of a run file come to on this machine: converted models, and a dtype that is chosen once."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_ray.cli import main
from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.engines import roles
from cpt_ray.errors import UserError
from cpt_ray.tables.rundir import RunDir
from tests.builders import rubric_dict
from tests.tiny_gguf import write_gguf

SERVER = {"base_url": "http://localhost:1/v1"}


def config_of(**changes: Any) -> RunConfig:
    data = {"name": "x", "rubrics": ["r.yaml"], "prompts": {"source": "p.jsonl"}, "writer": {"model": "org/name"}}
    return RunConfig.model_validate({**data, "policy": {"model": "org/name"}, **changes})


def run_file(folder: Path, **changes: Any) -> Path:
    """A run file of its own run directory, with its rubric and prompts."""
    (folder / "rubric.yaml").write_text(yaml.safe_dump(rubric_dict()))
    (folder / "prompts.csv").write_text("prompt\n" + "\n".join(f"Write about topic {at}." for at in range(20)))
    data = {"name": "x", "run_dir": str(folder / "run"), "rubrics": [str(folder / "rubric.yaml")]}
    data |= {"prompts": {"source": str(folder / "prompts.csv")}, "writer": {"model": "org/name"}}
    path = folder / "run_file.yaml"
    path.write_text(yaml.safe_dump({**data, "policy": {"model": "org/name"}, **changes}))
    return path


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 sse\n", True),
        ("flags\t\t: fpu amx_bf16 sse\n", True),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni\n", False),
        ("model name\t: avx512_bf16\nflags\t\t: fpu avx2\n", False),
        ("bugs\t\t: bf16\n", False),
    ],
)
def test_a_cpu_computes_bfloat16_if_its_flags_say_so(tmp_path: Path, text: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{text}")
    assert roles.computes_bfloat16(tmp_path / "cpuinfo") is expected


def test_a_machine_that_does_not_list_its_cpus_flags_computes_in_float32(tmp_path: Path) -> None:
    assert roles.computes_bfloat16(tmp_path / "none") is False


@pytest.mark.skipif(platform.machine() != "x86_64", reason="torch has no such question for other CPUs")
def test_torch_agrees_about_this_machines_cpu() -> None:
    import torch

    assert roles.computes_bfloat16() == (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def test_every_role_is_found_by_its_name_in_the_run_file() -> None:
    config = config_of(judges=[{"model": "a/b"}, {"model": "c/d"}], steer={"embedder": {"model": "e/f"}})
    names = ["policy", "writer", "director", "judge", "judges[0]", "judges[1]", "steer.embedder"]
    assert sorted(roles.roles_of(config)) == sorted(names)


@pytest.mark.parametrize(("fast", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_engines_on_a_cpu_without_a_dtype_have_the_fast_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fast: bool, dtype: str
) -> None:
    monkeypatch.setattr(roles, "computes_bfloat16", lambda: fast)
    config = config_of(
        writer={"model": "org/name", "engine": {"max_model_len": 512}},
        director={"model": "org/name", "engine": {"dtype": "auto"}},
        judge={"model": "m", "endpoint": SERVER},
        policy={"model": "org/name", "num_gpus": 1},
    )
    changed, chosen = roles.with_dtype(config, RunDir(tmp_path))
    assert chosen == dtype
    assert changed.writer.engine == {"max_model_len": 512, "dtype": dtype}
    assert (changed.director, changed.judge, changed.policy) == (config.director, config.judge, config.policy)
    why = "computes in bfloat16" if fast else "has no instructions for bfloat16"
    assert capsys.readouterr().out == f"dtype        {dtype}, since the run file gives none and this CPU {why}\n"


def test_a_dtype_that_is_given_everywhere_leaves_nothing_to_choose(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"model": "org/name", "engine": {"dtype": "float32"}}
    config = config_of(writer=given, policy=given, train={"dtype": "float32"})
    assert roles.with_dtype(config, RunDir(tmp_path)) == (config, None)
    assert capsys.readouterr().out == ""


def test_a_run_goes_on_with_the_dtype_it_began_with_on_another_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(tmp_path)
    run.write_run({roles.CPU_DTYPE: "float32"})
    monkeypatch.setattr(roles, "computes_bfloat16", lambda: False)
    here, _ = roles.with_dtype(config_of(), run)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(roles, "computes_bfloat16", lambda: True)
    elsewhere, dtype = roles.with_dtype(config_of(), run)
    assert dtype == "float32"
    assert elsewhere.writer.answer_key == here.writer.answer_key
    assert (elsewhere.train.dtype, here.train.dtype) == ("float32", "float32")
    said = capsys.readouterr().out
    assert said == "dtype        float32, as this run began (a new one here would have bfloat16)\n"


def test_a_kept_dtype_of_another_name_is_refused(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_run({roles.CPU_DTYPE: "float8"})
    with pytest.raises(UserError, match=r"run.yaml: cpu_dtype: found 'float8'; expected bfloat16 or float32"):
        roles.with_dtype(config_of(), run)


def test_what_is_wrong_with_a_model_is_said_with_the_roles_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_text("hello")
    role = {"model": str(broken)}
    for command in ("run", "synthesize", "train", "evaluate"):
        assert main([command, str(run_file(tmp_path, judges=[{"model": "org/name"}, role]))]) == 1
        said = capsys.readouterr().err
        assert (
            said == f"error: judges[1].model: {broken}: is not a GGUF file (it begins with b'hell'); fetch it again\n"
        )
    assert main(["steer", "fit", str(run_file(tmp_path, steer={"embedder": role}))]) == 1
    assert capsys.readouterr().err.startswith(f"error: steer.embedder.model: {broken}: is not a GGUF file")
    assert not (tmp_path / "run").exists()


def test_a_model_that_is_converted_is_said_once_and_needs_no_torch(tmp_path: Path) -> None:
    role = ModelConfig(model=str(write_gguf(tmp_path / "model.gguf")))
    folder = role.path
    code = (
        "import sys; from cpt_ray import config; from cpt_ray.engines import roles; "
        "role = config.ModelConfig(model=sys.argv[1]); "
        "roles.convert_models({'writer': role, 'judge': role}); print(role.path, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, role.model], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"model: {role.model}: converted before, in {folder}\n{folder} False\n"


def test_a_folder_of_gguf_files_is_answered_with_the_file_to_give(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as refusal:
        roles.convert_models({"writer": ModelConfig(model=str(tmp_path))})
    expected = f"give the file: {tmp_path}/a.gguf (one of 2 there)"
    assert str(refusal.value) == f"writer.model: {tmp_path}: has no config.json but GGUF files; {expected}"
