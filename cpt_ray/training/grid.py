"""DPO on rows of cells: each distinct (directive, answer) is run once, and its prompt once per directive.

TRL's trainer sees 2K(K-1) sequences in the K(K-1) ordered pairs of a cell's K answers; only K^2 of them differ, and
they have only K different prompts. `GridTrainer` is TRL's `DPOTrainer` with another batch: a batch is some rows
(`cpt_ray/training/rows.py`), laid out without padding as all their prompts followed by all their answers. Linear
layers and the LM head see each token once; `grid_attention` gives every answer its own prompt and nothing of the other
answers. The per-token log-probabilities are then spread out over the pairs, and TRL's own `_compute_loss` does the
rest, so every loss type, weight and metric is TRL's.

A prompt's last token predicts the first token of each of its answers. It is therefore not run with the prompt but once
in front of every answer, so that each position of an answer's segment has exactly one label.

GridTrainer(model=..., args=DPOConfig(...), train_dataset=rows, step_pairs=32, peft_config=...).train()
"""

from __future__ import annotations

import copy
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from peft import PeftModel
from torch.distributed.tensor import DTensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from trl import DPOTrainer
from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head

from cpt_ray.training.rows import Row, held_out_metrics, steps_per_epoch

ATTENTION = "cpt_grid"
"""The name that `grid_attention` has in transformers."""
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}
MAX_PADDING = {"cpu": 0.1, "cuda": 0.5}
"""Share of padding in attention, by device; larger means fewer, larger kernels."""
LOGITS_TILE = 2**22
"""Logits that are held at a time."""
KL_TOKENS = 128
"""Positions per batch at which `reference_kl` looks at the whole vocabulary."""
UNMEASURED = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""TRL's metrics that need more than the labels' log-probabilities; logged with `token_metrics=True` only."""


# ---------------------------------------------------------------- from rows to a batch


def collate(rows: Sequence[Row], share_prompts: bool = True, max_padding: float = 0.1) -> dict[str, Any]:
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
    if not share_prompts:
        prompts, owner = [prompts[at] for at in owner], list(range(len(owner)))
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


# ---------------------------------------------------------------- from rows to steps


def rate_share(step: int, num_steps: int, num_warmup: int) -> float:
    """Share of the learning rate at a step, from 0: 1/n, 2/n ... 1 over n steps of warm-up, then linearly towards 0.

    transformers' own schedule begins at 0, so that its first step, and all of a training of one step, learns nothing.
    """
    if step < num_warmup:
        return (step + 1) / num_warmup
    return max(0.0, (num_steps - step) / (num_steps - num_warmup))


@dataclass(frozen=True)
class StepPlan:
    """How many rows go where: `num_steps` optimizer steps of an epoch, whatever the number of workers."""

    num_rows: int
    num_steps: int
    num_batches: int
    """Batches per step and worker."""

    @classmethod
    def make(cls, num_pairs: Sequence[int], step_pairs: int, batch_pairs: int, num_workers: int) -> StepPlan:
        """`num_pairs` of each row; about `step_pairs` in a step of all workers, at most `batch_pairs` in a batch."""
        num_rows, num_steps = len(num_pairs), steps_per_epoch(sum(num_pairs), step_pairs)
        if num_rows // num_steps < num_workers:
            raise ValueError(
                f"{num_rows} rows in {num_steps} steps are too few for {num_workers} workers: fewer workers or a "
                "larger batch size"
            )
        batch_rows = max(1, batch_pairs // max(num_pairs))
        wanted = math.ceil(math.ceil(num_rows / num_steps) / (num_workers * batch_rows))
        return cls(num_rows, num_steps, min(wanted, num_rows // num_steps // num_workers))


class StepBatches(torch.utils.data.Sampler[list[int]]):
    """One worker's batches: a new random order of cells per epoch, cut into steps, each dealt out like cards.

    A cell's rows stay together: in a step with all of them, each answer is chosen as often as it is rejected, so what
    is the same under every directive cancels out. Within a step, rows are dealt in the order of their lengths, so that
    batches which run at the same time are of like sizes. What is in a step depends on seed and epoch alone: not on
    the number of workers, nor on restarts.
    """

    def __init__(
        self, rows: Sequence[Row], plan: StepPlan, rank: int, num_workers: int, seed: int, epoch: Callable[[], int]
    ):
        self.plan, self.rank, self.num_workers, self.seed, self.epoch = plan, rank, num_workers, seed, epoch
        self._lengths = [_num_tokens(one) for one in rows]
        cells: dict[str, list[int]] = defaultdict(list)
        for at, row in enumerate(rows):
            cells[row["cell_id"] or f"row {at}"].append(at)
        self._cells = list(cells.values())

    def __len__(self) -> int:
        return self.plan.num_steps * self.plan.num_batches

    def __iter__(self) -> Iterator[list[int]]:
        random = torch.Generator().manual_seed(self.seed + self.epoch())
        cells: list[int] = torch.randperm(len(self._cells), generator=random).tolist()
        order = [row for at in cells for row in self._cells[at]]
        size = self.plan.num_batches * self.num_workers
        for step in range(self.plan.num_steps):
            cut = [at * self.plan.num_rows // self.plan.num_steps for at in (step, step + 1)]
            hands: list[list[int]] = [[] for _ in range(size)]
            for at, row in enumerate(sorted(order[slice(*cut)], key=lambda row: (-self._lengths[row], row))):
                turn, place = divmod(at, size)
                hands[place if turn % 2 == 0 else size - 1 - place].append(row)
            yield from hands[self.rank :: self.num_workers]


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


# ---------------------------------------------------------------- the model's part


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


def prepare_model(model: Any, outputs: tuple[str, ...]) -> None:
    """Gives a causal LM rows' attention and a fused head for answers only, that computes no more than `outputs`."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    others = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - ATTENTION_LAYERS
    if others:
        raise ValueError(f"layers of type {', '.join(sorted(others))} cannot keep a row's answers apart")
    base.set_attn_implementation(ATTENTION)
    base.base_model.register_forward_hook(_keep_answers, with_kwargs=True)
    add_fused_lm_head(base, outputs=outputs)
    head, config, fused = base.get_output_embeddings(), base.config.get_text_config(), base.forward
    scales = ("final_logit_softcapping", "logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")
    is_plain = head.bias is None and all(getattr(config, name, None) is None for name in scales)
    if outputs != ("log_probs",) or head.weight.requires_grad or not is_plain:
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


