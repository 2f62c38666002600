"""`cpt steer` on real parts: Ray Data, Ray Train and the vLLM engine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_ray.cli import main
from cpt_ray.cluster import connected
from cpt_ray.config import ModelConfig
from cpt_ray.evaluation.figures import steering_figure
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.steering.scoring import answer_tokens
from cpt_ray.tables.rundir import CATALOG_FILE, RunDir
from tests import toy
from tests.builders import LEVELS, make_directives, make_rubric, rubric_dict
from tests.tiny_model import make_tiny_model

ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 50_000_000,
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for all commands of this file."""
    with connected():
        yield


def run_file(folder: Path, **sections: object) -> str:
    """A run file with one rubric, whose data are answers of that rubric's three levels and their grades."""
    rng = Random(0)
    words = dict(
        zip(LEVELS, (["drab", "grey", "dull"], ["plain", "fair", "even"], ["vivid", "rich", "bright"]), strict=True)
    )
    rows = []
    for at in range(60):
        answers = [
            {"text": f"A {rng.choice(words[level])} and {rng.choice(words[level])} day.", "grade": 10 + 40 * number}
            for number, level in enumerate(LEVELS)
            for _ in range(2)
        ]
        rows.append({"prompt": f"Write about day {at}.", "answers": answers})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "ornament.yaml").write_text(yaml.safe_dump(rubric_dict()), encoding="utf-8")
    role = {"model": str(toy.MODEL), "engine": ENGINE}
    content = {
        "name": "test",
        "run_dir": str(folder / "run"),
        "rubrics": [str(folder / "ornament.yaml")],
        "prompts": {"source": str(folder / "data.jsonl"), "held_out": 0.3},
        "writer": role,
        "policy": role,
        "steer": {},
    } | sections
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(content))), encoding="utf-8")
    return str(path)


STEER = {
    "answers": {"list": "answers", "text": "text", "scores": {"ornament": "grade"}, "scale": [10, 90]},
    "kinds": ["high", "low"],
    "conflicting": 1.0,
    "users": 40,
    "test_users": 20,
    "choices": 3,
    "targets": 8,
    "size": 32,
    "steps": 60,
    "learning_rate": 3e-3,
    "batch_users": 8,
    "seeds": 2,
    "forms": ["gated_lora"],
    "policy_steps": 12,
    "embedder": {"model": str(toy.MODEL)},
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["steer.learning_rate", "steer.policy_learning_rate"])
def test_a_training_that_runs_away_ends_with_the_step_and_what_to_lower(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], setting: str
) -> None:
    path, run = run_file(tmp_path, steer=STEER | {"seeds": 1}), RunDir(tmp_path / "run")
    make_tiny_model(run.model)
    assert main(["steer", "fit", path, f"{setting}=1e30"]) == 1
    kind = "np-btl 0" if setting == "steer.learning_rate" else "gated_lora"
    steps = STEER["steps"] if setting == "steer.learning_rate" else STEER["policy_steps"]
    told = capsys.readouterr()
    assert re.search(rf"error: steer: {kind}: step \d+ of {steps}: .* not finite numbers; lower {setting}\n", told.err)
    assert not list(run.path.rglob(f"{kind.partition(' ')[0]}-0.safetensors"))
    assert re.search(r"steer users +40/40 users", told.out)
    assert "steer np-btl" in told.out


@pytest.mark.slow
def test_reward_models_learn_users_from_embeddings_and_are_not_trained_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run_file(tmp_path, steer=STEER)
    run = RunDir(tmp_path / "run")
    make_tiny_model(run.model)
    assert main(["steer", "fit", path]) == 0
    said = capsys.readouterr().out
    for stage, total, unit in (("users", 40, "users"), ("np-btl", 4 * 60, "steps"), ("gated_lora", 12, "steps")):
        assert re.search(rf"steer {stage} +{total}/{total} {unit}, .*", said), said
    (policy,) = run.path.rglob("gated_lora-0.safetensors")
    assert json.loads(policy.with_suffix(".json").read_text())["loss"] < 0.75
    found = run.read_json("report/steering.json")
    assert found["counts"] == [0, 1, 3]
    learned, static = (found["accuracy"][name]["mean"] for name in ("NP-BTL", "static"))
    assert static == pytest.approx([0.5] * 3, abs=0.05)
    assert learned[0] == pytest.approx(0.5, abs=0.05)
    assert learned[2] > 0.8
    assert found["accuracy"]["NP-BTL"]["ci"][2][0] > 0.6
    for kind in found["accuracy"]["NP-BTL"]["per_kind"].values():
        assert kind[2] > 0.6
    assert "<svg" in steering_figure("accuracy", found)

    def made() -> dict[Path, int]:
        return {one: one.stat().st_mtime_ns for end in ("parquet", "safetensors") for one in run.path.rglob(f"*.{end}")}

    before = made()
    assert len(before) >= 6
    capsys.readouterr()
    assert main(["steer", "fit", path]) == 0
    assert made() == before
    assert run.read_json("report/steering.json") == found


def test_choices_in_a_file_become_a_belief(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run_file(tmp_path)
    run = RunDir(tmp_path / "run")
    make_tiny_model(run.model)
    run.write_json(CATALOG_FILE, Catalog.build([make_rubric()], make_directives()).to_json())
    choices = tmp_path / "choices.jsonl"
    rows = [{"prompt": "Write.", "chosen": "A high day.", "rejected": "A low day."}] * 2
    choices.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert main(["steer", "infer", path, "--choices", str(choices)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["num_choices"] == 1  # the same one twice
    assert set(found["probabilities"]["ornament"]) == set(LEVELS)
    assert found["question"] is None
    assert found["configuration"] is None
    choices.write_text('{"prompt": "Write.", "chosen": 1, "rejected": "b"}\n', encoding="utf-8")
    assert main(["steer", "infer", path, "--choices", str(choices)]) == 1
    assert "choices.jsonl[0].chosen" in capsys.readouterr().err


def test_the_engine_and_transformers_agree_on_log_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from cpt_ray.steering.scoring import PolicyScorer

    asked = [(directive, "Write about the harbor at dawn.", text) for directive in (None, "Use fancy words.")
             for text in ("The old harbor feels glad.", "A merry bell.")]  # fmt: skip
    found = PolicyScorer(ModelConfig(model=str(toy.MODEL), engine=ENGINE)).logprobs(asked)
    model = AutoModelForCausalLM.from_pretrained(toy.MODEL, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(toy.MODEL)
    for one, value in zip(asked, found, strict=True):
        ids, start = answer_tokens(tokenizer, *one, {})
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits.log_softmax(dim=-1)[0]
        wanted = sum(float(logps[at - 1, ids[at]]) for at in range(start, len(ids)))
        assert value == pytest.approx(wanted, abs=1e-2)
