"""How fast choices become a configuration or an adapter, and how well the reward model learns worlds of known bounds.

python jobs/benchmarks/steering.py [--users 10000] [--model FOLDER]     needs no run; one core

Prints, for that many simulated users of ten choices each: users/s from margins to a belief, from choices to z, and
from z to a folded adapter on the disk; bytes per user of each; and, for the worlds, accuracy against its bound.
`--engine` also has a vLLM engine score choices, and answer under many users' adapters: popular ones, and each once.

The worlds: two made-up ones of two kinds of users, in which the best possible accuracy is known in closed form.

A context pair tells the kinds apart exactly if they disagree on it, which happens with probability c. After k pairs the
kind is unknown with probability (1 - c)^k, and then half of the conflicting target pairs are got wrong:

    accuracy(k) = 1 - (1 - c)^k / 2        on conflicting targets
                = 1 - c (1 - c)^k / 2      on all targets
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cpt_ray.config import ModelConfig
from cpt_ray.rubrics.catalog import Catalog, CatalogLevel, CatalogRubric
from cpt_ray.steering.choices import Choice, PreferenceState
from cpt_ray.steering.inference import Candidates
from cpt_ray.steering.policy import RANK, ConditionalPolicy
from cpt_ray.steering.reward import RewardModel, Tasks, accuracy, train_loop
from cpt_ray.tables.records import SteeredAnswer

COUNTS = (0, 1, 3, 5, 10)
TOY = Path(__file__).parents[2] / "tests" / "toy" / "model"
KEPT = 500
"""Folded adapters that stay on the disk."""
Floats = NDArray[np.float64]


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


World = WorldA | WorldB
"""Answers as vectors, and two kinds of users who compare them; `conflict`: how often they disagree on a random pair."""


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


# ---------------------------------------------------------------- what is measured


def worlds(steps: int) -> None:
    """Accuracy of NP-BTL, mean over three seeds, against the bound."""
    for world in (WorldA(), WorldB(-0.7), WorldB(0.0), WorldB(0.7)):
        start = time.monotonic()
        accuracies = np.mean([_learned(world, steps, seed) for seed in range(3)], axis=0)
        bounds = [best_accuracy(world, count, conflicting=True) for count in COUNTS]
        seconds = (time.monotonic() - start) / 3
        print(f"{world}, conflicting targets, {steps} steps, {seconds:.0f} s a model")
        print("  choices " + " ".join(f"{count:6d}" for count in COUNTS))
        print("  found   " + " ".join(f"{100 * value:6.1f}" for value in accuracies))
        print("  bound   " + " ".join(f"{100 * value:6.1f}" for value in bounds), flush=True)


def _learned(world: World, steps: int, seed: int) -> list[float]:
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = RewardModel(world.pairs(rng, 1).shape[-1], 128)

    def draw(step: int) -> Tasks:
        made = tasks(world, rng, 16, int(rng.integers(11)), 20)
        return Tasks(*(torch.tensor(one, dtype=torch.float32) for one in made))

    train_loop(model, draw, steps, 3e-3)
    made = tasks(world, np.random.default_rng(10**6 + seed), 500, 10, 40, conflicting=True)
    tried = Tasks(*(torch.tensor(one, dtype=torch.float32) for one in made))
    return [float(accuracy(model, tried.first(count)).mean()) for count in COUNTS]


def catalog(num_rubrics: int) -> Catalog:
    """Rubrics of five levels."""
    rubrics = tuple(
        CatalogRubric(
            id=f"rubric-{name}",
            title="",
            version=1,
            objective="",
            levels=tuple(
                CatalogLevel(name=f"level-{at}", score=10.0 + 20 * at, directive=f"{name} {at}", directive_id="")
                for at in range(5)
            ),
        )
        for name in range(num_rubrics)
    )
    return Catalog(rubrics)


def beliefs(num_users: int, num_rubrics: int) -> None:
    """Margins to beliefs, with choices kept as a server would keep them."""
    candidates = Candidates(catalog(num_rubrics), beta=0.1)
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 3, size=(num_users, 10, 5 * num_rubrics))
    start = time.monotonic()
    for one in margins:
        candidates.belief(one)
    seconds = time.monotonic() - start
    text = "w" * 300
    state = PreferenceState(
        choices=[Choice(prompt=text[:60], chosen=text, rejected=text)] * 10,
        margins=[tuple(round(float(one), 2) for one in row) for row in margins[0]],
    )
    print(
        f"belief: {num_rubrics} rubrics, {len(candidates.configurations)} configurations: {num_users / seconds:.0f} "
        f"users/s; a state of 10 choices of 300 characters is {len(json.dumps(state.to_json()))} bytes, "
        f"without the texts {len(json.dumps(state.margins))}"
    )


def scoring(model: str, num_choices: int = 200) -> None:
    """Choices that no margins are known of, through an engine: two answers under every directive."""
    from cpt_ray.steering.scoring import PolicyScorer

    engine = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 128}
    scorer, candidates = PolicyScorer(ModelConfig(model=model, engine=engine)), Candidates(catalog(2), beta=0.1)
    text = "The old harbor wakes and the boats go out over the quiet sea. "
    choices = [Choice(prompt=f"Write about day {at}.", chosen=3 * text, rejected=2 * text) for at in range(num_choices)]
    candidates.score(scorer, choices[:5])
    start = time.monotonic()
    candidates.score(scorer, choices[5:])
    seconds = time.monotonic() - start
    print(f"scoring: {len(choices[5:]) / seconds:.1f} choices/s under {len(candidates.directives)} directives")


def adapters(num_users: int, model: str, served: bool) -> None:
    """Choices to z, z to folded adapters; their cache in an engine."""
    from transformers import AutoModelForCausalLM

    path = ModelConfig(model=model).path
    policy = ConditionalPolicy(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval(), "gated_lora", embedding=128, size=128
    )
    with torch.no_grad():
        for one in policy.adapters.values():
            one.b.normal_(std=0.02)
        start = time.monotonic()
        context = torch.randn(num_users, 10, 2, 128)
        z = torch.cat([policy.encoder(part) for part in torch.split(context, 512)])
        seconds = time.monotonic() - start
    print(f"encoder: {num_users / seconds:.0f} users/s, z has {4 * z.shape[1]} bytes, gates "
          f"{4 * RANK * len(policy.adapters)}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.monotonic()
        for at in range(num_users):
            policy.fold(z[at], folder / f"user-{at % KEPT}", path)
        seconds = time.monotonic() - start
        size = sum(one.stat().st_size for one in (folder / "user-0").iterdir())
        print(f"fold: {num_users / seconds:.0f} users/s, {size} bytes each on the disk")
        if served:
            cache(folder, path)


def cache(folder: Path, path: str) -> None:
    """Answers/s where users come back as popular ones do (Zipf), and where each comes once."""
    from cpt_ray.steering.actors import AdapterActor

    engine = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512, "max_num_seqs": 64}
    config = ModelConfig(
        model=path,
        engine=engine | {"max_cpu_loras": 32},
        sampling={"max_tokens": 16},  # type: ignore[arg-type]
    )
    actor = AdapterActor(config, folder, RANK, seed=0)
    rng = np.random.default_rng(0)
    popular = rng.zipf(1.3, size=4096)
    for title, users in (
        ("one user", np.zeros(256, dtype=int)),
        (f"Zipf over {KEPT} users", popular[popular <= KEPT][:256] - 1),
        ("each user once", rng.permutation(KEPT)[:256]),
    ):
        rows = [
            SteeredAnswer(directive=f"user-{at}", prompt_id=str(place), prompt="Write.", sample=0, text="")
            for place, at in enumerate(users)
        ]
        start = time.monotonic()
        actor(rows)
        seconds = time.monotonic() - start
        print(f"serve: {title}: {len(set(users.tolist()))} adapters, {len(rows) / seconds:.0f} answers/s", flush=True)


def main() -> None:
    """Parses and runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--model", default=str(TOY), help="that of the tests unless given")
    parser.add_argument("--steps", type=int, default=1000, help="of the worlds' reward models; 0 leaves them out")
    parser.add_argument("--engine", action="store_true", help="also score choices and serve the adapters with vLLM")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for num_rubrics in (2, 10):
        beliefs(given.users, num_rubrics)
    if given.engine:
        scoring(given.model)
    adapters(given.users, given.model, given.engine)
    if given.steps:
        worlds(given.steps)
    print(f"memory at most: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
