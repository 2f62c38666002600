"""NP-DPO: a policy conditioned on z, which is read from a user's choices as in NP-BTL, and trained by DPO.

Two ways to let z in, with one encoder, data and loss; both start as the policy itself, whatever z is:

    film        after every block h <- (1 + gamma_l(z)) h + delta_l(z), beside a LoRA; a reference, it cannot be served
    gated_lora  W + B diag(g(z)) A; folds exactly into one plain adapter per user (`ConditionalPolicy.fold`)

The loss is DPO's over every pair of a group of answers to the same prompt, each of which is a pass through the policy
only once. The label of a pair is the probability that the user prefers one answer: NP-BTL's prediction after the same
choices, which has less noise than a single choice (distilled rewards: Fisch et al., arXiv 2405.19316), or 1 for a
choice as it was made. With p_ij that probability and m_i the implicit reward beta * (log pi(i|z) - log ref(i)):

    - mean over i < j of p_ij log sigmoid(m_i - m_j) + (1 - p_ij) log sigmoid(m_j - m_i)

It sees answer tokens only. The reference is the policy without any of this, so its log-probabilities do not depend on z
and are computed once per answer.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from cpt_ray.config import Form, ModelConfig
from cpt_ray.errors import UserError
from cpt_ray.steering.reward import ContextEncoder, mlp
from cpt_ray.tables.files import replacing
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import AnyPath

Folder = TypeVar("Folder", bound=AnyPath)

AnswerTokens = tuple[list[int], int]
"""Token ids of prompt and answer, and where the answer starts."""

RANK, SCALE = 8, 2.0
"""Of every adapter: what B diag(g) A is multiplied by, which PEFT calls alpha / r."""
VERSION = 3
"""Of the weights and of how they are learned; those of another one are not loaded but trained again."""
REFERENCE_BATCH = 64
"""Sequences of a forward pass of the reference."""


class GatedLora(nn.Module):
    """A frozen linear layer plus B diag(g) A, whose gates g [batch, r] are set from outside; off without them."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))
        self.gates: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, tokens, in] to [batch, tokens, out]."""
        out: Tensor = self.base(x)
        if self.gates is None:
            return out
        added = SCALE * ((x.to(self.a.dtype) @ self.a.T) * self.gates[:, None]) @ self.b.T
        return out + added.to(out.dtype)


def add_adapters(model: Any) -> dict[str, GatedLora]:
    """Puts a `GatedLora` in the place of every linear layer in a model's blocks; they, by the layer's name.

    PEFT's LoRA has no gates that differ from row to row of a batch, and a hook's parameters would not be in the model's
    state, so the modules are replaced. It needs blocks in `model.model.layers`, as Llama, Qwen and their like have them
    in transformers 5, and `nn.Linear` inside, so no quantized weights.
    """
    adapters = {}
    for name, module in list(model.model.layers.named_modules(prefix="model.layers")):
        if isinstance(module, nn.Linear):
            parent, _, own = name.rpartition(".")
            adapters[name] = GatedLora(module)
            setattr(model.get_submodule(parent), own, adapters[name])
    return adapters


class ConditionalPolicy(nn.Module):
    """A frozen causal language model of transformers, and what makes it depend on z. `beta` is for training alone."""

    def __init__(self, model: Any, form: Form, embedding: int, size: int, beta: float = math.nan):
        super().__init__()
        self.model, self.form, self.beta = model.requires_grad_(False), form, beta
        self.encoder = ContextEncoder(embedding, size)
        self.adapters = add_adapters(model)
        width, blocks = model.config.hidden_size, model.model.layers
        self.head = mlp(size, len(blocks) * 2 * width if form == "film" else len(self.adapters) * RANK)
        layer: nn.Linear = self.head[0]  # type: ignore[assignment]
        nn.init.zeros_(layer.weight) if form == "film" else nn.init.normal_(layer.weight, std=0.5 / size**0.5)
        nn.init.zeros_(layer.bias)
        self.film: Tensor | None = None
        """[batch, blocks, (gamma, delta), hidden]."""
        if form == "film":
            for at, block in enumerate(blocks):
                block.register_forward_hook(functools.partial(self._modulate, at))

    def _modulate(self, at: int, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """Forward hook of block `at`."""
        if self.film is None:
            return output
        gamma, delta = self.film[:, at, :, None].unbind(1)
        return (output * (1 + gamma) + delta).to(output.dtype)

    def own_state(self) -> dict[str, Tensor]:
        """What was learned, the encoder's weights among it: everything but those of the frozen model."""
        own = {name for name, tensor in self.named_parameters() if tensor.requires_grad or name.startswith("encoder.")}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items() if name in own}

    def load_own_state(self, state: dict[str, Tensor]) -> None:
        """Loads what `own_state` gave; ValueError for anything else."""
        own = self.own_state()
        wrong = sorted(set(own) ^ set(state)) or [name for name in own if own[name].shape != state[name].shape]
        if wrong:
            raise ValueError(f"not the weights of this policy: {len(wrong)} tensors differ, the first is {wrong[0]}")
        self.load_state_dict(state, strict=False)

    # ------------------------------------------------------------ z into the model

    def gates(self, z: Tensor) -> Tensor:
        """g of every adapted module, [users, modules, r]; 1 + what z says."""
        gates: Tensor = 1 + self.head(z).view(len(z), -1, RANK)
        return gates

    @contextmanager
    def conditioned(self, z: Tensor | None) -> Iterator[None]:
        """The model depends on z [batch, size] in here; with None it is the reference."""
        if z is not None and self.form == "film":
            self.film = self.head(z).view(len(z), -1, 2, self.model.config.hidden_size)
        if z is not None:
            gates = self.gates(z) if self.form == "gated_lora" else z.new_ones(len(z), len(self.adapters), RANK)
            for adapter, own in zip(self.adapters.values(), gates.unbind(1), strict=True):
                adapter.gates = own
        try:
            yield
        finally:
            self.film = None
            for adapter in self.adapters.values():
                adapter.gates = None

    def logps(self, sequences: Sequence[AnswerTokens], z: Tensor | None = None) -> Tensor:
        """log pi(answer | prompt, z) of each sequence, over its answer's tokens, [sequences].

        Args:
            z: [sequences, size], or None for the reference.
        """
        device = next(self.head.parameters()).device
        ids = pad_sequence([torch.tensor(tokens) for tokens, _ in sequences], batch_first=True).to(device)
        starts, ends = torch.tensor([(start, len(tokens)) for tokens, start in sequences], device=device).T[..., None]
        places = torch.arange(ids.shape[1], device=device)
        scored = ((places >= starts) & (places < ends))[:, 1:]
        with self.conditioned(z):
            hidden = self.model.model(input_ids=ids, attention_mask=(places < ends).long()).last_hidden_state
        logits = self.model.lm_head(hidden[:, :-1][scored]).float()  # of the states in front of the answer's tokens
        token_logps = -cross_entropy(logits, ids[:, 1:][scored], reduction="none")
        return torch.zeros(len(ids), device=device).index_add(0, scored.nonzero()[:, 0], token_logps)

    @torch.no_grad()
    def reference(self, sequences: Sequence[AnswerTokens]) -> Tensor:
        """log ref(answer | prompt) of each sequence, [sequences], on the CPU; no z changes it, so once is enough."""
        logps = torch.zeros(len(sequences))
        order = sorted(range(len(sequences)), key=lambda at: len(sequences[at][0]))  # little padding
        for part in (order[start : start + REFERENCE_BATCH] for start in range(0, len(order), REFERENCE_BATCH)):
            logps[part] = self.logps([sequences[at] for at in part]).cpu()
        return logps

    def rewards(
        self, context: Tensor, answers: Sequence[Sequence[int]], tokens: Sequence[AnswerTokens], reference: Tensor
    ) -> Tensor:
        """The implicit rewards of each user's answers, [users, a].

        Args:
            context: [users, k, 2, E].
            answers: [users, a], indices of `tokens`.
            reference: log-probabilities of `tokens` under the reference, [tokens].
        """
        z = self.encoder(context)
        flat = [at for group in answers for at in group]
        logps = self.logps([tokens[at] for at in flat], z.repeat_interleave(len(flat) // len(z), dim=0))
        return self.beta * (logps - reference[flat].to(logps.device)).view(len(z), -1)

    def forward(self, batch: tuple[Tensor, Sequence[Sequence[int]], Sequence[AnswerTokens], Tensor, Tensor]) -> Tensor:
        """The loss of a batch: the arguments of `rewards`, and [users, a, a], how probably a user prefers i to j.

        It is NaN where i and j are no pair.
        """
        context, answers, tokens, reference, preferred = batch
        rewards = self.rewards(context, answers, tokens, reference)
        margins = rewards[:, :, None] - rewards[:, None]
        is_pair = ~preferred.isnan() & torch.ones_like(preferred, dtype=torch.bool).triu(1)
        return binary_cross_entropy_with_logits(margins[is_pair], preferred[is_pair])

    # ------------------------------------------------------------ serving

    @torch.no_grad()
    def fold(self, z: Tensor, folder: Folder, base_model: str) -> Folder:
        """One user's plain LoRA adapter in PEFT's layout, diag(g(z)) folded into A; z [size]."""
        from safetensors.torch import save

        assert self.form == "gated_lora"
        gates, weights = self.gates(z[None])[0], {}
        for at, (name, adapter) in enumerate(self.adapters.items()):
            weights[f"base_model.model.{name}.lora_A.weight"] = (gates[at][:, None] * adapter.a).contiguous().cpu()
            weights[f"base_model.model.{name}.lora_B.weight"] = adapter.b.detach().contiguous().cpu()
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "r": RANK,
            "lora_alpha": int(SCALE * RANK),
            "lora_dropout": 0.0,
            "bias": "none",
            "target_modules": sorted({name.rpartition(".")[2] for name in self.adapters}),
        }
        for name, content in {
            "adapter_model.safetensors": save(weights, metadata={"format": "pt"}),
            "adapter_config.json": json.dumps(config, indent=2).encode(),
        }.items():
            with replacing(folder / name, sync=False) as file:
                file.write(content)
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
        saved_json = run.read_json(cls.file(form))
        if not saved_json:
            advice = f"run `cpt steer fit` with steer.forms=[{form}]"
            raise UserError(f"serve.preferences: no {form} in {run.path}; {advice}")
        saved = cls(**{"version": 1} | saved_json)
        if saved.version != VERSION:
            raise UserError(f"serve.preferences: the {form} is an earlier version's; run `cpt steer fit` again")
        for what, mine, model in (("model", saved.policy, policy), ("steer.embedder", saved.embedder, embedder)):
            if mine != model.identity:
                raise UserError(f"serve.preferences: the {form} is for another {what}; run `cpt steer fit` again")
        return saved
