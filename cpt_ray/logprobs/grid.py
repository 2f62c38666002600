"""Rows as batches without padding, and the attention of such a batch.

A row's prompt is run once, followed by each of its answers; `grid_attention` gives every answer its own prompt and
nothing of the other answers. A prompt's last token predicts the first token of each of its answers, so it is run not
with the prompt but in front of every answer: each position of an answer's segment then has exactly one label.

Called a grid here (`batch["grid"]`, `grid_attention`, `GridTrainer`): the layout of such a batch, whatever its rows are
of. Elsewhere a grid is one answer at each level of a rubric (`cpt_ray/grids.py`), and `cell_id` in tables and rows is
its id: the rows of a grid have the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from cpt_ray.logprobs.rows import Row, num_tokens

ATTENTION = "cpt_grid"
"""The name that `grid_attention` has in transformers."""
MAX_PADDING = {"cpu": 0.1, "cuda": 0.5}
"""By device: answers are run together in attention if none is shorter than the longest by more than this share. A
larger one means fewer, larger kernels."""


def collate(rows: Sequence[Row], device: str = "cpu") -> dict[str, Any]:
    """Rows as one sequence without padding: T tokens, N of them in S answers under R prompts, Q pairs.

    Args:
        device: type of the device that will run them, by which MAX_PADDING is chosen.

    Returns:
        input_ids, position_ids: [1, T], all prompts (less their last token), then all answers.
        labels: [1, N], the token that each answer position predicts.
        grid: where the tokens are, for `grid_attention`.
        label_slots: [N], where a label's log-probability belongs in [S, longest answer], flattened.
        answer_lengths: [S]. chosen, rejected: [Q], indices of answers. ref_logps: [S], if known.
    """
    prompts, answers = [row["prompt"] for row in rows], [answer for row in rows for answer in row["answers"]]
    sizes = [len(row["answers"]) for row in rows]
    owner = [at for at, size in enumerate(sizes) for _ in range(size)]
    heads = [torch.tensor(prompt[:-1], dtype=torch.long) for prompt in prompts]
    segments = [torch.tensor([prompts[at][-1], *answer[:-1]]) for at, answer in zip(owner, answers, strict=True)]
    head_lengths, lengths = (torch.tensor([len(part) for part in parts]) for parts in (heads, answers))
    positions = [torch.arange(len(head)) for head in heads]
    positions += [torch.arange(len(answer)) + head_lengths[at] for at, answer in zip(owner, answers, strict=True)]
    batch = {
        "input_ids": torch.cat(heads + segments)[None],
        "position_ids": torch.cat(positions)[None],
        "labels": torch.tensor([token for answer in answers for token in answer])[None],
        "grid": _attention_layout(head_lengths, lengths, torch.tensor(owner), MAX_PADDING.get(device, 0.5)),
        "label_slots": (torch.arange(int(lengths.max())) < lengths[:, None]).flatten().nonzero()[:, 0],
        "answer_lengths": lengths,
    }
    shifts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    for name in ("chosen", "rejected"):
        indices = [at + shift for row, shift in zip(rows, shifts, strict=False) for at in row[name]]
        batch[name] = torch.tensor(indices, dtype=torch.long)
    if all(row["ref_logps"] for row in rows):
        batch["ref_logps"] = torch.tensor([logp for row in rows for logp in row["ref_logps"]])
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
        if attention_mask is not None and attention_mask.numel() == 1 < key.shape[2]:  # of `model._run`: a stand-in
            raise ValueError(f"{type(module).__name__} is not given the layout of rows: this model is not supported")
        extra = {"scaling": scaling, "sliding_window": sliding_window, **kwargs}
        out: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **extra)
        return out
    if sliding_window is not None and max(keys.shape[1] for _, keys, _ in grid["answers"]) > sliding_window:
        raise ValueError(f"sequences longer than the model's sliding window ({sliding_window}) cannot be trained here")
    num_groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, num_groups), repeat_kv(value, num_groups)
    queries, keys, values = (states[0].transpose(0, 1) for states in (query, key, value))  # [T, heads, head size]

    def attend(queries_at: torch.Tensor, keys_at: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (
            states.index_select(0, at.flatten()).view(*at.shape, *states.shape[1:]).transpose(1, 2)
            for states, at in ((queries, queries_at), (keys, keys_at), (values, keys_at))
        )
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling)
        return mixed.transpose(1, 2).flatten(0, 1)

    prompts = grid["prompts"]
    parts = [attend(prompts, prompts, None)] if prompts.numel() else []
    parts += [attend(index, context, mask.to(query.dtype)) for index, context, mask in grid["answers"]]
    return torch.cat(parts).index_select(0, grid["slots"])[None], None


# transformers' way to bring an attention function; its layers hand further arguments of the model's call, such as
# `grid`, on to it (transformers 5.19)
AttentionInterface.register(ATTENTION, grid_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def length_batches(rows: Sequence[Row], batch_pairs: int) -> list[list[int]]:
    """Indices of rows in batches of at most `batch_pairs` pairs (or one row), those of like lengths together.

    Of rows without pairs, answers count.
    """
    order = sorted(range(len(rows)), key=lambda at: num_tokens(rows[at]))
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
