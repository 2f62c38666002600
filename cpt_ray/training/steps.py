"""From rows to optimizer steps: which rows are in a step, which worker runs them, and at which learning rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from cpt_ray.logprobs.rows import Row, num_tokens
from cpt_ray.training.row_making import steps_per_epoch


def rate_share(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the learning rate at a step, from 0: 1/n, 2/n ... 1 over n steps of warm-up, then linearly towards 0.

    transformers' own schedule begins at 0, so that its first step, and all of a training of one step, learns nothing.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return max(0.0, (num_steps - step) / (num_steps - num_warmup))


@dataclass(frozen=True)
class StepPlan:
    """How many rows go where: `num_steps` optimizer steps of an epoch, whatever the number of workers."""

    num_rows: int
    num_steps: int
    num_batches: int
    """Batches per step and worker."""

    @classmethod
    def make(cls, num_pairs: Sequence[int], step_pairs: int, batch_pairs: int, num_workers: int) -> StepPlan:
        """`num_pairs` of each row; about `step_pairs` in a step of all workers, at most `batch_pairs` in a batch."""
        num_rows, num_steps = len(num_pairs), steps_per_epoch(sum(num_pairs), step_pairs)
        if num_rows // num_steps < num_workers:
            raise ValueError(
                f"{num_rows} rows in {num_steps} steps are too few for {num_workers} workers: fewer workers or a "
                "larger batch size"
            )
        batch_rows = max(1, batch_pairs // max(num_pairs))
        wanted = math.ceil(math.ceil(num_rows / num_steps) / (num_workers * batch_rows))
        return cls(num_rows, num_steps, min(wanted, num_rows // num_steps // num_workers))


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """One worker's batches: a new random order of grids per epoch, cut into steps, each dealt out like cards.

    A grid's rows stay together: in a step with all of them, each answer is chosen as often as it is rejected, so what
    is the same under every directive cancels out. Within a step, rows are dealt in the order of their lengths, so that
    batches which run at the same time are of like sizes. What is in a step depends on seed and epoch alone: not on
    the number of workers, nor on restarts.
    """

    def __init__(
        self, rows: Sequence[Row], plan: StepPlan, rank: int, num_workers: int, seed: int, epoch: Callable[[], int]
    ):
        self.plan, self.rank, self.num_workers, self.seed, self.epoch = plan, rank, num_workers, seed, epoch
        self._lengths = [num_tokens(row) for row in rows]
        grids: dict[str, list[int]] = defaultdict(list)
        for at, row in enumerate(rows):
            grids[row["cell_id"] or f"row {at}"].append(at)
        self._grids = list(grids.values())

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.seed + self.epoch())
        grids: list[int] = torch.randperm(len(self._grids), generator=random).tolist()
        order = [row for at in grids for row in self._grids[at]]
        size = self.plan.num_batches * self.num_workers
        for step in range(self.plan.num_steps):
            cut = [at * self.plan.num_rows // self.plan.num_steps for at in (step, step + 1)]
            hands: list[list[int]] = [[] for _ in range(size)]
            for at, row in enumerate(sorted(order[slice(*cut)], key=lambda row: (-self._lengths[row], row))):
                turn, place = divmod(at, size)
                hands[place if turn % 2 == 0 else size - 1 - place].append(row)
            yield from hands[self.rank :: self.num_workers]
