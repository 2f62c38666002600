"""The policy as TRL's trainer loads it, and the log-probabilities that it gives to rows' answers.

TRL's helpers for its own trainers (`trl.trainer.utils`) are used here and nowhere else, since the reference and the
exported weights must be of the model that TRL's trainer trains: loaded as the same class, and with the same LM head.
They are no public API; tests/test_trl_contracts.py holds what is relied on, for trl 1.16.0 and transformers 5.19.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.distributed.tensor import DTensor
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head, create_model_from_path

from cpt_ray.logprobs.grid import ATTENTION, collate, length_batches
from cpt_ray.logprobs.rows import Row

ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers whose attention `grid_attention` can take the place of."""
LOGIT_SCALES = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
"""Settings of models that change logits after the head's matrix product; TRL's head knows them."""
LOGITS_TILE = 2**22
"""Logits that are held at a time."""
KL_TOKENS = 128
"""Positions per batch at which `reference_kl` looks at the whole vocabulary."""


def load_policy(path: str, **settings: Any) -> Any:
    """A causal LM, loaded as TRL's trainer does it: by the class that its config names, not by AutoModel's choice."""
    return create_model_from_path(path, **settings)


class FrozenHeadLogProbs(torch.autograd.Function):
    """log softmax(W h)[y] of each token, for weights W [V, H] that are not trained.

    d/dh = W[y] - softmax(W h) W does not depend on what comes later, so the forward pass computes it from the same tile
    of logits (as Liger's fused cross-entropy does): two matrix products per tile instead of TRL's three, and [N, H]
    kept instead of [N, V].
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [N, H], labels [N] to [N], float32."""
        weight = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(hidden)
        labels = labels.to(hidden.device)
        logps = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty(hidden.shape, device=hidden.device) if ctx.needs_input_grad[0] else None
        size = max(1, LOGITS_TILE // len(weight))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = (hidden[part] @ weight.T).float()
            target = logits.gather(1, labels[part, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)  # logits now hold exp(logit - top)
            logps[part] = target - (top + total.log())[:, 0]
            if gradient is not None:
                expected = (logits.to(weight.dtype) @ weight).float() / total
                gradient[part] = weight[labels[part]] - expected
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return logps

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[0][:, None]).to(ctx.dtype), None, None


def _keep_answers(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the backbone: the LM head gets the answers' positions [1, N] only."""
    if kwargs.get("num_labels") is not None:
        output.last_hidden_state = output.last_hidden_state[:, -kwargs["num_labels"] :]
    return output


def prepare_model(model: Any) -> None:
    """Gives a causal LM rows' attention and a fused head for answers only, which computes log-probabilities alone."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    others = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise ValueError(f"layers of type {', '.join(sorted(others))} cannot keep a row's answers apart")
    base.set_attn_implementation(ATTENTION)
    base.base_model.register_forward_hook(_keep_answers, with_kwargs=True)
    add_fused_lm_head(base)  # TRL's trainer has given it one already, which computes all of its metrics
    head, config = base.get_output_embeddings(), base.config.get_text_config()
    is_plain = head.bias is None and all(getattr(config, name, None) is None for name in LOGIT_SCALES)
    if is_plain and not head.weight.requires_grad:
        base.forward = _with_frozen_head(base)


def _with_frozen_head(base: Any) -> Callable[..., Any]:
    """The forward pass that TRL's head has given a model, with `FrozenHeadLogProbs` for rows' batches."""
    fused = base.forward

    # Assigned as TRL assigns its own: wrappers (PEFT, DDP, FSDP) reach a model by its forward only, and `generate`
    # looks up the names of arguments in the signature, which functools.wraps keeps.
    @functools.wraps(fused)
    def forward(*args: Any, shift_labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or shift_labels is None:
            return fused(*args, shift_labels=shift_labels, fused_lm_head=fused_lm_head, **kwargs)
        hidden = base.base_model(*args, **kwargs).last_hidden_state
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = base.get_output_embeddings().weight  # FSDP replaces it after this function was made
        logps = FrozenHeadLogProbs.apply(hidden[0].to(dtype), weight, shift_labels[0])  # type: ignore[no-untyped-call]
        return FusedCausalLMOutput(log_probs=logps[None].to(shift_labels.device))  # of a model on several devices

    return forward


def _run(model: Any, batch: Mapping[str, Any], **arguments: Any) -> Any:
    """The model's output for a batch of `collate`."""
    tokens = batch["input_ids"]
    return model(
        input_ids=tokens,
        position_ids=batch["position_ids"],
        # of four dimensions, so that transformers builds none of its own; `grid_attention` does not read it
        attention_mask=torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device),
        grid=batch["grid"],
        num_labels=batch["labels"].shape[1],
        use_cache=False,
        **arguments,
    )


def token_logps(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Log-probability of each token of each answer of a batch: [S, longest], zero where padded."""
    logps = _run(model, batch, shift_labels=batch["labels"], fused_lm_head=True).log_probs[0]
    shape = (len(batch["answer_lengths"]), int(batch["answer_lengths"].max()))
    padded: torch.Tensor = logps.new_zeros(shape[0] * shape[1]).index_copy(0, batch["label_slots"], logps)
    return padded.view(shape)


def by_row(logps: torch.Tensor, rows: Sequence[Row]) -> list[list[float]]:
    """The log-probability of each whole answer of each row, from those of their tokens."""
    answers = iter(logps.sum(1).tolist())
    return [[next(answers) for _ in row["answers"]] for row in rows]


@torch.no_grad()
def answer_logps(model: Any, rows: Sequence[Row], batch_pairs: int) -> list[list[float]]:
    """For each row, the log-probability (nats) of each of its answers under a model that was prepared."""
    logps: dict[int, list[float]] = {}
    for batch in length_batches(rows, batch_pairs):
        part = [rows[at] for at in batch]
        inputs = send_to_device(collate(part, model.device.type), model.device)
        logps |= zip(batch, by_row(token_logps(model, inputs), part), strict=True)
    return [logps[at] for at in range(len(rows))]


@torch.no_grad()
def reference_kl(model: PeftModel, batch: Mapping[str, Any]) -> float:
    """KL(policy || reference) in nats per token: a mean over KL_TOKENS answer tokens spread evenly over a batch.

    At each of them sum_v pi(v) (log pi(v) - log ref(v)) over the whole vocabulary, given the prompt and the answer so
    far: the terms of the Rao-Blackwellised estimator of Amini, Vieira, Cotterell (2025, arXiv 2504.10637), with less
    variance than log pi - log ref of the tokens that are there, and never negative. The contexts are the held-out
    answers, not samples of the policy. The reference is the model without its adapter.
    """
    num_labels = batch["labels"].shape[1]
    positions = torch.linspace(0, num_labels - 1, min(num_labels, KL_TOKENS)).long()
    tuned = _run(model, batch, logits_to_keep=positions).logits.float().log_softmax(-1)
    with model.disable_adapter():
        untuned = _run(model, batch, logits_to_keep=positions).logits.float().log_softmax(-1)
    return float((tuned.exp() * (tuned - untuned)).sum(-1).mean())
