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
from peft import PeftModel
from trl import DPOTrainer

from cpt_ray.logprobs.grid import (
    MAX_PADDING,
    _num_tokens,
    collate,
    length_batches,
    prepare_model,
    run_grid,
)
from cpt_ray.logprobs.rows import Row
from cpt_ray.training.rows import held_out_metrics, steps_per_epoch

KL_TOKENS = 128
"""Positions per batch at which `reference_kl` looks at the whole vocabulary."""
UNMEASURED = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""TRL's metrics that need more than the labels' log-probabilities: not computed, and so not logged."""


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
    """

    loss_is_scaled_for_ga = True
    accelerator: Any
    control: Any
    train_dataset: Any
    eval_dataset: Any
    loss_weights: list[float]
    precompute_ref_logps: bool

    def __init__(self, *, args: Any, step_pairs: int, **kwargs: Any):
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
        prepare_model(self.model)
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
                token_logps = run_grid(model, inputs)
                self._trl_loss(token_logps, inputs, torch.ones(2), num_counted)
                if isinstance(model, PeftModel):
                    self._sums["eval"]["kl"] += reference_kl(model, inputs) * num_counted
            logps = token_logps.sum(1).tolist()
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

    def _trl_loss(self, token_logps: torch.Tensor, inputs: Any, share: torch.Tensor, num_counted: int) -> torch.Tensor:
        """TRL's loss of one batch from its log-probabilities; its metrics are added up, `num_counted` times."""
        mode = "train" if self.model.training else "eval"
        with self._inside_trl(share):
            loss: torch.Tensor = super()._compute_loss(_spread(token_logps, inputs), _as_pairs(inputs), False)
        metrics, sums = self._metrics[mode], self._sums[mode]
        for name in set(metrics) - {"num_tokens", *UNMEASURED}:
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


def _spread(token_logps: torch.Tensor, batch: Mapping[str, Any]) -> Callable[..., SimpleNamespace]:
    """Called by TRL as the model is: the answers' log-probabilities, spread out over the 2Q rows of TRL."""

    def spread(**_: Any) -> SimpleNamespace:
        log_probs = token_logps[torch.cat([batch["chosen"], batch["rejected"]])]
        none = torch.zeros_like(log_probs, requires_grad=False)  # for UNMEASURED, which TRL computes all the same
        return SimpleNamespace(log_probs=log_probs, entropy=none, mean_logits=none, is_top1=none.bool())

    return spread
