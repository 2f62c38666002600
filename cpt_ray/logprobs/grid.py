"""Rows as batches without padding, and the log-probabilities of their answers by any transformers causal LM.

A row's prompt is run once, followed by each of its answers; `grid_attention` gives every answer its own prompt and
nothing of the other answers. A prompt's last token predicts the first token of each of its answers, so it is run not
with the prompt but in front of every answer: each position of an answer's segment then has exactly one label.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from cpt_ray.logprobs.rows import Row

ATTENTION = "cpt_grid"
"""The name that `grid_attention` has in transformers."""
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
MAX_PADDING = {"cpu": 0.1, "cuda": 0.5}
"""Share of padding in attention, by device; larger means fewer, larger kernels."""
LOGITS_TILE = 2**22
"""Logits that are held at a time."""


def collate(rows: Sequence[Row], max_padding: float = 0.1) -> dict[str, Any]:
    """Rows as one sequence without padding: T tokens, N of them in S answers under R prompts, Q pairs.

    Args:
        max_padding: answers are run together in attention if none is shorter than the longest by more than this share
            (1: all at once).

    Returns:
        input_ids, position_ids: [1, T], all prompts (less their last token), then all answers.
        labels: [1, N], the token that each answer position predicts.
        grid: where the tokens are, for `grid_attention`.
        label_slots: [N], where a label's log-probability belongs in [S, longest answer], flattened.
        answer_lengths: [S]. chosen, rejected: [Q], indices of answers. ref_logps: [S], if known.
    """
    sizes, answers = [len(one["answers"]) for one in rows], [answer for one in rows for answer in one["answers"]]
    prompts, owner = [one["prompt"] for one in rows], [at for at, size in enumerate(sizes) for _ in range(size)]
    heads = [torch.tensor(one[:-1], dtype=torch.long) for one in prompts]
    segments = [torch.tensor([prompts[at][-1], *one[:-1]]) for at, one in zip(owner, answers, strict=True)]
    head_lengths, lengths = torch.tensor([len(one) for one in heads]), torch.tensor([len(one) for one in answers])
    starts = [torch.arange(len(one)) for one in heads]
    starts += [torch.arange(len(one)) + head_lengths[at] for at, one in zip(owner, answers, strict=True)]
    shifts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    batch = {
        "input_ids": torch.cat(heads + segments)[None],
        "position_ids": torch.cat(starts)[None],
        "labels": torch.tensor([token for one in answers for token in one])[None],
        "grid": _attention_layout(head_lengths, lengths, torch.tensor(owner), max_padding),
        "label_slots": (torch.arange(int(lengths.max())) < lengths[:, None]).flatten().nonzero()[:, 0],
        "answer_lengths": lengths,
    }
    for name in ("chosen", "rejected"):
        found = [at + shift for one, shift in zip(rows, shifts, strict=False) for at in one[name]]
        batch[name] = torch.tensor(found, dtype=torch.long)
    if all(one["ref_logps"] for one in rows):
        batch["ref_logps"] = torch.tensor([one for row in rows for one in row["ref_logps"]])
    return batch


def _attention_layout(
    head_lengths: torch.Tensor, lengths: torch.Tensor, owner: torch.Tensor, max_padding: float
) -> dict[str, Any]:
    """What `grid_attention` needs; P, A and C = P + A are padded lengths.

    Returns:
        prompts: [R, P], token indices (padding: 0).
        answers: groups of s answers of like lengths: (queries [s, A], keys [s, C], both token indices, and
            mask [s, 1, A, C], 0 where a token may look, else -inf).
        slots: [T], where each token is in the flattened [R, P], [s, A], [s, A] ...
    """
    prompt_index, inside = _runs(head_lengths, torch.cat([head_lengths.new_zeros(1), head_lengths.cumsum(0)])[:-1])
    starts = head_lengths.sum() + lengths.cumsum(0) - lengths
    order, tokens, groups = lengths.argsort(descending=True, stable=True), [prompt_index[inside]], []
    slots, shift = [inside.flatten().nonzero()[:, 0]], prompt_index.numel()
    while len(order):
        size = int((lengths[order] >= (1 - max_padding) * lengths[order[0]]).sum())
        group, order = order[:size], order[size:]
        index, inside = _runs(lengths[group], starts[group])
        width, longest = prompt_index.shape[1], index.shape[1]
        sees_prompt = (torch.arange(width) < head_lengths[owner[group], None])[:, None].expand(-1, longest, -1)
        sees_answer = torch.ones(longest, longest, dtype=torch.bool).tril().expand(size, -1, -1)
        hidden = ~torch.cat([sees_prompt, sees_answer], dim=2)[:, None]
        keys = torch.cat([prompt_index[owner[group]], index], dim=1)
        groups.append((index, keys, torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)))
        tokens.append(index[inside])
        slots.append(inside.flatten().nonzero()[:, 0] + shift)
        shift += index.numel()
    return {"prompts": prompt_index, "answers": groups, "slots": torch.cat(slots)[torch.cat(tokens).argsort()]}


def _runs(lengths: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token indices [rows, longest] of runs of tokens (padding: 0), and which of them are no padding."""
    at = torch.arange(int(lengths.max()))
    inside = at < lengths[:, None]
    return (at + starts[:, None]).masked_fill(~inside, 0), inside


