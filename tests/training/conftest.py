"""Ray and a tiny policy for the trainings of this folder.

The files run in alphabetical order. test_twins.py is the first: what it looks for in Ray's stderr gets there only while
the first test is set up, since pytest then takes the file descriptor back.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from cpt_ray.cluster import connected
from cpt_ray.training import stage as training
from cpt_ray.training.worker import work
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="package")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "tiny")


def work_with_a_log(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """`work`, which also writes down which rows each worker group ran in which step."""
    from ray.train.collective import broadcast_from_rank_zero

    from cpt_ray.training import trl_trainer

    log = settings["task"].run.path / "samples.jsonl"
    group = broadcast_from_rank_zero(os.getpid())
    plain_collate, plain_loss = trl_trainer.collate, trl_trainer.GridTrainer.compute_loss

    def collate(rows: Any, **kwargs: Any) -> Any:
        return plain_collate(rows, **kwargs) | {"names": [f"{one['cell_id']}, {one['level']}" for one in rows]}

    def compute_loss(trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        names, step = inputs.pop("names"), trainer.state.global_step + 1
        with log.open("a") as file:
            file.write(json.dumps({"group": group, "step": step, "names": names}) + "\n")
        return plain_loss(trainer, model, inputs, *args, **kwargs)

    trl_trainer.collate, trl_trainer.GridTrainer.compute_loss = collate, compute_loss
    return work(settings)


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray with two CPUs; the file where its stderr goes."""
    log = tmp_path_factory.mktemp("ray") / "stderr.log"
    log.touch()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    os.environ["WANDB_MODE"] = "offline"  # for the workers, which get this environment now
    with connected(log=log), pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "work", work_with_a_log)
        yield log
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
