"""NP-BTL and NP-DPO under Ray Train; a model is complete, and not trained again, once its file is there."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from cpt_ray.config import Form, Range, SteerConfig
from cpt_ray.console import say
from cpt_ray.engines.ray_train import WorkerGroup, run_workers
from cpt_ray.errors import UserError
from cpt_ray.steering.policy import ConditionalPolicy, Sequences
from cpt_ray.steering.reward import RewardModel, Tasks, learn
from cpt_ray.steering.users import User
from cpt_ray.tables.rundir import replacing

PROGRESS = "progress.json"
POLL_SECONDS = 1.0
GUESSING = math.log(2)
"""The loss of a model that finds either answer of a pair as likely to be chosen."""


@dataclass(frozen=True)
class Tensors:
    """Users' choices as indices of embedded answers; saved where every worker sees it."""

    embeddings: torch.Tensor
    """[answers, E], standardised."""
    context: torch.Tensor
    """[users, k, 2]."""
    targets: torch.Tensor
    """[users, t, 2]."""
    tastes: torch.Tensor
    """[users, 1, 2, E]: the hidden taste spelled out in the place of a choice, which is what an oracle is told."""

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], users: Sequence[User], rubric_ids: Sequence[str]) -> Tensors:
        """Of the users themselves; twins are made on the way."""
        context, targets = (
            torch.tensor(np.array([getattr(one, name) for one in users])) for name in ("context", "targets")
        )
        tastes = torch.zeros(len(users), 1, 2, embeddings.shape[1])
        for at, user in enumerate(users):
            for place, name in enumerate(rubric_ids):
                weight = user.taste.weights.get(name, 0.0)
                said = torch.tensor([weight, weight * (user.taste.targets.get(name, 50.0) - 50) / 20])
                tastes[at, 0, int(user.taste.flipped), 2 * place : 2 * place + 2] = said
        return cls(torch.tensor(embeddings), context, targets, tastes)

    def tasks(
        self, users: torch.Tensor | slice = slice(None), num_choices: int | None = None, told: bool = False
    ) -> Tasks:
        """The embedded choices of some users, `num_choices` of their context; or, if `told`, their taste instead."""
        targets = self.embeddings[self.targets[users]]
        if told:
            return Tasks(self.tastes[users], targets)
        return Tasks(self.embeddings[self.context[users][:, :num_choices]], targets)


@dataclass(frozen=True)
class Fit:
    """What a worker needs to know."""

    config: SteerConfig
    folder: Path
    """Of the models; absolute."""
    seed: int
    kind: str
    """"np-btl"; the same model without any context ("static") or told the taste ("oracle"); or a form of NP-DPO."""

    @property
    def seeds(self) -> int:
        """How many are trained: those to compare with are one each."""
        return self.config.seeds if self.kind == "np-btl" else 1

    def path(self, number: int) -> Path:
        """Of one seed's weights."""
        return self.folder / f"{self.kind}-{number}.safetensors"


