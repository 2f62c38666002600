"""What a changed setting does again: the table of "Upgrades and changes" in jobs/operating.md, row for row."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from cpt_ray.cli import main
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RunDir
from tests.golden_run import RecordingEngine, places, write_run_file

MADE_BY = {
    "direct": "directives",
    "write": "generations",
    "judge": "grades",
    "pair": "pairs",
    "evaluate": "evaluation_answers",
}
TRAINED = {"train", "evaluate"}
JUDGED = {"judge", "pair", *TRAINED}
SPEEDS = ("max_num_seqs=8", "gpu_memory_utilization=0.5", "tensor_parallel_size=2")
CHANGES: list[tuple[list[str], set[str]]] = [
    (["name=other", "writer.price.generated=2", "serve.port=9000"], set()),
    (["evaluate.trained_directives=0"], {"evaluate"}),
    (["policy.sampling.temperature=0.3"], {"evaluate"}),
    (["writer.num_actors=3", "writer.num_cpus=2", "writer.num_gpus=1", "policy.num_actors=3"], set()),
    ([f"{role}.engine.{speed}" for role in ("writer", "policy") for speed in SPEEDS], set()),
    (["train.num_workers=2", "train.sharding=fsdp", "train.use_gpu=true", "train.save_steps=7"], set()),
    (["train.checkpoints=/elsewhere"], set()),
    (["train.beta=0.2"], TRAINED),
    (["train.max_pairs=4"], TRAINED),
    (["writer.sampling.temperature=0.3"], {"direct", "write", *JUDGED}),
    (["writer.engine.max_model_len=900"], {"direct", "write", *JUDGED}),
    (["writer.model=another"], {"direct", "write", *JUDGED}),
    (["seed=4"], {"direct", "write", *JUDGED}),
    (["synthesis.samples=3"], {"write", *JUDGED}),
    (["synthesis.shard_rows=24"], {"write", *JUDGED}),
    (["prompts.held_out=0.6"], {"write", *JUDGED}),
    (["rubrics=[mood.yaml]"], {"write", *JUDGED}),
    (["synthesis.near_duplicates=null"], {"pair", *TRAINED}),
    (["synthesis.margin=0.2"], {"write", *JUDGED}),
    (["synthesis.grids=2"], {"write", *JUDGED}),
    (["synthesis.max_length_ratio=2"], {"pair", *TRAINED}),
    (["synthesis.offset={ornament: {mood: -1}}"], {"pair", *TRAINED}),
]
"""Overrides, and the stages that then make something new."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a finished run."""
    made = tmp_path_factory.mktemp("upgrades")
    write_run_file(made, "run", ("ornament", "mood"))
    for name in ("run", "controlled"):
        do_run(made, made / name, *control_of(name))
    return made


def control_of(name: str) -> list[str]:
    """Whether the policy writes answers of its own."""
    return ["synthesis.control=0.5" if name == "controlled" else "synthesis.control=0"]


def do_run(folder: Path, run_dir: Path, *overrides: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for place, value in places(RecordingEngine(), []).items():
            patch.setattr(f"cpt_ray.{place}", value)
        assert main(["run", str(folder / "run.yaml"), f"run_dir={run_dir}", *overrides]) == 0


def names(path: Path) -> dict[str, set[str]]:
    """What each stage has made."""
    run = RunDir(path)
    mark = run.read_json(MODEL_INFO_FILE)
    return {"train": {mark["key"]}} | {stage: set(run.names(table)) for stage, table in MADE_BY.items()}


@pytest.mark.parametrize(("overrides", "stages"), CHANGES, ids=[" ".join(overrides) for overrides, _ in CHANGES])
def test_a_change_in_a_run_that_was_moved_does_again_what_depends_on_it(
    overrides: list[str], stages: set[str], folder: Path, tmp_path: Path
) -> None:
    assert redone(folder, "run", tmp_path, overrides) == stages


def test_where_the_policy_writes_control_answers_its_sampling_changes_them(folder: Path, tmp_path: Path) -> None:
    assert redone(folder, "controlled", tmp_path, ["policy.sampling.temperature=0.3"]) == {"write", *JUDGED}


def redone(folder: Path, name: str, tmp_path: Path, overrides: list[str]) -> set[str]:
    """The stages that make something new in a copy of a run."""
    moved = Path(shutil.copytree(folder / name, tmp_path / "moved"))
    before = names(moved)
    do_run(folder, moved, *control_of(name), *overrides)
    after = names(moved)
    return {stage for stage in after if after[stage] - before[stage]}