def run_grid(model: Any, batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Per-token outputs of the fused LM head (log_probs, ...) for each answer: [S, longest], zero where padded."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch["input_ids"].device)
    output = model(
        input_ids=batch["input_ids"],
        position_ids=batch["position_ids"],
        attention_mask=one,  # of four dimensions: transformers then builds none of its own
        grid=batch["grid"],
        num_labels=batch["labels"].shape[1],
        shift_labels=batch["labels"],
        use_cache=False,
        fused_lm_head=True,
    )
    shape = (len(batch["answer_lengths"]), int(batch["answer_lengths"].max()))
    names = ("log_probs", "entropy", "mean_logits", "is_top1")
    found = {name: value for name in names if (value := getattr(output, name)) is not None}
    return {
        name: value.new_zeros(shape[0] * shape[1]).index_copy(0, batch["label_slots"], value[0]).view(shape)
        for name, value in found.items()
    }


@torch.no_grad()
def reference_kl(model: PeftModel, batch: Mapping[str, Any]) -> float:
    """KL(policy || reference) in nats per token: a mean over KL_TOKENS answer tokens spread evenly over a batch.

    At each of them sum_v pi(v) (log pi(v) - log ref(v)) over the whole vocabulary, given the prompt and the answer so
    far: the terms of the Rao-Blackwellised estimator of Amini, Vieira, Cotterell (2025, arXiv 2504.10637), with less
    variance than log pi - log ref of the tokens that are there, and never negative. The contexts are the held-out
    answers, not samples of the policy. The reference is the model without its adapter.
    """
    num_labels = batch["labels"].shape[1]
    inputs = {name: batch[name] for name in ("input_ids", "position_ids", "grid")} | {
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch["input_ids"].device),
        "num_labels": num_labels,
        "logits_to_keep": torch.linspace(0, num_labels - 1, min(num_labels, KL_TOKENS)).long(),
        "use_cache": False,
    }
    tuned = model(**inputs).logits.float().log_softmax(-1)
    with model.disable_adapter():
        untuned = model(**inputs).logits.float().log_softmax(-1)
    return float((tuned.exp() * (tuned - untuned)).sum(-1).mean())


@torch.no_grad()
def answer_logps(model: Any, rows: Sequence[Row], batch_pairs: int) -> list[list[float]]:
    """For each row, the log-probability (nats) of each of its answers under a model that was prepared."""
    found: list[list[float]] = [[] for _ in rows]
    for batch in length_batches(rows, batch_pairs):
        inputs = collate([rows[at] for at in batch], max_padding=MAX_PADDING.get(model.device.type, 0.5))
        logps = run_grid(model, send_to_device(inputs, model.device))["log_probs"].sum(1).tolist()
        for at in batch:
            found[at], logps = logps[: len(rows[at]["answers"])], logps[len(rows[at]["answers"]) :]
    return found


# ---------------------------------------------------------------- the trainer


@dataclass
class _Alone:
    """Stands for the accelerator inside TRL's loss: metrics stay local there and are reduced once per log."""

    device: torch.device

    def gather(self, value: torch.Tensor) -> torch.Tensor:
        return value

    gather_for_metrics = gather


class GridTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's `DPOTrainer` whose examples are rows with their reference log-probabilities.

    A step's loss is TRL's on all pairs of that step at once, whatever the batches and workers: each batch is weighted
    by its share of the step's pairs (`sft`: of its chosen tokens, over which TRL averages). The gradient accumulation
    follows from `step_pairs` and the number of workers; `per_device_train_batch_size` counts pairs.

    Args:
        train_dataset, eval_dataset: data sets of `Row`.
        step_pairs: pairs per optimizer step of all workers, on average.
        token_metrics: also compute what TRL logs about tokens (see UNMEASURED).
    """

    loss_is_scaled_for_ga = True
    accelerator: Any
    control: Any
    train_dataset: Any
    eval_dataset: Any
    loss_weights: list[float]
    precompute_ref_logps: bool

    def __init__(self, *, args: Any, step_pairs: int, token_metrics: bool = False, **kwargs: Any):
        self.token_metrics = token_metrics
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        args = copy.copy(args)
        # with all weights trained, TRL must not load a second model; with LoRA, it must not hash the first one
        is_peft = kwargs.get("peft_config") is not None or isinstance(kwargs.get("model"), PeftModel)
        args.precompute_ref_log_probs = not is_peft
        # transformers does not save the optimizer of a model that was sharded when it was loaded, since its states
        # would be shards; adapters, and so theirs, are whole on every worker
        args.save_only_model, saves_only_model = is_peft, args.save_only_model
        args.router_aux_loss_coef = 0.0  # of mixtures of experts: the loss is DPO's alone
        collator = functools.partial(collate, max_padding=MAX_PADDING.get(args.device.type, 0.5))
        super().__init__(args=args, data_collator=kwargs.pop("data_collator", None) or collator, **kwargs)
        self.args.save_only_model = saves_only_model
        self.precompute_ref_logps = True
        for value in self.model.parameters():
            if value.requires_grad and is_peft:  # TRL makes the adapters of a quantised model bfloat16
                value.data = value.data.float()
        outputs = ("log_probs", *(("entropy", "mean_logits", "is_top1") if token_metrics else ()))
        prepare_model(self.model, outputs)
        num_pairs = [len(one) for one in self.train_dataset["chosen"]]
        batch_pairs = self.args.per_device_train_batch_size
        self.plan = StepPlan.make(num_pairs, step_pairs, batch_pairs, self.accelerator.num_processes)
        self.args.gradient_accumulation_steps = self.plan.num_batches

    # data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """TRL's hook; rows are tokenised already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """TRL's hook; rows bring theirs."""
        return dataset

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Row]:
        """This worker's batches (`StepBatches`)."""
        sampler = StepBatches(
            self.train_dataset,
            self.plan,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.args.seed,
            lambda: int(self.state.epoch or 0),
        )
        pin = self.args.dataloader_pin_memory
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=sampler, collate_fn=self.data_collator, pin_memory=pin
        )

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """transformers' hook: `rate_share` of the learning rate at each step."""
        asked = self.args.warmup_steps
        num_warmup = int(asked * num_training_steps if asked < 1 else asked)
        share = functools.partial(rate_share, num_steps=num_training_steps, num_warmup=num_warmup)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """TRL's metrics and `held_out_metrics` on `eval_dataset`, which all workers share out among them."""
        rows, model = list(self.eval_dataset), self.model
        rank, num_workers = self.accelerator.process_index, self.accelerator.num_processes
        batches = length_batches(rows, self.args.per_device_train_batch_size)
        found: dict[int, list[float]] = {}
        model.eval()
        for start in range(0, len(batches), num_workers):
            # a worker without a batch runs another's, uncounted: a sharded model needs every worker in every pass
            at = start + rank
            batch = batches[at % len(batches)]
            inputs = self._prepare_inputs(self.data_collator([rows[one] for one in batch]))
            num_counted = len(inputs["chosen"]) if at < len(batches) else 0
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = run_grid(model, inputs)
                self._trl_loss(outputs, inputs, torch.ones(2), num_counted)
                if isinstance(model, PeftModel):
                    self._sums["eval"]["kl"] += reference_kl(model, inputs) * num_counted
            logps = outputs["log_probs"].sum(1).tolist()
            for one in batch:
                found[one], logps = logps[: len(rows[one]["answers"])], logps[len(rows[one]["answers"]) :]
        parts: list[Any] = [found] * num_workers
        if num_workers > 1:
            torch.distributed.all_gather_object(parts, found)
        whole = {at: logps for part in parts for at, logps in part.items()}
        metrics = held_out_metrics(rows, [whole[at] for at in range(len(rows))])
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(logged)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """transformers' hook; without the names of what is trained PEFT would gather a sharded model, on one worker."""
        if state_dict is None and isinstance(self.model, PeftModel):
            state_dict = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        super()._save(output_dir, state_dict)

    # loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """[pairs, chosen tokens] of the optimizer step, over its micro-batches and all workers."""
        counts = torch.stack([_counts(one) for one in batch_samples]).sum(0).to(device)
        total: torch.Tensor = self.accelerator.gather(counts[None]).sum(0)
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        counts = _counts(inputs)
        share = torch.ones(2)
        if num_items_in_batch is not None:  # workers' gradients are averaged, hence the factor
            share = (counts.to(num_items_in_batch) * self.accelerator.num_processes / num_items_in_batch).cpu()
        return self._trl_loss(run_grid(model, inputs), inputs, share, len(inputs["chosen"]))

    def _trl_loss(
        self, outputs: dict[str, torch.Tensor], inputs: Any, share: torch.Tensor, num_counted: int
    ) -> torch.Tensor:
        """TRL's loss of one batch, from its per-token outputs; its metrics are added up, `num_counted` times."""
        mode = "train" if self.model.training else "eval"
        with self._inside_trl(share):
            loss: torch.Tensor = super()._compute_loss(_spread(outputs, inputs), _as_pairs(inputs), False)
        metrics, sums = self._metrics[mode], self._sums[mode]
        for name in set(metrics) - {"num_tokens"} - (set() if self.token_metrics else set(UNMEASURED)):
            sums[name] += metrics[name][-1] * num_counted
        if mode == "eval":
            sums["loss"] += loss.item() * num_counted
        sums["pairs"] += num_counted
        metrics.clear()
        return loss

    @contextmanager
    def _inside_trl(self, share: torch.Tensor) -> Iterator[None]:
        """TRL's loss of one micro-batch: no communication, and each loss type weighted by its share of the step."""
        accelerator, weights = self.accelerator, self.loss_weights
        pairs, tokens = share.tolist()
        shares = (tokens if name == "sft" else pairs for name in self.loss_types)
        self.loss_weights = [weight * one for weight, one in zip(weights, shares, strict=True)]
        self.accelerator = _Alone(accelerator.device)
        try:
            yield
        finally:
            self.accelerator, self.loss_weights = accelerator, weights

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Metrics are means over all pairs since the last log, of all workers."""
        mode = "train" if self.model.training else "eval"
        sums = self._sums[mode]
        if sums:
            names = sorted(sums)
            values = torch.tensor([*(sums[name] for name in names), self._total_train_tokens], dtype=torch.float64)
            total = self.accelerator.gather(values[None].to(self.accelerator.device)).sum(0).tolist()
            reduced = dict(zip(names, total, strict=False))
            pairs = reduced.pop("pairs")
            self._metrics[mode].update({name: [value / pairs] for name, value in reduced.items()})
            self._metrics[mode]["num_tokens"] = [total[-1]]
            sums.clear()
        super().log(logs, start_time)


def _counts(batch: Mapping[str, Any]) -> torch.Tensor:
    """[pairs, tokens of their chosen answers] of a batch."""
    tokens = batch["answer_lengths"][batch["chosen"]].sum()
    return torch.stack([torch.full_like(tokens, len(batch["chosen"])), tokens])


def _as_pairs(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """A batch as TRL's loss wants it: 2Q rows, first the chosen ones; an answer is preceded by one token."""
    both = torch.cat([batch["chosen"], batch["rejected"]])
    lengths = batch["answer_lengths"]
    inside = torch.arange(int(lengths.max()), device=both.device) < lengths[both, None]
    ref_chosen, ref_rejected = batch["ref_logps"][both].chunk(2)
    mask = torch.cat([torch.zeros_like(inside[:, :1]), inside], dim=1).long()
    return {
        "input_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "attention_mask": torch.ones_like(batch["input_ids"]),  # TRL counts the tokens that are run by it
        "ref_chosen_logps": ref_chosen,
        "ref_rejected_logps": ref_rejected,
    }


def _spread(outputs: Mapping[str, torch.Tensor], batch: Mapping[str, Any]) -> Callable[..., SimpleNamespace]:
    """Called by TRL as the model is: the per-token outputs of the rows' answers, spread out over the 2Q rows of TRL."""

    def spread(**_: Any) -> SimpleNamespace:
        both = torch.cat([batch["chosen"], batch["rejected"]])
        found = {name: value[both] for name, value in outputs.items()}
        unmeasured = torch.zeros_like(found["log_probs"], requires_grad=False)
        empty = {"entropy": unmeasured, "mean_logits": unmeasured, "is_top1": unmeasured.bool()}
        return SimpleNamespace(**empty | found)

    return spread