class Reporter:
    """How far a worker group is, in a file of the models' folder that `under_ray_train` shows; rank 0 writes it."""

    def __init__(self, folder: Path, rank: int):
        self._path, self._rank, self._next = folder / PROGRESS, rank, 0.0
        if (state := self.read(folder)).get("error"):  # Ray Train tries again what would fail again
            raise UserError(state["error"])

    @staticmethod
    def read(folder: Path) -> dict[str, Any]:
        """{"done": steps, "note": ..., "error": ...}, as far as there is any of it."""
        path = folder / PROGRESS
        return json.loads(path.read_text()) if path.exists() else {}

    def __call__(self, done: int, note: str) -> None:
        """Once a second at most."""
        if self._rank == 0 and time.monotonic() >= self._next:
            self._next = time.monotonic() + POLL_SECONDS
            self._write({"done": done, "note": note})

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Leaves word of a UserError, which loses its kind on the way through Ray Train."""
        try:
            yield
        except UserError as error:
            self._write({"error": f"{what}: {error}"})
            raise

    def _write(self, state: dict[str, Any]) -> None:
        with replacing(self._path, sync=False) as file:
            file.write(json.dumps(state).encode())


def under_ray_train(loop: Callable[[dict[str, Any]], None], settings: dict[str, Any], fit: Fit, steps: int) -> None:
    """Runs `loop` on every rank and shows how many of the `steps` are done; UserError with the cause if it fails."""
    config = fit.config
    group = WorkerGroup(
        stage="steer",
        num_workers=Range(config.num_workers, config.num_workers),
        use_gpu=config.use_gpu,
        resources={"GPU" if config.use_gpu else "CPU": 1},
        max_failures=2,
        continues="after the last model that is complete",
        less_memory="steer.policy_users" if fit.kind in get_args(Form) else "steer.batch_users",
    )
    run_workers(
        loop,
        settings,
        group,
        name=f"steer-{fit.kind}-{fit.folder.name}",
        storage=str(fit.folder.parent / "checkpoints"),
        state=fit.folder / PROGRESS,
        title=f"steer {fit.kind}",
        steps=steps,
    )


def fit_reward_models(fits: Sequence[Fit], tensors: Tensors) -> list[list[RewardModel]]:
    """Trains the models that are not there yet, all by one worker group of Ray Train, and loads every one."""
    missing = [one for one in fits if not all(one.path(number).exists() for number in range(one.seeds))]
    if missing:
        missing[0].folder.mkdir(parents=True, exist_ok=True)
        torch.save(tensors.__dict__, missing[0].folder / "tensors.pt")
        count = sum(not one.path(number).exists() for one in missing for number in range(one.seeds))
        under_ray_train(work, {"fits": missing}, missing[0], count * missing[0].config.steps)
    for fit in fits:
        losses = [json.loads(fit.path(one).with_suffix(".json").read_text())["loss"] for one in range(fit.seeds)]
        say(f"steer fit    {fit.kind}: {fit.seeds} models, loss {_judged(float(np.mean(losses)))}")
    return [[load(fit, number, tensors.embeddings.shape[1]) for number in range(fit.seeds)] for fit in fits]


def _judged(loss: float) -> str:
    """A loss, and whether guessing is as good."""
    return f"{loss:.3f}" + (f" (guessing: {GUESSING:.3f})" if loss >= GUESSING else "")


def new_model(fit: Fit, number: int, embedding: int) -> RewardModel:
    """The untrained model of one seed."""
    torch.manual_seed(fit.seed + number)
    return RewardModel(embedding, fit.config.size)


def load(fit: Fit, number: int, embedding: int) -> RewardModel:
    """One trained model; every weight must be there and no other."""
    from safetensors.torch import load_file

    model = new_model(fit, number, embedding)
    model.load_state_dict(load_file(fit.path(number)), strict=True)
    return model.eval()


def work(settings: dict[str, Any]) -> None:
    """What each rank does: its share of the users, gradients averaged over ranks; rank 0 saves."""
    import ray.train
    from ray.train.torch import get_device

    fits: list[Fit] = settings["fits"]
    if not fits[0].config.use_gpu:
        torch.set_num_threads(1)
    loaded = torch.load(fits[0].folder / "tensors.pt")
    tensors = Tensors(**{name: one.to(get_device()) for name, one in loaded.items()})
    reporter, done = Reporter(fits[0].folder, ray.train.get_context().get_world_rank()), 0
    for fit in fits:
        for number in range(fit.seeds):
            if not fit.path(number).exists():
                with reporter.failing(f"{fit.kind} {number}"):
                    _learn_rewards(fit, number, tensors, reporter, done)
                done += fit.config.steps
                ray.train.report({fit.kind: number})


def _learn_rewards(fit: Fit, number: int, tensors: Tensors, reporter: Reporter, done: int) -> None:
    import ray.train
    from ray.train.torch import prepare_model

    context, config = ray.train.get_context(), fit.config
    rank, ranks = context.get_world_rank(), context.get_world_size()
    own = torch.arange(rank, len(tensors.context), ranks)
    model = new_model(fit, number, tensors.embeddings.shape[1])
    random = torch.Generator().manual_seed(1000 * (fit.seed + number) + rank)

    def draw(step: int) -> Tasks:
        users = own[torch.randint(len(own), (max(1, config.batch_users // ranks),), generator=random)]
        made = tensors.tasks(users, told=fit.kind == "oracle")
        if fit.kind == "oracle":
            return made.with_twins()
        count = 0 if fit.kind == "static" else int(torch.randint(config.choices + 1, (), generator=random))
        order = torch.randperm(config.choices, generator=random)[:count]
        return Tasks(made.context[:, order], made.targets).with_twins()

    wrapped = prepare_model(model, parallel_strategy="ddp" if ranks > 1 else None)

    def report(step: int, loss: float) -> None:
        reporter(done + step, f"{fit.kind} {number}, loss {loss:.3f}")

    losses = learn(wrapped, draw, config.steps, config.learning_rate, "steer.learning_rate", report)
    if rank == 0:
        _save(fit, number, model.state_dict(), losses)


def _save(fit: Fit, number: int, weights: dict[str, torch.Tensor], losses: Sequence[float]) -> None:
    """The weights last, so that a file that is there is complete."""
    from safetensors.torch import save

    fit.path(number).with_suffix(".json").write_text(json.dumps({"loss": float(np.mean(losses[-50:]))}))
    with replacing(fit.path(number)) as file:
        file.write(save({name: one.contiguous().cpu() for name, one in weights.items()}))


# ---------------------------------------------------------------- NP-DPO


def fit_policy(
    fit: Fit, tensors: Tensors, texts: Sequences, prompts: Sequence[str], policy: str, reward: Path
) -> ConditionalPolicy:
    """NP-DPO in the form that `fit.kind` names: trained under Ray Train if it is not there yet, and loaded.

    Args:
        texts: token ids and start of each answer of `tensors.embeddings`.
        prompts: id of each one's prompt.
        policy: folder or name of the model.
        reward: weights of the NP-BTL model that says what users prefer; its encoder is this one's too, and
            stays as it is: trained on, it fits the answers learned from and does worse on others.
    """
    from safetensors.torch import load_file

    if not fit.path(0).exists():
        fit.folder.mkdir(parents=True, exist_ok=True)
        torch.save(
            tensors.__dict__ | {"texts": list(texts), "prompts": list(prompts)}, fit.folder / "policy_tensors.pt"
        )
        settings = {"fit": fit, "policy": policy, "reward": reward}
        under_ray_train(work_policy, settings, fit, fit.config.policy_steps)
    found = json.loads(fit.path(0).with_suffix(".json").read_text())
    say(f"steer fit    {fit.kind}: loss {_judged(found['loss'])}")
    model = new_policy(fit, tensors.embeddings.shape[1], policy)
    model.load_own_state(load_file(fit.path(0)))
    return model.eval()


def new_policy(fit: Fit, embedding: int, policy: str) -> ConditionalPolicy:
    """The untrained conditional policy around a frozen model."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if fit.config.use_gpu else torch.float32
    frozen = AutoModelForCausalLM.from_pretrained(policy, dtype=dtype).eval()
    torch.manual_seed(fit.seed)
    form: Form = fit.kind  # type: ignore[assignment]
    return ConditionalPolicy(frozen, form, embedding, fit.config.size, beta=fit.config.policy_beta)


