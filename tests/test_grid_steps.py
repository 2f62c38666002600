"""Steps of the grid trainer are TRL's steps, whatever the micro-batches and workers, and each row is in one of them."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor
from trl import DPOTrainer

from cpt_ray.training.steps import StepBatches, StepPlan
from cpt_ray.training.trl_trainer import UNMEASURED, GridTrainer
from tests.tiny_model import make_tiny_model
from tests.trl_trainers import all_pairs, assert_same, make_pairs, make_trainer, train

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen")


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy"))


@pytest.mark.parametrize("micro_batch", [1, 8])
def test_a_step_is_trls_step_on_all_its_pairs_whatever_the_micro_batches(policy: Path, micro_batch: int) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    found = train(GridTrainer, policy, all_pairs(), per_device_train_batch_size=micro_batch)
    assert_same(found.gradients, wanted.gradients)
    assert [found.logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)
    assert set(wanted.logs) - set(found.logs) == set(UNMEASURED)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_workers_take_trls_step_on_all_their_pairs(policy: Path, tmp_path: Path, sharding: str) -> None:
    wanted = train(DPOTrainer, policy, all_pairs())
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    context = multiprocessing.get_context("spawn")  # a fork of a process that has had threads may hang
    workers = [
        context.Process(target=_work, args=(rank, port, policy, tmp_path, sharding), daemon=True) for rank in (0, 1)
    ]
    for one in workers:
        one.start()
    for one in workers:
        one.join(timeout=120)
    assert [one.exitcode for one in workers] == [0, 0]
    assert_same(torch.load(tmp_path / "gradients.pt"), wanted.gradients)
    logs = json.loads((tmp_path / "logs.json").read_text(encoding="utf-8"))
    assert [logs[one] for one in METRICS] == pytest.approx([wanted.logs[one] for one in METRICS], abs=1e-4)


def _work(rank: int, port: int, policy: Path, folder: Path, sharding: str) -> None:
    """One of two workers, one or two rows at a time."""
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in settings.items()})
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    how = {"distributed_config": {"fsdp_size": 2}} if sharding == "fsdp" else {}
    kept = train(GridTrainer, policy, all_pairs(), per_device_train_batch_size=1, model_init_kwargs=how)
    frozen = [one for one in kept.model.parameters() if not one.requires_grad]
    assert any(isinstance(one, DTensor) for one in frozen) is (sharding == "fsdp")
    if rank == 0:
        torch.save(kept.gradients, folder / "gradients.pt")
        (folder / "logs.json").write_text(json.dumps(kept.logs), encoding="utf-8")
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that ends in the usual way, which is not what is tested


def test_a_whole_training_ends_with_trls_weights(policy: Path) -> None:
    """Six steps of one pair each, in the grid trainer's order, with AdamW, clipping and a schedule."""
    pairs = [one for cell in "abc" for one in make_pairs(cell, 2)]
    settings = {"learning_rate": 1e-3, "max_steps": 6, "max_grad_norm": 1.0, "per_device_train_batch_size": 1}
    trainer = make_trainer(GridTrainer, policy, True, pairs, {"step_pairs": 1}, **settings)
    order = [row for batch in trainer.get_train_dataloader().batch_sampler for row in batch]
    ordered = [pairs[row] for row in order]
    settings |= {"train_sampling_strategy": "sequential"}
    reference = make_trainer(DPOTrainer, policy, True, ordered, **settings)
    trainer.train()
    reference.train()
    wanted = dict(reference.model.named_parameters())
    for name, value in trainer.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-4, rtol=1e-4)
    assert sorted(order) == list(range(6)) != order


def test_gradient_checkpointing_changes_nothing(policy: Path) -> None:
    plain, saved = (
        train(GridTrainer, policy, all_pairs(), gradient_checkpointing=one).gradients for one in (False, True)
    )
    assert_same(saved, plain)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_steps_are_the_same_for_any_number_of_workers_and_hold_each_row_once(num_workers: int) -> None:
    rows: Any = [{"cell_id": str(at // 3), "prompt": [0] * at, "answers": [[0]]} for at in range(102)]

    def steps(workers: int, epoch: int = 0) -> list[list[int]]:
        plan = StepPlan.make([2] * 102, step_pairs=16, batch_pairs=4, num_workers=workers)
        assert plan.num_steps == 12
        each = [list(StepBatches(rows, plan, rank, workers, 1, lambda: epoch)) for rank in range(workers)]
        assert all(0 < len(batch) <= 3 for one in each for batch in one)
        size = plan.num_batches
        return [
            sorted(row for one in each for batch in one[at : at + size] for row in batch)
            for at in range(0, 12 * size, size)
        ]

    found = steps(num_workers)
    assert sorted(row for step in found for row in step) == list(range(102))
    assert {len(step) for step in found} == {8, 9}
    assert found == steps(1)
    assert found != steps(num_workers, epoch=1)
    split = [cell for cell in range(34) if sum(3 * cell in step or 3 * cell + 2 in step for step in found) > 1]
    assert len(split) <= 11  # by one of the cuts between 12 steps


def test_too_few_rows_for_the_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="too few for 3 workers"):
        StepPlan.make([4] * 4, step_pairs=8, batch_pairs=4, num_workers=3)


def test_a_resumed_training_ends_with_the_same_weights(policy: Path) -> None:
    pairs = [one for name in "abc" for one in make_pairs(name, 2)]
    settings: dict[str, Any] = {"per_device_train_batch_size": 1, "learning_rate": 1e-3, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 4}
    whole, resumed = (make_trainer(GridTrainer, policy, True, pairs, {"step_pairs": 2}, **settings) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(policy / "out" / "checkpoint-4"))
    wanted = dict(whole.model.named_parameters())
    for name, value in resumed.model.named_parameters():
        torch.testing.assert_close(value, wanted[name], atol=1e-6, rtol=0)
