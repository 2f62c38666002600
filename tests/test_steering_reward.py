"""NP-BTL against worlds whose best possible accuracy is known in closed form."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from cpt_ray.engines.ray_train import read_progress
from cpt_ray.errors import UserError
from cpt_ray.steering import fitting
from cpt_ray.steering.fitting import PROGRESS, Reporter
from cpt_ray.steering.reward import RewardModel, Tasks, accuracy, train_loop
from cpt_ray.tables.address import StoreError
from jobs.benchmarks.steering import World, WorldA, WorldB, best_accuracy, tasks

CHOICES = (0, 1, 3, 5, 10)


def draw(world: World, seed: int, users: int, choices: int, targets: int = 20, conflicting: bool = False) -> Tasks:
    made = tasks(world, np.random.default_rng(seed), users, choices, targets, conflicting)
    return Tasks(*(torch.tensor(one, dtype=torch.float32) for one in made))


def learned(world: World, steps: int, seed: int = 0) -> RewardModel:
    torch.manual_seed(seed)
    model = RewardModel(world.pairs(np.random.default_rng(0), 1).shape[-1], 64)
    train_loop(model, lambda step: draw(world, 1000 * seed + step, 16, (7 * step) % 11), steps, 5e-3)
    return model


def curve(model: RewardModel, tested: Tasks) -> list[float]:
    return [float(accuracy(model, tested.first(count)).mean()) for count in CHOICES]


@pytest.fixture(scope="module")
def model_of_a() -> RewardModel:
    return learned(WorldA(), 300)


def test_the_closed_forms_are_those_of_the_worlds() -> None:
    assert [best_accuracy(WorldA(), count) for count in CHOICES] == [1 - 0.25 * 2.0**-count for count in CHOICES]
    for rho, error in ((-0.7, 0.127), (0, 0.25), (0.7, 0.373)):
        assert 1 - best_accuracy(WorldB(rho), 1, conflicting=True) == pytest.approx(error, abs=5e-4)
    for world in (WorldA(), WorldB(0.7)):
        pairs = world.pairs(np.random.default_rng(0), 100_000)
        orders = [world.reward(pairs, kind)[:, 0] > world.reward(pairs, kind)[:, 1] for kind in (0, 1)]
        assert np.mean(orders[0] != orders[1]) == pytest.approx(world.conflict, abs=0.01)


def test_world_a_is_learned_to_its_bound(model_of_a: RewardModel) -> None:
    found = curve(model_of_a, draw(WorldA(), 99, 500, 10, 40))
    assert 0.73 <= found[0] <= 0.77
    assert found[1] >= 0.83
    assert found[4] >= 0.96
    for count, value in zip(CHOICES, found, strict=True):
        assert value <= best_accuracy(WorldA(), count) + 0.01


@pytest.mark.parametrize("rho", [-0.7, 0.7])
def test_world_b_is_learned_to_its_formula(rho: float) -> None:
    world = WorldB(rho)
    model = learned(world, 300)
    tested = draw(world, 99, 500, 10, 40, conflicting=True)
    found = float(accuracy(model, tested.first(1)).mean())
    assert (
        best_accuracy(world, 1, conflicting=True) - 0.03 <= found <= best_accuracy(world, 1, conflicting=True) + 0.015
    )


def test_choices_are_used_and_another_users_choices_are_not_enough(model_of_a: RewardModel) -> None:
    """On fully conflicting pairs a model that ignores z has accuracies that add up to 1."""
    tested = draw(WorldA(), 99, 500, 10, 40, conflicting=True)
    sums = []
    for count in CHOICES:
        found = accuracy(model_of_a, tested.first(count))
        sums.append(float(found[:500].mean() + found[500:].mean()))
    assert sums[0] == pytest.approx(1, abs=0.02)
    assert all(later > earlier + 0.01 for earlier, later in pairwise(sums))
    assert sums[1] > 1.3
    order = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
    shuffled = accuracy(model_of_a, Tasks(tested.context[order], tested.targets)).mean()
    assert float(shuffled) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("steps", [1, 20])
def test_a_training_that_runs_away_ends_at_the_step_with_what_to_lower(steps: int) -> None:
    model = RewardModel(WorldA().pairs(np.random.default_rng(0), 1).shape[-1], 64)
    reported: list[int] = []
    with pytest.raises(UserError, match=rf"step (\d+) of {steps}: .* not finite numbers; lower steer\.rate") as caught:
        train_loop(
            model, lambda step: draw(WorldA(), step, 4, 2), steps, 1e30, "steer.rate",
            lambda step, loss: reported.append(step),
        )  # fmt: skip
    assert f"step {max(1, len(reported) + (steps > 1))} of" in str(caught.value)


def test_every_step_is_reported_with_its_loss() -> None:
    model, reported = RewardModel(WorldA().pairs(np.random.default_rng(0), 1).shape[-1], 64), []
    losses = train_loop(
        model, lambda step: draw(WorldA(), step, 4, 2), 3, 1e-3, report=lambda *one: reported.append(one)
    )
    assert reported == list(enumerate(losses, start=1))


def test_the_driver_reads_how_far_rank_0_is_and_why_a_training_ended(tmp_path: Path) -> None:
    assert read_progress(tmp_path / PROGRESS) == {}
    Reporter(tmp_path, 1)(3, "of another rank")
    assert read_progress(tmp_path / PROGRESS) == {}
    reporter = Reporter(tmp_path, 0)
    reporter(1, "loss 0.7")
    reporter(2, "within the same second")
    assert read_progress(tmp_path / PROGRESS) == {"done": 1, "note": "loss 0.7"}
    with pytest.raises(UserError, match="lower it"), reporter.failing("film"):
        raise UserError("lower it")
    assert read_progress(tmp_path / PROGRESS) == {"error": "film: lower it"}
    with pytest.raises(UserError, match="film: lower it"):
        Reporter(tmp_path, 0)


def test_a_store_that_is_away_neither_ends_a_fit_by_its_progress_note_nor_forbids_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object, **__: object) -> None:
        raise StoreError("the store does not answer")

    reporter = Reporter(tmp_path, 0)
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "replacing", away)
        reporter(1, "loss 0.7")
    with pytest.raises(StoreError), reporter.failing("film"):
        away()
    assert read_progress(tmp_path / PROGRESS) == {}
    Reporter(tmp_path, 0)


def test_the_order_of_choices_does_not_matter(model_of_a: RewardModel) -> None:
    tested = draw(WorldA(), 5, 8, 6)
    with torch.no_grad():
        margins = [
            model_of_a.margins(Tasks(context, tested.targets)) for context in (tested.context, tested.context.flip(1))
        ]
    torch.testing.assert_close(*margins, atol=1e-5, rtol=1e-4)
    assert (tested.twins().context[:, :, 0] == tested.context[:, :, 1]).all()
