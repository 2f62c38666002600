"""NP-BTL and NP-DPO under Ray Train; a model is complete, and not trained again, once its file is there."""

from __future__ import annotations

import gc
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cpt_ray.config import Form, ModelConfig, Range, SteerConfig
from cpt_ray.console import say
from cpt_ray.engines.ray_train import WorkerGroup, read_progress, run_workers
from cpt_ray.errors import UserError
from cpt_ray.steering.policy import AnswerTokens, ConditionalPolicy
from cpt_ray.steering.reward import RewardModel, Tasks, Tensors, train_loop
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.files import replacing
from cpt_ray.tables.store_path import AnyPath

DATA, PROGRESS = "tensors.pt", "progress.json"
"""In the models' folder: what workers read, and how far they are."""
POLL_SECONDS = 1.0
GUESSING = math.log(2)
"""The loss of a model that finds either answer of a pair as likely to be chosen."""


@dataclass(frozen=True)
class ModelToFit:
    """One kind of model to train, and how."""

    config: SteerConfig
    folder: AnyPath
    """Of the models; absolute."""
    seed: int
    method: str
    """"np-btl"; the same model without any context ("static") or given the taste ("oracle"); or a form of NP-DPO."""
    policy: str = ""
    """Of NP-DPO alone: folder, address or name of the model."""
    reward: AnyPath = Path()
    """Of NP-DPO alone: weights of the NP-BTL model that says what users prefer."""

    @property
    def seeds(self) -> int:
        """How many are trained: those to compare with are one each."""
        return self.config.seeds if self.method == "np-btl" else 1

    @property
    def steps(self) -> int:
        """Of each model."""
        return self.config.policy_steps if self.policy else self.config.steps

    @property
    def rate_setting(self) -> str:
        """What the learning rate is called in `steer`."""
        return "policy_learning_rate" if self.policy else "learning_rate"

    def name(self, number: int) -> str:
        """Of one seed's model."""
        return self.method if self.policy else f"{self.method} {number}"

    def path(self, number: int) -> AnyPath:
        """Of one seed's weights."""
        return self.folder / f"{self.method}-{number}.safetensors"


