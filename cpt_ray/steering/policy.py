"""NP-DPO: a policy conditioned on z, which is read from a user's choices as in NP-BTL, and trained by DPO.

Two ways to let z in, with one encoder, data and loss; both start as the policy itself, whatever z is:

    film        after every block h <- (1 + gamma_l(z)) h + delta_l(z), beside a LoRA; a reference, it cannot be served
    gated_lora  W + B diag(g(z)) A; folds exactly into one plain adapter per user (`ConditionalPolicy.fold`)

The loss is DPO's over every pair of a group of answers to the same prompt, each of which is a pass through the policy
only once. In the place of a choice is the probability that the user prefers one to the other: what NP-BTL says of it
after the same choices, which is free of luck (distilled rewards: Fisch et al., arXiv 2405.19316), or 1 for a choice as
it was made. With p_ij that probability and m_i the implicit reward beta * (log pi(i|z) - log ref(i)):

    - mean over i < j of p_ij log sigmoid(m_i - m_j) + (1 - p_ij) log sigmoid(m_j - m_i)

It sees answer tokens only. The reference is the policy without any of this, so its log-probabilities do not depend on z
and are computed once per answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from cpt_ray.config import Form, ModelConfig
from cpt_ray.errors import UserError
from cpt_ray.steering.reward import ContextEncoder, mlp
from cpt_ray.tables.rundir import RunDir

Sequences = Sequence[tuple[list[int], int]]
"""Token ids of (prompt, answer), and where the answer starts."""

VERSION = 3
"""Of the weights and of how they are learned; those of another one are not loaded but trained again."""


class GatedLora(nn.Module):
    """A frozen linear layer plus B diag(g) A, whose gates g [batch, r] are set from outside; off without them."""

    def __init__(self, base: nn.Linear, rank: int, scale: float):
        super().__init__()
        self.base, self.scale = base, scale
        self.a = nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))
        self.gates: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, in] to [batch, tokens, out]."""
        out: Tensor = self.base(x)
        if self.gates is None:
            return out
        added = self.scale * ((x.to(self.a.dtype) @ self.a.T) * self.gates[:, None]) @ self.b.T
        return out + added.to(out.dtype)


