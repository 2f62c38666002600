"""Two made-up worlds of two kinds of users, in which the best possible accuracy is known in closed form.

A context pair tells the kinds apart exactly if they disagree on it, which happens with probability c. After k pairs the
kind is unknown with probability (1 - c)^k, and then half of the conflicting target pairs are got wrong:

    accuracy(k) = 1 - (1 - c)^k / 2        on conflicting targets
                = 1 - c (1 - c)^k / 2      on all targets
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


class World(Protocol):
    """Answers as vectors, and two kinds of users who compare them."""

    @property
    def conflict(self) -> float:
        """Probability that the kinds disagree on a random pair."""
        ...

    def pairs(self, rng: np.random.Generator, count: int) -> Floats:
        """[count, 2, dimensions]."""
        ...

    def reward(self, answers: Floats, kind: int) -> Floats:
        """[...] of answers [..., dimensions], for users of kind 0 or 1."""
        ...


@dataclass(frozen=True)
class WorldA:
    """y uniform in [0, 1]; both kinds like a larger y up to 0.5, above it one likes 2y and the other 1 - y."""

    conflict: float = 0.5

    def pairs(self, rng: np.random.Generator, count: int) -> Floats:
        """[count, 2, 1]."""
        return rng.uniform(size=(count, 2, 1))

    def reward(self, answers: Floats, kind: int) -> Floats:
        """r(y)."""
        y = answers[..., 0]
        return np.where(y <= 0.5, y, 1 - y if kind else 2 * y)


@dataclass(frozen=True)
class WorldB:
    """y = (h0, h1), normal with correlation `rho`; users of kind k like a larger h_k."""

    rho: float

    @property
    def conflict(self) -> float:
        """P(the two differences have opposite signs), by the orthant probability of a bivariate normal."""
        return 0.5 - math.asin(self.rho) / math.pi

    def pairs(self, rng: np.random.Generator, count: int) -> Floats:
        """[count, 2, 2]."""
        first, other = rng.standard_normal((2, count, 2))
        return np.stack([first, self.rho * first + math.sqrt(1 - self.rho**2) * other], axis=-1)

    def reward(self, answers: Floats, kind: int) -> Floats:
        """h_kind."""
        return answers[..., kind]


def best_accuracy(world: World, num_choices: int, conflicting: bool = False) -> float:
    """The accuracy that no model can pass after that many context pairs, on all target pairs or conflicting ones."""
    unknown = (1 - world.conflict) ** num_choices
    return 1 - unknown / 2 * (1 if conflicting else world.conflict)


def tasks(
    world: World,
    rng: np.random.Generator,
    num_users: int,
    num_choices: int,
    num_targets: int,
    conflicting: bool = False,
) -> tuple[Floats, Floats]:
    """Choices of users, preferred answers first: one of each kind on the same pairs, so that each task has its twin.

    Args:
        num_users: of each kind.
        conflicting: target pairs only where the kinds disagree.

    Returns:
        context: [2 * users, choices, 2, dimensions]. targets: [2 * users, targets, 2, dimensions].
    """
    context = world.pairs(rng, num_users * num_choices)
    targets = world.pairs(rng, num_users * num_targets)
    while conflicting:
        same = _prefers_second(world, targets, 0) == _prefers_second(world, targets, 1)
        if not same.any():
            break
        targets[same] = world.pairs(rng, int(same.sum()))
    return _by_both(world, context, num_users), _by_both(world, targets, num_users)


def _prefers_second(world: World, pairs: Floats, kind: int) -> NDArray[np.bool_]:
    rewards = world.reward(pairs, kind)
    second: NDArray[np.bool_] = rewards[:, 1] > rewards[:, 0]
    return second


def _by_both(world: World, pairs: Floats, num_users: int) -> Floats:
    """The pairs [users * n, 2, d] as each kind orders them, [2 * users, n, 2, d]."""
    ordered = [np.where(_prefers_second(world, pairs, kind)[:, None, None], pairs[:, ::-1], pairs) for kind in (0, 1)]
    return np.concatenate([one.reshape(num_users, -1, *pairs.shape[1:]) for one in ordered])