class Reporter:
    """How far a worker group is, in a file of the models' folder that `run_workers` shows; rank 0 writes it."""

    def __init__(self, folder: AnyPath, rank: int):
        self._path, self._rank, self._next = folder / PROGRESS, rank, 0.0
        if problem := read_progress(self._path).get("error"):  # Ray Train tries again what would fail again
            raise UserError(problem)

    def __call__(self, done: int, note: str) -> None:
        """Once a second at most."""
        if self._rank == 0 and time.monotonic() >= self._next:
            self._next = time.monotonic() + POLL_SECONDS
            with suppress(StoreError):  # a note is not worth a training
                self._write({"done": done, "note": note})

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Leaves word of a UserError, which loses its kind on the way through Ray Train."""
        try:
            yield
        except StoreError:  # the next attempt may find the store there again
            raise
        except UserError as error:
            self._write({"error": f"{what}: {error}"})
            raise

    def _write(self, state: dict[str, Any]) -> None:
        with replacing(self._path, sync=False) as file:
            file.write(json.dumps(state).encode())


def train_missing(fits: Sequence[ModelToFit], data: dict[str, Any]) -> None:
    """Trains the models whose files are not there yet, all by one worker group of Ray Train.

    Args:
        data: "tensors", the fields of `Tensors`; for NP-DPO also "tokens", the `AnswerTokens` of their answers, and
            "prompts", the ids of these answers' prompts.
    """
    missing = [(fit, number) for fit in fits for number in range(fit.seeds) if not fit.path(number).exists()]
    if missing:
        first = missing[0][0]
        first.folder.mkdir(parents=True, exist_ok=True)
        with replacing(first.folder / DATA) as file:
            torch.save(data, file)
        config = first.config
        group = WorkerGroup(
            stage="steer",
            num_workers=Range(config.num_workers, config.num_workers),
            use_gpu=config.use_gpu,
            resources={"GPU" if config.use_gpu else "CPU": 1},
            max_failures=2,
            resumes_from="after the last model that is complete",
            less_memory="steer.policy_users" if first.policy else "steer.batch_users",
        )
        run_workers(
            work,
            {"missing": missing},
            group,
            name=f"steer-{first.method}-{first.folder.name}",
            storage=str(first.folder.parent / "checkpoints"),
            state=first.folder / PROGRESS,
            title=f"steer {first.method}",
            steps=sum(fit.steps for fit, _ in missing),
        )
    for fit in fits:
        summaries = [fit.path(number).with_suffix(".json") for number in range(fit.seeds)]
        loss = float(np.mean([json.loads(path.read_text())["loss"] for path in summaries]))
        guessing = f" (guessing: {GUESSING:.3f})" if loss >= GUESSING else ""
        count = f"{fit.seeds} models, " if fit.seeds > 1 else ""
        say(f"steer fit    {fit.method}: {count}loss {loss:.3f}{guessing}")


def load_reward_models(fit: ModelToFit, embedding: int) -> list[RewardModel]:
    """The trained models of all seeds."""
    return [_reward_model(fit, embedding, fit.path(number)) for number in range(fit.seeds)]


def _reward_model(fit: ModelToFit, embedding: int, weights: AnyPath) -> RewardModel:
    from safetensors.torch import load

    model = RewardModel(embedding, fit.config.size)
    model.load_state_dict(load(weights.read_bytes()), strict=True)
    return model.eval()


def load_policy(fit: ModelToFit, embedding: int) -> ConditionalPolicy:
    """The trained conditional policy."""
    from safetensors.torch import load

    policy = _new_policy(fit, embedding)
    policy.load_own_state(load(fit.path(0).read_bytes()))
    return policy.eval()


def _new_policy(fit: ModelToFit, embedding: int) -> ConditionalPolicy:
    """The untrained conditional policy around a frozen model."""
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if fit.config.use_gpu else torch.float32
    frozen = AutoModelForCausalLM.from_pretrained(ModelConfig(model=fit.policy).path, dtype=dtype).eval()
    torch.manual_seed(fit.seed)
    form: Form = fit.method  # type: ignore[assignment]
    return ConditionalPolicy(frozen, form, embedding, fit.config.size, beta=fit.config.policy_beta)


# ---------------------------------------------------------------- in a worker


class UserSampler:
    """Users of this rank, and choices of theirs, at random."""

    def __init__(self, tensors: Tensors, seed: int, rank: int, ranks: int):
        self.tensors, self._ranks = tensors, ranks
        self.random = torch.Generator().manual_seed(1000 * seed + rank)
        self._own = torch.arange(rank, len(tensors.context), ranks)

    def users(self, batch: int) -> Tensor:
        """This rank's part of a batch of users."""
        size = max(1, batch // self._ranks)
        return self._own[torch.randint(len(self._own), (size,), generator=self.random)]

    def context(self, users: Tensor, count: int | None = None) -> Tensor:
        """That many of the users' choices, as many as comes by chance unless given, embedded: [users, k, 2, E]."""
        most = self.tensors.context.shape[1]
        if count is None:
            count = int(torch.randint(most + 1, (), generator=self.random))
        order = torch.randperm(most, generator=self.random)[:count]
        return self.tensors.embeddings[self.tensors.context[users][:, order]]


Training = tuple[nn.Module, Callable[[int], Any]]
"""What `train_loop` trains, and what gives it the batch of a step."""


def work(settings: dict[str, Any]) -> None:
    """What each rank does: its share of the users, gradients averaged over ranks; rank 0 saves."""
    import ray.train
    from ray.train.torch import get_device, prepare_model

    missing: list[tuple[ModelToFit, int]] = settings["missing"]
    first, context = missing[0][0], ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    if not first.config.use_gpu:
        torch.set_num_threads(1)
    with (first.folder / DATA).open("rb") as file:
        data = torch.load(file)
    tensors = Tensors(**{name: tensor.to(get_device()) for name, tensor in data.pop("tensors").items()})
    reporter, done = Reporter(first.folder, rank), 0

    def report(step: int, loss: float) -> None:
        reporter(done + step, f"{name}, loss {loss:.3f}")

    def train_one(fit: ModelToFit, number: int) -> None:
        """In a function of its own, at whose end the model is freed: a second policy need not fit beside it."""
        with reporter.failing(name):
            sampler = UserSampler(tensors, fit.seed + number, rank, ranks)
            reporter(done, f"{name}, preparing")
            module, draw = (
                _policy_training(fit, sampler, **data) if fit.policy else _reward_training(fit, number, sampler)
            )
            wrapped = prepare_model(module, parallel_strategy="ddp" if ranks > 1 else None)
            rate = getattr(fit.config, fit.rate_setting)
            losses = train_loop(wrapped, draw, fit.steps, rate, f"steer.{fit.rate_setting}", report)
        if rank == 0:
            _save(fit, number, module, losses)
        ray.train.report({fit.method: number})

    for fit, number in missing:
        name = fit.name(number)
        if not fit.path(number).exists():  # it may be there where Ray Train tries again
            train_one(fit, number)
            gc.collect()  # a module and its hooks refer to each other
        done += fit.steps


def _save(fit: ModelToFit, number: int, module: nn.Module, losses: Sequence[float]) -> None:
    """The weights last, so that a file that is there is complete."""
    from safetensors.torch import save

    weights = module.own_state() if isinstance(module, ConditionalPolicy) else module.state_dict()
    fit.path(number).with_suffix(".json").write_text(json.dumps({"loss": float(np.mean(losses[-50:]))}))
    with replacing(fit.path(number)) as file:
        file.write(save({name: tensor.contiguous().cpu() for name, tensor in weights.items()}))


def _reward_training(fit: ModelToFit, number: int, sampler: UserSampler) -> Training:
    """NP-BTL: targets of users and their twins, after any number of their choices."""
    tensors, config = sampler.tensors, fit.config

    def draw(step: int) -> Tasks:
        users = sampler.users(config.batch_users)
        is_oracle = fit.method == "oracle"
        context = tensors.tastes[users] if is_oracle else sampler.context(users, 0 if fit.method == "static" else None)
        return Tasks(context, tensors.embeddings[tensors.targets[users]]).with_twins()

    torch.manual_seed(fit.seed + number)
    return RewardModel(tensors.embeddings.shape[1], config.size), draw


def _policy_training(
    fit: ModelToFit, sampler: UserSampler, tokens: Sequence[AnswerTokens], prompts: Sequence[str]
) -> Training:
    """NP-DPO: some answers for users and their twins, and what NP-BTL says of every two of them.

    The policy has NP-BTL's encoder, which stays as it is: trained on, it fits the answers learned from and does worse
    on others.
    """
    tensors, config, groups = sampler.tensors, fit.config, answers_by_prompt(prompts)
    device, embedding = tensors.embeddings.device, tensors.embeddings.shape[1]
    policy, teacher = _new_policy(fit, embedding), _reward_model(fit, embedding, fit.reward)
    policy.encoder.load_state_dict(teacher.encoder.state_dict())
    policy.encoder.requires_grad_(False)
    policy.to(device)
    teacher.to(device)
    reference = torch.full((len(tokens),), torch.nan)

    def draw(step: int) -> tuple[Any, ...]:
        users = sampler.users(config.policy_users)
        chosen = sampler.context(users)
        context = torch.cat([chosen, chosen.flip(2)])
        drawn = [draw_answers(groups, config.policy_answers, sampler.random) for _ in users] * 2
        answers, prompt_of = torch.tensor(drawn, device=device).unbind(-1)
        with torch.no_grad():
            rewards = teacher.reward(teacher.encoder(context), tensors.embeddings[answers])
        preferred = (rewards[:, :, None] - rewards[:, None]).sigmoid()
        preferred[prompt_of[:, :, None] != prompt_of[:, None]] = torch.nan
        unknown = [at for at in sorted({*answers.flatten().tolist()}) if reference[at].isnan()]
        if unknown:  # a short training needs few of them
            reference[unknown] = policy.reference([tokens[at] for at in unknown])
        return context, answers.tolist(), tokens, reference, preferred

    return policy, draw


def answers_by_prompt(prompts: Sequence[str]) -> list[list[int]]:
    """Indices of the answers of each prompt that has two or more."""
    groups: dict[str, list[int]] = defaultdict(list)
    for at, prompt in enumerate(prompts):
        groups[prompt].append(at)
    return [group for group in groups.values() if len(group) > 1]


def draw_answers(groups: Sequence[Sequence[int]], count: int, random: torch.Generator) -> list[tuple[int, int]]:
    """`count` answers of random prompts, as many of a prompt as it has, each with the number of its prompt.

    A prompt of three or more gives up one if the last prompt would have a single answer, and so nothing to compare.
    """
    drawn: list[tuple[int, int]] = []
    while (left := count - len(drawn)) > 0:
        at = int(torch.randint(len(groups), (), generator=random))
        size = len(groups[at])
        taken = size - 1 if size == left - 1 and size > 2 else size
        order = torch.randperm(size, generator=random)[: min(taken, left)]
        drawn += [(groups[at][place], at) for place in order.tolist()]
    return drawn