class ConditionalPolicy(nn.Module):
    """A frozen causal language model of transformers, and what makes it depend on z."""

    def __init__(
        self,
        model: Any,
        form: Form,
        embedding: int,
        size: int = 128,
        rank: int = 8,
        beta: float = 0.1,
    ):
        super().__init__()
        self.model, self.form, self.rank, self.beta = model.requires_grad_(False), form, rank, beta
        self.encoder = ContextEncoder(embedding, size)
        width, blocks = model.config.hidden_size, model.model.layers
        self.adapters: dict[str, GatedLora] = {}
        """By the module's name in the model."""
        for name, module in list(blocks.named_modules(prefix="model.layers")):
            if isinstance(module, nn.Linear):
                parent, _, own = name.rpartition(".")
                self.adapters[name] = GatedLora(module, rank, scale=2.0)
                setattr(model.get_submodule(parent), own, self.adapters[name])
        self.head = mlp(size, len(blocks) * 2 * width if form == "film" else len(self.adapters) * rank)
        last: nn.Linear = self.head[-1]  # type: ignore[assignment]
        nn.init.zeros_(last.weight) if form == "film" else nn.init.normal_(last.weight, std=0.5 / last.in_features**0.5)
        nn.init.zeros_(last.bias)
        self.film: Tensor | None = None
        if form == "film":
            for at, block in enumerate(blocks):
                block.register_forward_hook(self._modulate(at, width))

    def _modulate(self, at: int, width: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
            if self.film is None:
                return None
            gamma, delta = self.film.view(len(self.film), -1, 2, width)[:, at].unbind(1)
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = (hidden * (1 + gamma[:, None]) + delta[:, None]).to(hidden.dtype)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    def own_state(self) -> dict[str, Tensor]:
        """What was learned, the encoder's weights among it: everything but those of the frozen model."""
        own = {name for name, one in self.named_parameters() if one.requires_grad or name.startswith("encoder.")}
        return {name: one.detach().cpu().contiguous() for name, one in self.state_dict().items() if name in own}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """The opposite; ValueError unless exactly what `own_state` gives is there."""
        own = self.own_state()
        wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"not the weights of this policy: {len(wrong)} tensors differ, the first is {wrong[0]}")
        self.load_state_dict(state, strict=False)

    # ------------------------------------------------------------ z into the model

    def gates(self, z: Tensor) -> Tensor:
        """g of every adapted module, [users, modules, r]; 1 + what z says."""
        found: Tensor = 1 + self.head(z).view(len(z), -1, self.rank)
        return found

    @contextmanager
    def conditioned(self, z: Tensor | None) -> Iterator[None]:
        """The model depends on z [batch, size] in here; with None it is the reference."""
        if z is not None and self.form == "film":
            self.film = self.head(z)
        if z is not None:
            gates = self.gates(z) if self.form == "gated_lora" else None
            for at, one in enumerate(self.adapters.values()):
                one.gates = gates[:, at] if gates is not None else z.new_ones(len(z), self.rank)
        try:
            yield
        finally:
            self.film = None
            for one in self.adapters.values():
                one.gates = None

    def logps(self, sequences: Sequences, z: Tensor | None = None) -> Tensor:
        """log pi(answer | prompt, z) of each sequence, over its answer's tokens, [sequences].

        Args:
            z: [sequences, size], or None for the reference.
        """
        longest = max(len(ids) for ids, _ in sequences)
        ids = torch.zeros(len(sequences), longest, dtype=torch.long)
        real, scored = torch.zeros_like(ids), torch.zeros(len(sequences), longest, dtype=torch.bool)
        for at, (one, start) in enumerate(sequences):
            ids[at, : len(one)], real[at, : len(one)], scored[at, start : len(one)] = torch.tensor(one), 1, True
        device = next(self.head.parameters()).device
        ids, real, scored = ids.to(device), real.to(device), scored.to(device)
        with self.conditioned(z):
            hidden = self.model.model(input_ids=ids, attention_mask=real).last_hidden_state
        before = hidden[:, :-1][scored[:, 1:]]  # the state in front of each answer token
        logits = self.model.lm_head(before).float()
        picked = logits.gather(1, ids[:, 1:][scored[:, 1:]][:, None])[:, 0] - logits.logsumexp(dim=1)
        rows = scored[:, 1:].nonzero()[:, 0]
        return torch.zeros(len(sequences), device=device).index_add(0, rows, picked)

    def rewards(self, context: Tensor, answers: Sequence[Sequence[int]], texts: Sequences, reference: Tensor) -> Tensor:
        """The implicit rewards of each user's answers, [users, a].

        Args:
            context: [users, k, 2, E].
            answers: [users, a], indices of `texts`.
            reference: log-probabilities of `texts` under the reference, [texts].
        """
        z = self.encoder(context)
        flat = [at for some in answers for at in some]
        found = self.logps([texts[at] for at in flat], z.repeat_interleave(len(flat) // len(z), dim=0))
        return self.beta * (found - reference[torch.tensor(flat)].to(found.device)).view(len(z), -1)

    def forward(self, batch: tuple[Tensor, Sequence[Sequence[int]], Sequences, Tensor, Tensor]) -> Tensor:
        """The loss of a batch: the arguments of `rewards`, and [users, a, a], how probably a user prefers i to j.

        It is NaN where i and j are no pair.
        """
        context, answers, texts, reference, preferred = batch
        rewards = self.rewards(context, answers, texts, reference)
        margins = rewards[:, :, None] - rewards[:, None]
        is_pair = ~preferred.isnan() & torch.ones_like(preferred, dtype=torch.bool).triu(1)
        return binary_cross_entropy_with_logits(margins[is_pair], preferred[is_pair])

    # ------------------------------------------------------------ serving

    @torch.no_grad()
    def fold(self, z: Tensor, folder: Path, base_model: str) -> Path:
        """One user's plain LoRA adapter in PEFT's layout, diag(g(z)) folded into A; z [size]."""
        from safetensors.torch import save_file

        assert self.form == "gated_lora"
        gates, weights = self.gates(z[None])[0], {}
        for at, (name, one) in enumerate(self.adapters.items()):
            weights[f"base_model.model.{name}.lora_A.weight"] = (gates[at][:, None] * one.a).contiguous().cpu()
            weights[f"base_model.model.{name}.lora_B.weight"] = one.b.detach().contiguous().cpu()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": self.rank,
            "lora_alpha": 2 * self.rank,
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.adapters}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedForm:
    """A conditional policy on the disk, as `steering/<form>.json` has it."""

    weights: str
    """Relative to the run directory."""
    policy: str
    """Identity of the model that it conditions."""
    embedder: str
    """Identity of the model that embeds choices."""
    size: int
    mean: list[float]
    """Of the embeddings learned from, per dimension."""
    deviation: list[float]
    version: int = VERSION

    @staticmethod
    def file(form: str) -> str:
        """Where it is in the run directory."""
        return f"steering/{form}.json"

    @classmethod
    def read(cls, run: RunDir, form: str, policy: ModelConfig, embedder: ModelConfig) -> SavedForm:
        """UserError unless one was fitted for these models."""
        found = run.read_json(cls.file(form))
        if not found:
            raise UserError(
                f"serve.preferences: no {form} in {run.path}; run `cpt steer fit` with steer.forms=[{form}]"
            )
        saved = cls(**{"version": 1} | found)
        if saved.version != VERSION:
            raise UserError(f"serve.preferences: the {form} is an earlier version's; run `cpt steer fit` again")
        for what, mine, model in (("model", saved.policy, policy), ("steer.embedder", saved.embedder, embedder)):
            if mine != model.identity:
                raise UserError(f"serve.preferences: the {form} is for another {what}; run `cpt steer fit` again")
        return saved
