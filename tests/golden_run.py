"""Every command of a run in this process, for goldens: real stages, with an engine that answers by a function.

`places` is all that knows where in the package Ray, vLLM and training come in.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cpt_ray.cli import main
from cpt_ray.engines.engine import Completion, Request
from cpt_ray.engines.step import Line
from cpt_ray.steering.reward import RewardModel
from cpt_ray.tables.files import replacing
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RunDir
from tests import toy
from tests.builders import LEVELS, rubric_dict

EVERY_LEVEL = [{"name": name, "score": score} for name, score in zip(LEVELS, (10, 50, 90), strict=True)]
LOW_GIVEN = {**EVERY_LEVEL[0], "directives": ["Go low now.", "Go low softly."]}
WORDS, BANGS = rubric_dict()["criteria"]
FEELING = {"name": "feeling", "weight": 100, "descriptors": {name: f"{name} mood" for name in LEVELS}}
BANGS_ALONE = {**BANGS, "weight": 100}
BANGS_SPREAD = {**BANGS_ALONE, "measure": {"name": "exclamation_density", "values": "spread"}}
RUBRICS = {
    "ornament": rubric_dict(levels=[LOW_GIVEN, *EVERY_LEVEL[1:]]),
    "mood": rubric_dict(id="mood", title="Mood", objective="How glad it sounds.", criteria=[FEELING]),
    "gauge": rubric_dict(id="gauge"),
    "pace": rubric_dict(id="pace", title="Pace", criteria=[BANGS_SPREAD]),
    "zest": rubric_dict(id="zest", title="Zest", criteria=[BANGS_ALONE], check={"name": "character_count"}),
}
MODEL = {"model": "fake", "engine": {"dtype": "float32"}, "sampling": {"max_tokens": 20, "stop": ["END"]}}


class RecordingEngine:
    """Keeps what each stage asks of a model; writes what is asked for, and judges by the words in it."""

    def __init__(self) -> None:
        self.stage, self.asked = "", defaultdict[str, list[Request]](list)
        self._times = Counter[str]()

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        time.sleep(0.004)  # else a ledger entry without time has no tokens per second
        self.asked[self.stage] += requests
        return [self._answer(request) for request in requests for _ in range(request.samples)]

    def _answer(self, request: Request) -> Completion:
        system, asked = request.messages[0]["content"], request.messages[-1]["content"]
        titles = re.findall(r"^# (\w+)", system, re.MULTILINE)
        if request.labels or request.json_schema:
            return _verdict(request, next((at for at, name in enumerate(LEVELS) if f"{titles[0]} {name}" in asked), 1))
        self._times[f"{system}/{asked}"] += 1
        thing, times = re.search(r"thing (\d+)\.", asked), self._times[f"{system}/{asked}"]
        if thing is None:
            level = asked.split(" of 3, ")[1].split(".")[0]
            return Completion(text=f"Write the {level} way, {('gently', 'boldly', 'slowly')[times % 3]}.")
        number = int(thing[1]) + times
        directive = re.search(r"\b(low|mid|high)\b", system)
        levels = re.findall(r"Target level: \d of 3, (\w+)", asked)
        if not levels:  # the policy, or a writer without a rubric
            titles, levels = ["Ornament", "Mood"], 2 * [directive[0] if directive else LEVELS[number % 3]]
        elif thing[1] == "4":  # a prompt whose levels are missing after the first pass
            levels = ["low", *levels[1:]]
        bangs = 2 * LEVELS.index(levels[0]) if directive else number % 5
        said = " ".join(f"{title} {level}" for title, level in zip(titles, levels, strict=True))
        marks = "!" * bangs + "." * (4 - bangs)
        text = " ".join(part + mark for part, mark in zip((f"{said} {thing[1]}{times}", *"BCD"), marks, strict=True))
        return Completion(text=text, num_prompt_tokens=50, num_tokens=8)


def _verdict(request: Request, level: int) -> Completion:
    if request.json_schema is None:
        return Completion(label_logprobs=tuple(0.0 if at == level else -math.inf for at in range(3)))
    verdict = {"reason": "So it is.", "level": level + 1}
    return Completion(text=json.dumps(dict.fromkeys(request.json_schema["required"], verdict)), num_tokens=9)


class KnownModel:
    """Log-probabilities and embeddings that are whole numbers, so that sums of them are exact."""

    num_tokens = 0

    def __init__(self, model: Any, settings: Any = None):
        pass

    def run(self, rows: Sequence[Any]) -> list[list[float]]:
        return [[-float(len(ids)) for ids in row["answers"]] for row in rows]

    def logprobs(self, asked: Sequence[tuple[str | None, str, str]]) -> list[float]:
        return [-10.0 - len(directive or "") % 7 - len(answer) % 5 for directive, _, answer in asked]

    def embed(self, texts: Sequence[tuple[str, str]]) -> list[list[float]]:
        return [[float(answer.count("!")), len(answer) % 3, len(prompt) % 2, 1, 0, 2] for prompt, answer in texts]


def run_pool(engine: RecordingEngine, run: RunDir, lines: Sequence[Line], open_engine: Any, map_shards: Any) -> None:
    """In the place of a pool of actors: says before each step which stage asks."""
    for line in lines:
        for shard in line.shards:
            for step in line.steps:
                output, engine.stage = step.output(shard), step.stage
                if not run.has(step.table, output):
                    step.wait(run)
                    step(open_engine(step.model) if open_engine else engine, run, shard)
                shard = output


def _train(config: Any, run: RunDir, pairs: Any, key: str, **_: Any) -> None:
    """A tuned model that is never loaded: a tokenizer, and the mark."""
    for path in toy.MODEL.iterdir():
        if path.suffix != ".safetensors":
            with replacing(run.model / path.name, sync=False) as file:
                file.write(path.read_bytes())
    run.write_json(MODEL_INFO_FILE, {"key": key, "summary": {}})


def _train_rewards(fits: list[Any], kinds: Sequence[Any], data: Any) -> None:
    """Trains nothing; notes in `fits` what should have been trained."""
    fits.extend(kinds)
    torch.manual_seed(0)


def _untrained(fit: Any, embedding: int) -> list[RewardModel]:
    return [RewardModel(embedding, fit.config.size) for _ in range(fit.seeds)]


def places(engine: RecordingEngine, fits: list[Any]) -> dict[str, Any]:
    """What stands in for Ray, vLLM and training, by its place in the package."""
    return {
        "engines.pool._run_pool": functools.partial(run_pool, engine),
        "pipeline.connected": lambda *_, **__: contextlib.nullcontext(),
        "pipeline._check_room": lambda *_: None,
        "training.stage.train": _train,
        "logprobs.reference.ReferenceModel": KnownModel,
        "steering.actors.VllmEngine": lambda model: engine,
        "steering.actors.PolicyScorer": KnownModel,
        "steering.actors.Embedder": KnownModel,
        "steering.stage.train_missing": functools.partial(_train_rewards, fits),
        "steering.stage.load_reward_models": _untrained,
    }


def write_run_file(folder: Path, name: str, rubrics: Sequence[str], **changes: Any) -> str:
    """A run of 10 prompts with control answers and a second judge, who gives rationales."""
    for rubric in (*rubrics, "gauge"):
        (folder / f"{rubric}.yaml").write_text(json.dumps(RUBRICS[rubric]), encoding="utf-8")
    rows = [json.dumps({"prompt": f"Write about thing {at}."}) for at in range(1, 11)]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    synthesis = {"samples": 2, "paraphrases": 3, "shard_rows": 48, "control": 0.5, "near_duplicates": 0.99}
    steer = {"users": 8, "test_users": 8, "choices": 3, "targets": 4, "size": 8, "seeds": 2, "samples": 1, "best_of": 2}
    content = {
        "name": "t",
        "run_dir": str(folder / name),
        "rubrics": [str(folder / f"{rubric}.yaml") for rubric in rubrics],
        "prompts": {"source": str(folder / "prompts.jsonl"), "held_out": 0.4},
        "writer": {**MODEL, "price": {"generated": 1}},
        "policy": {**MODEL, "model": str(toy.MODEL)},
        "judges": [{**MODEL, "mode": "rationale", "votes": 2}],
        "synthesis": synthesis | changes,
        "train": {"dtype": "float32"},
        "evaluate": {"trained_directives": 1, "judge_check": str(folder / "gauge.yaml"), "bootstrap": 20},
        "steer": steer | {"forms": [], "kinds": ["high", "low", "mixture"]},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


@dataclass(frozen=True)
class Made:
    """What is left of the commands."""

    runs: dict[str, RunDir]
    """"levels": two rubrics, also combined; "bare": a writer without a rubric, measures alone, levels by spread."""
    asked: dict[str, dict[str, list[Request]]]
    """By run and stage."""
    fits: list[Any]
    """Reward models that should have been trained."""
    hashed: dict[str, str]
    """The first 12 digits of every id, key and shard's hash, to the JSON that it is the hash of."""


def make_runs(folder: Path) -> Made:
    """synthesize, train, evaluate; and, of "levels", steer."""
    files = {
        "levels": write_run_file(folder, "levels", ("ornament", "mood"), combine=[["ornament", "mood"]]),
        "bare": write_run_file(folder, "bare", ("pace", "zest"), ask="prompt", first_pass=4, samples=6),
    }
    made = Made({name: RunDir(folder / name) for name in files}, {}, [], {})

    def dumps(parts: Any, **options: Any) -> str:
        text = json.dumps(parts, **options)
        made.hashed[hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]] = text
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)  # where no folder has a model's name
        patch.setattr(
            "cpt_ray.tables.records.json", SimpleNamespace(dumps=dumps)
        )  # of `content_id`, wherever it is called
        for name, path in files.items():
            engine = RecordingEngine()
            for place, value in places(engine, made.fits).items():
                patch.setattr(f"cpt_ray.{place}", value)
            for command in (["synthesize"], ["train"], ["evaluate"], *([["steer", "evaluate"]] * (name == "levels"))):
                assert main([*command, path]) == 0
            made.asked[name] = engine.asked
    return made
