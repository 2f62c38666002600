"""NP-BTL: a reward model conditioned on a user's choices.

    c_j = W [e_w_j || e_l_j] + b                     a choice, from frozen embeddings e of (prompt, answer)
    z   = h( mean of attention(c_1 .. c_k, null) )   any k from 0; the learned null token makes k = 0 no special case
    r(y|z) = MLP2( MLP1(e_y) || z ),    p(y1 > y2 | z) = sigmoid(r(y1|z) - r(y2|z))

The loss is the negative log-likelihood of the target pairs' choices, over each task and its flipped twin (every choice
swapped), without which z tends to be ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from cpt_ray.errors import UserError
from cpt_ray.steering.users import User

HEADS = 8
"""Of the attention over choices."""


@dataclass(frozen=True)
class Tasks:
    """Some users' choices as embeddings [.., .., 2, E], the chosen answer first."""

    context: Tensor
    """[users, k, 2, E]."""
    targets: Tensor
    """[users, t, 2, E]."""

    def twins(self) -> Tasks:
        """The same with every choice swapped."""
        return Tasks(self.context.flip(2), self.targets.flip(2))

    def with_twins(self) -> Tasks:
        """All tasks, then all their twins."""
        twins = self.twins()
        return Tasks(torch.cat([self.context, twins.context]), torch.cat([self.targets, twins.targets]))

    def first(self, num_choices: int) -> Tasks:
        """With only that many context choices."""
        return Tasks(self.context[:, :num_choices], self.targets)


@dataclass(frozen=True)
class Tensors:
    """Users' choices as indices of embedded answers; saved where every worker sees it."""

    embeddings: Tensor
    """[answers, E], standardised."""
    context: Tensor
    """[users, k, 2]."""
    targets: Tensor
    """[users, t, 2]."""
    tastes: Tensor
    """[users, 1, 2, E]: the hidden taste itself in the place of a choice, which an oracle is given."""

    @classmethod
    def of(cls, embeddings: NDArray[np.float32], users: Sequence[User], rubric_ids: Sequence[str]) -> Tensors:
        """The tensors of these users; their twins are made in training."""
        context = torch.tensor(np.array([user.context for user in users]))
        targets = torch.tensor(np.array([user.targets for user in users]))
        tastes = torch.zeros(len(users), 1, 2, embeddings.shape[1])
        for at, user in enumerate(users):
            for place, name in enumerate(rubric_ids):
                weight = user.taste.weights.get(name, 0.0)
                side = weight * (user.taste.liked_scores.get(name, 50.0) - 50) / 20
                tastes[at, 0, int(user.taste.flipped), 2 * place : 2 * place + 2] = torch.tensor([weight, side])
        return cls(torch.tensor(embeddings), context, targets, tastes)

    def tasks(self, users: Tensor | slice = slice(None), num_choices: int | None = None) -> Tasks:
        """The embedded choices of some users, `num_choices` of their context."""
        context = self.embeddings[self.context[users][:, :num_choices]]
        return Tasks(context, self.embeddings[self.targets[users]])

    def oracle_tasks(self) -> Tasks:
        """Those of all users, with their taste in the place of their choices."""
        return Tasks(self.tastes, self.embeddings[self.targets])


def mlp(*sizes: int) -> nn.Sequential:
    """Linear layers with LayerNorm and GELU between them."""
    layers: list[nn.Module] = []
    for at, (size, out) in enumerate(pairwise(sizes)):
        layers += ([nn.LayerNorm(size), nn.GELU()] if at else []) + [nn.Linear(size, out)]
    return nn.Sequential(*layers)


class ContextEncoder(nn.Module):
    """Choices [users, k, 2, E] to z [users, `size`], whatever their order."""

    def __init__(self, embedding: int, size: int):
        super().__init__()
        self.project = nn.Linear(2 * embedding, size)
        self.null = nn.Parameter(torch.randn(size) * 0.02)
        self.attention = nn.MultiheadAttention(size, HEADS, batch_first=True)
        self.head = mlp(size, size, size)

    def forward(self, context: Tensor) -> Tensor:
        """[users, k, 2, E] to [users, size]."""
        null = self.null.expand(len(context), 1, -1)
        tokens = torch.cat([self.project(context.flatten(2)), null], dim=1)
        mixed = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        z: Tensor = self.head(mixed.mean(dim=1))
        return z


class RewardModel(nn.Module):
    """r(y|z) and the encoder that gives z."""

    def __init__(self, embedding: int, size: int):
        super().__init__()
        self.encoder = ContextEncoder(embedding, size)
        self.answer = mlp(embedding, size, size)
        self.score = mlp(2 * size, size, 1)

    def reward(self, z: Tensor, answers: Tensor) -> Tensor:
        """[users, ...] of z [users, size] and answers' embeddings [users, ..., E]."""
        spread = z.view(len(z), *(1,) * (answers.dim() - 2), -1).expand(*answers.shape[:-1], -1)
        rewards: Tensor = self.score(torch.cat([self.answer(answers), spread], dim=-1))
        return rewards.squeeze(-1)

    def margins(self, tasks: Tasks) -> Tensor:
        """r(chosen|z) - r(rejected|z) of the targets, [users, t], with z from the context."""
        rewards = self.reward(self.encoder(tasks.context), tasks.targets)
        return rewards[..., 0] - rewards[..., 1]

    def forward(self, tasks: Tasks) -> Tensor:
        """The loss of a batch of tasks."""
        return -logsigmoid(self.margins(tasks)).mean()


def train_loop(
    module: nn.Module,
    draw: Callable[[int], Any],
    steps: int,
    learning_rate: float,
    setting: str = "the learning rate",
    report: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Trains `module`, whose forward gives the loss of what `draw(step)` gives: Adam, warm-up, linear decay.

    Args:
        setting: what the learning rate is called in the run file.
        report: gets the number of every step, from 1, and its loss.

    Returns:
        The loss of every step. UserError at the first one that is not finite, or if the last one broke the weights.
    """

    def check(step: int, *values: Tensor) -> None:
        if not all(bool(value.isfinite().all()) for value in values):
            problem = "loss, gradient or weights are not finite numbers"
            raise UserError(f"step {step} of {steps}: {problem}; lower {setting}")

    trained = [weights for weights in module.parameters() if weights.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / warmup, 1 - step / steps))
    losses: list[float] = []
    module.train()
    for step in range(steps):
        loss = module(draw(step))
        optimizer.zero_grad()
        loss.backward()
        # every rank has the same gradient, so all of them stop here
        check(step + 1, loss.detach(), nn.utils.clip_grad_norm_(trained, 1.0))
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        report(step + 1, losses[-1])
    with torch.no_grad():
        check(steps, module(draw(steps)), *trained)
    module.eval()
    return losses


@torch.no_grad()
def accuracy(model: RewardModel, tasks: Tasks) -> Tensor:
    """Share of each user's target pairs that are ordered as the user orders them, [users]."""
    margins = model.margins(tasks)
    return ((margins > 0).float() + 0.5 * (margins == 0)).mean(dim=1)
