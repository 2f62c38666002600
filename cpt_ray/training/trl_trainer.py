"""DPO on rows: each distinct (directive, answer) of a grid is run once, and its prompt once per directive.

TRL's trainer sees 2K(K-1) sequences in the K(K-1) ordered pairs of a grid's K answers; only K^2 of them differ, and
they have only K different prompts. `GridTrainer` is TRL's `DPOTrainer` with another batch: some rows
(`cpt_ray/training/row_making.py`), laid out without padding (`cpt_ray/logprobs/grid.py`), so that linear layers and the
LM head see each token once. The log-probabilities are then spread out over the pairs, and TRL's own `_compute_loss`
does the rest, so every loss type, weight and metric is TRL's.

This file alone relies on what is private in the trainers of TRL and transformers. It holds for trl 1.16.0 and
transformers 5.19; each use says why, and tests/test_trl_contracts.py fails by its name when an upgrade changes it.

GridTrainer(model=..., args=DPOConfig(...), train_dataset=rows, step_pairs=32, peft_config=...).train()
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from peft import PeftModel
from trl import DPOTrainer

from cpt_ray.logprobs.grid import collate, length_batches
from cpt_ray.logprobs.model import by_row, prepare_model, reference_kl, token_logps
from cpt_ray.logprobs.rows import Row
from cpt_ray.training.metrics import held_out_metrics
from cpt_ray.training.steps import StepBatches, StepPlan, rate_share

UNMEASURED = ("entropy", "mean_token_accuracy", "logits/chosen", "logits/rejected")
"""TRL's metrics that need more than the labels' log-probabilities: not computed, and so not logged."""


@dataclass
class _LocalAccelerator:
    """Stands for the accelerator in TRL's loss: metrics stay local there and are reduced once per log."""

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
    """Read by transformers: `compute_loss` has divided by the whole step, so accumulation must not divide again."""
    # set by TRL and transformers, which have no types here
    accelerator: Any
    control: Any
    train_dataset: Any
    eval_dataset: Any
    loss_weights: list[float]
    precompute_ref_logps: bool
    _total_train_tokens: int

    def __init__(self, *, args: Any, step_pairs: int, **kwargs: Any):
        self._sums: dict[str, dict[str, float]] = {"train": defaultdict(float), "eval": defaultdict(float)}
        args = copy.copy(args)
        # with all weights trained, TRL must not load a second model; with LoRA, it must not hash the first one
        is_peft = kwargs.get("peft_config") is not None or isinstance(kwargs.get("model"), PeftModel)
        args.precompute_ref_log_probs = not is_peft
        # transformers refuses to save the optimizer of a model that was sharded when it was loaded, since its states
        # would be shards; adapters, and so theirs, are whole on every worker. The check is in its constructor alone.
        args.save_only_model, saves_only_model = is_peft, args.save_only_model
        args.router_aux_loss_coef = 0.0  # of mixtures of experts: the loss is DPO's alone
        collator = functools.partial(collate, device=args.device.type)
        super().__init__(args=args, data_collator=kwargs.pop("data_collator", None) or collator, **kwargs)
        self.args.save_only_model = saves_only_model
        self.precompute_ref_logps = True  # TRL's loss then takes the reference from the batch, where rows bring it
        for value in self.model.parameters():
            if value.requires_grad and is_peft:  # TRL makes the adapters of a quantised model bfloat16
                value.data = value.data.float()
        prepare_model(self.model)
        num_pairs = [len(chosen) for chosen in self.train_dataset["chosen"]]
        batch_pairs = self.args.per_device_train_batch_size
        self.plan = StepPlan.make(num_pairs, step_pairs, batch_pairs, self.accelerator.num_processes)
        self.args.gradient_accumulation_steps = self.plan.num_batches

    # ---- data

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Called by TRL to tokenise pairs; rows are tokenised already."""
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        """Called by TRL to run the reference; rows bring its log-probabilities."""
        return dataset

    def get_train_dataloader(self) -> torch.utils.data.DataLoader[Row]:
        """This worker's batches (`StepBatches`); transformers has no argument for a sampler of batches."""
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
        """`rate_share` of the learning rate at each step; transformers has no schedule that starts above 0."""
        asked = self.args.warmup_steps
        num_warmup = int(asked * num_training_steps if asked < 1 else asked)
        share = functools.partial(rate_share, num_steps=num_training_steps, num_warmup=num_warmup)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer or self.optimizer, share)
        return self.lr_scheduler

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """TRL's metrics and `held_out_metrics` on `eval_dataset`, which all workers share out among them.

        Not transformers' loop, which measures batch by batch: a pair and its twin are in different rows, and those may
        be in different batches and on different workers.
        """
        rows, model = list(self.eval_dataset), self.model
        rank, num_workers = self.accelerator.process_index, self.accelerator.num_processes
        batches = length_batches(rows, self.args.per_device_train_batch_size)
        own: dict[int, list[float]] = {}
        model.eval()
        for start in range(0, len(batches), num_workers):
            # a worker without a batch runs another's, uncounted: a sharded model needs every worker in every pass
            at = start + rank
            batch = batches[at % len(batches)]
            part = [rows[row] for row in batch]
            inputs = self._prepare_inputs(self.data_collator(part))  # transformers': moves tensors to the device
            num_counted = len(inputs["chosen"]) if at < len(batches) else 0
            with torch.no_grad(), self.compute_loss_context_manager():
                logps = token_logps(model, inputs)
                self._trl_loss(logps, inputs, torch.ones(2), num_counted)
                if isinstance(model, PeftModel):
                    self._sums["eval"]["kl"] += reference_kl(model, inputs) * num_counted
            own |= zip(batch, by_row(logps, part), strict=True)
        parts: list[Any] = [own] * num_workers
        if num_workers > 1:
            torch.distributed.all_gather_object(parts, own)
        whole = {at: logps for part in parts for at, logps in part.items()}
        metrics = held_out_metrics(rows, [whole[at] for at in range(len(rows))])
        logged = {f"eval_{name}": value for name, value in metrics.items()}
        self.log(logged)
        model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, logged)
        return logged

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Called by transformers; unless given what is trained, PEFT would gather a sharded model, on one worker."""
        if state_dict is None and isinstance(self.model, PeftModel):
            state_dict = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        super()._save(output_dir, state_dict)

    # ---- loss

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        """[pairs, chosen tokens] of the optimizer step, over its micro-batches and all workers.

        Called by transformers, which counts labels, of which these batches have none; it only hands the result on to
        `compute_loss`.
        """
        counts = torch.stack([_counts(batch) for batch in batch_samples]).sum(0).to(device)
        total: torch.Tensor = self.accelerator.gather(counts[None]).sum(0)
        return total

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        counts = _counts(inputs)
        share = torch.ones(2)
        if num_items_in_batch is not None:  # workers' gradients are averaged, hence the factor
            share = (counts.to(num_items_in_batch) * self.accelerator.num_processes / num_items_in_batch).cpu()
        return self._trl_loss(token_logps(model, inputs), inputs, share, len(inputs["chosen"]))

    def _trl_loss(self, logps: torch.Tensor, inputs: Any, share: torch.Tensor, num_counted: int) -> torch.Tensor:
        """TRL's loss of a batch from its tokens' log-probabilities; its metrics are added up, `num_counted` times.

        TRL's `_compute_loss` calls the model, takes its losses and gathers its metrics from all workers, all in one. It
        is run on a copy of this trainer that has another accelerator (no communication per batch), other weights (each
        loss type weighted by the batch's share of the step) and metrics of its own.
        """
        mode = "train" if self.model.training else "eval"
        pairs, tokens = share.tolist()
        shares = {"sft": tokens}
        inner = copy.copy(self)
        inner.accelerator = _LocalAccelerator(self.accelerator.device)
        inner.loss_weights = [
            weight * shares.get(name, pairs) for name, weight in zip(self.loss_types, self.loss_weights, strict=True)
        ]
        inner._metrics = {mode: defaultdict(list)}
        loss: torch.Tensor = inner._compute_loss(_spread(logps, inputs), _as_pairs(inputs), False)
        self._total_train_tokens = inner._total_train_tokens
        metrics, sums = inner._metrics[mode], self._sums[mode]
        for name in set(metrics) - {"num_tokens", *UNMEASURED}:
            sums[name] += metrics[name][-1] * num_counted
        if mode == "eval":
            sums["loss"] += loss.item() * num_counted
        sums["pairs"] += num_counted
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Metrics are means over all pairs since the last log, of all workers; TRL logs what is in `_metrics`."""
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
    """A batch as TRL's loss takes it: 2Q rows, first the chosen ones; an answer is preceded by one token."""
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


def _spread(logps: torch.Tensor, batch: Mapping[str, Any]) -> Callable[..., SimpleNamespace]:
    """Called by TRL as the model is: the answers' log-probabilities, spread out over the 2Q rows of TRL."""

    def spread(**_: Any) -> SimpleNamespace:
        log_probs = logps[torch.cat([batch["chosen"], batch["rejected"]])]
        zeros = torch.zeros_like(log_probs, requires_grad=False)  # for UNMEASURED, which TRL computes all the same
        return SimpleNamespace(log_probs=log_probs, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())

    return spread