def grid_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    grid: dict[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of a batch of `collate`: prompts to themselves, answers to their prompt and themselves.

    A transformers attention function (without `grid`: plain SDPA). It works on padded copies of [R, P] and
    [S, A] tokens, so nothing is computed between answers, and nothing but attention sees padding.

    Args:
        query, key, value: [1, heads, T, head size].
    """
    if grid is None:
        if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:  # the mask of `run_grid`
            raise ValueError(f"{type(module).__name__} is not given the layout of rows: this model is not supported")
        extra = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **extra)
        return out
    if sliding_window is not None and max(keys.shape[1] for _, keys, _ in grid["answers"]) > sliding_window:
        raise ValueError(f"sequences longer than the model's sliding window ({sliding_window}) cannot be trained here")
    num_groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    queries, keys, values = (one[0].transpose(0, 1) for one in (query, key, value))  # [T, heads, head size]

    def attend(queries_at: torch.Tensor, keys_at: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            one.index_select(0, at.flatten()).view(*at.shape, *one.shape[1:]).transpose(1, 2)
            for one, at in ((queries, queries_at), (keys, keys_at), (values, keys_at))
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return mixed.transpose(1, 2).flatten(0, 1)

    prompts = grid["prompts"]
    parts = [attend(prompts, prompts, None)] if prompts.numel() else []
    parts += [attend(index, context, mask.to(query.dtype)) for index, context, mask in grid["answers"]]
    return torch.cat(parts).index_select(0, grid["slots"])[None], None


AttentionInterface.register(ATTENTION, grid_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


class FrozenHeadLogProbs(torch.autograd.Function):
    """log softmax(W h)[y] of each token, for weights W [V, H] that are not trained.

    d/dh = W[y] - softmax(W h) W does not depend on what comes later, so it is made in the forward pass from the same
    tile of logits (as Liger's fused cross-entropy does): two matrix products per tile instead of TRL's three, and
    [N, H] kept instead of [N, V].
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """hidden [N, H], labels [N] to [N], float32."""
        weight = (weight.full_tensor() if isinstance(weight, DTensor) else weight).to(hidden)
        labels = labels.to(hidden.device)
        found = torch.empty(len(labels), dtype=torch.float32, device=hidden.device)
        gradient = torch.empty(hidden.shape, device=hidden.device) if ctx.needs_input_grad[0] else None
        size = max(1, LOGITS_TILE // len(weight))
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            logits = (hidden[part] @ weight.T).float()
            target = logits.gather(1, labels[part, None])[:, 0]
            top = logits.amax(1, keepdim=True)
            total = logits.sub_(top).exp_().sum(1, keepdim=True)  # logits now hold exp(logit - top)
            found[part] = target - (top + total.log())[:, 0]
            if gradient is not None:
                expected = (logits.to(weight.dtype) @ weight).float() / total
                gradient[part] = weight[labels[part]] - expected
        ctx.save_for_backward(gradient)
        ctx.dtype = hidden.dtype
        return found

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
    add_fused_lm_head(base)
    head, config, fused = base.get_output_embeddings(), base.config.get_text_config(), base.forward
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    is_plain = head.bias is None and all(getattr(config, name, None) is None for name in scales)
    if head.weight.requires_grad or not is_plain:
        return  # TRL's head

    @functools.wraps(fused)
    def forward(*args: Any, shift_labels: Any = None, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head or shift_labels is None:
            given = {} if shift_labels is None else {"shift_labels": shift_labels}
            return fused(*args, fused_lm_head=fused_lm_head, **given, **kwargs)
        hidden = base.base_model(*args, **kwargs).last_hidden_state
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        weight = base.get_output_embeddings().weight  # FSDP replaces it after this function was made
        logps = FrozenHeadLogProbs.apply(hidden[0].to(dtype), weight, shift_labels[0])  # type: ignore[no-untyped-call]
        return FusedCausalLMOutput(log_probs=logps[None].to(shift_labels.device))  # of a model on several devices

    base.forward = forward


def run_grid(model: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Log-probability of each token of each answer: [S, longest], zero where padded."""
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch["input_ids"].device)
    logps = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=mask,  # of four dimensions: transformers then builds none of its own
        grid=batch["grid"],
        num_labels=batch["labels"].shape[1],
        shift_labels=batch["labels"],
        use_cache=False,
        fused_lm_head=True,
    ).log_probs[0]
    shape = (len(batch["answer_lengths"]), int(batch["answer_lengths"].max()))
    padded: torch.Tensor = logps.new_zeros(shape[0] * shape[1]).index_copy(0, batch["label_slots"], logps)
    return padded.view(shape)


def length_batches(rows: Sequence[Row], batch_pairs: int) -> list[list[int]]:
    """Indices of rows in batches of at most `batch_pairs` pairs (or one row), those of like lengths together.

    Of rows without pairs, answers count.
    """
    order = sorted(range(len(rows)), key=lambda at: _num_tokens(rows[at]))
    batches: list[list[int]] = []
    room = 0
    for at in order:
        size = len(rows[at]["chosen"]) or len(rows[at]["answers"])
        if size > room:
            batches.append([])
            room = batch_pairs
        batches[-1].append(at)
        room -= size
    return batches


def _num_tokens(row: Row) -> int:
    return len(row["prompt"]) - 1 + sum(len(one) for one in row["answers"])


@torch.no_grad()
def answer_logps(model: Any, rows: Sequence[Row], batch_pairs: int) -> list[list[float]]:
    """For each row, the log-probability (nats) of each of its answers under a model that was prepared."""
    found: list[list[float]] = [[] for _ in rows]
    for batch in length_batches(rows, batch_pairs):
        inputs = collate([rows[at] for at in batch], max_padding=MAX_PADDING.get(model.device.type, 0.5))
        logps = run_grid(model, send_to_device(inputs, model.device)).sum(1).tolist()
        for at in batch:
            found[at], logps = logps[: len(rows[at]["answers"])], logps[len(rows[at]["answers"]) :]
    return found