def work_policy(settings: dict[str, Any]) -> None:
    """What each rank does for NP-DPO."""
    import ray.train
    from ray.train.torch import get_device, prepare_model
    from safetensors.torch import load_file

    fit: Fit = settings["fit"]
    context, config, device = ray.train.get_context(), fit.config, get_device()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    if not config.use_gpu:
        torch.set_num_threads(1)
    loaded = torch.load(fit.folder / "policy_tensors.pt")
    texts: Sequences = loaded.pop("texts")
    groups = answers_by_prompt(loaded.pop("prompts"))
    tensors = Tensors(**{name: one.to(device) for name, one in loaded.items()})
    policy = new_policy(fit, tensors.embeddings.shape[1], settings["policy"])
    teacher = RewardModel(tensors.embeddings.shape[1], config.size)
    teacher.load_state_dict(load_file(settings["reward"]))
    policy.encoder.load_state_dict(teacher.encoder.state_dict())
    policy.encoder.requires_grad_(False)
    teacher.to(device).eval()
    policy.to(device)
    reporter = Reporter(fit.folder, rank)
    reporter(0, f"the reference of {len(texts)} answers")
    reference = reference_logps(policy, texts)
    users_here = torch.arange(rank, len(tensors.context), ranks)
    random = torch.Generator().manual_seed(1000 * fit.seed + rank)

    def draw(step: int) -> tuple[Any, ...]:
        at = torch.randint(len(users_here), (max(1, config.policy_users // ranks),), generator=random)
        count = int(torch.randint(config.choices + 1, (), generator=random))
        order = torch.randperm(config.choices, generator=random)[:count]
        chosen = tensors.embeddings[tensors.context[users_here[at]][:, order]]
        context = torch.cat([chosen, chosen.flip(2)])
        drawn = [draw_answers(groups, config.policy_answers, random) for _ in at] * 2
        answers, prompts = torch.tensor(drawn, device=device).unbind(-1)
        with torch.no_grad():
            rewards = teacher.reward(teacher.encoder(context), tensors.embeddings[answers])
        preferred = (rewards[:, :, None] - rewards[:, None]).sigmoid()
        preferred[prompts[:, :, None] != prompts[:, None]] = torch.nan
        return context, answers.tolist(), texts, reference, preferred

    wrapped = prepare_model(policy, parallel_strategy="ddp" if ranks > 1 else None)

    def report(step: int, loss: float) -> None:
        reporter(step, f"loss {loss:.3f}")

    with reporter.failing(fit.kind):
        rate = config.policy_learning_rate
        losses = learn(wrapped, draw, config.policy_steps, rate, "steer.policy_learning_rate", report)
    if rank == 0:
        _save(fit, 0, policy.own_state(), losses)
    ray.train.report({"steps": config.policy_steps})


def answers_by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """Indices of the answers of each prompt that has two or more."""
    groups: dict[str, list[int]] = defaultdict(list)
    for at, prompt in enumerate(prompts):
        groups[prompt].append(at)
    return [one for one in groups.values() if len(one) > 1]


def draw_answers(groups: Sequence[Sequence[int]], count: int, random: torch.Generator) -> list[tuple[int, int]]:
    """`count` answers of random prompts, as many of a prompt as it has, each with the number of its prompt.

    A prompt of three or more gives up one if the last prompt would have a single answer, and so nothing to compare.
    """
    found: list[tuple[int, int]] = []
    while (left := count - len(found)) > 0:
        at = int(torch.randint(len(groups), (), generator=random))
        size = len(groups[at])
        taken = size - 1 if size == left - 1 and size > 2 else size
        order = torch.randperm(size, generator=random)[: min(taken, left)]
        found += [(groups[at][place], at) for place in order.tolist()]
    return found


@torch.no_grad()
def reference_logps(policy: ConditionalPolicy, texts: Sequences, batch_size: int = 64) -> torch.Tensor:
    """log ref(answer | prompt) of every text, [texts]; it depends on no z, so once is enough."""
    order = sorted(range(len(texts)), key=lambda at: len(texts[at][0]))
    found = torch.zeros(len(texts))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        found[part] = policy.logps([texts[at] for at in part]).cpu()
    return found
