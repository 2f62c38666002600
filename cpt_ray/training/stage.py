"""Training: DPO on rows of twin pairs (`cpt_ray/training/trl_trainer.py`) on every rank of a Ray Train worker group.

The driver tokenises, checks and selects the pairs, so that a directive is never cut and a pair never loses its twin,
looks up their reference log-probabilities, writes the rows to parquet and starts the workers. A worker group that died
starts again from its last checkpoint; the same command does the same. What is exported is always the last checkpoint,
never the trainer's memory.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt_ray.config import PreferenceRunConfig, TrainConfig, TuneConfig
from cpt_ray.console import say
from cpt_ray.engines.losses import reasons
from cpt_ray.engines.ray_train import WorkerGroup, run_workers
from cpt_ray.errors import UserError
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Row, read_rows_file, rows_path, write_rows
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Pair, Reject
from cpt_ray.tables.rundir import MODEL_INFO_FILE, TRAIN_PROGRESS_FILE, RunDir
from cpt_ray.tables.store_path import StorePath
from cpt_ray.training.checks import check_rows, check_vocabulary, check_workers, open_policy, policy_path
from cpt_ray.training.pairs import TokenPairs, counted, end_pairs, own_pairs, preference_pairs, select_pairs
from cpt_ray.training.publishing import write_cards
from cpt_ray.training.row_making import make_rows, steps_per_epoch
from cpt_ray.training.worker import TrainingTask, work

FAR_NATS = 2.0
"""Of `kl` or `drift` per token: beyond this, a note says that the policy is far from its reference."""
LOSS_RISE = 0.1
"""Nats by which the last loss may exceed the first without a note."""
KEPT_SHARE = 0.9
"""Share of the learned change below which a note is printed."""


def train(
    config: TuneConfig,
    run: RunDir,
    pair_shards: Sequence[str],
    key: str,
    connecting: AbstractContextManager[None] | None = None,
    rubrics: Sequence[Rubric] = (),
) -> dict[str, Any]:
    """Pairs to `run.model` (and `run.adapter`); the summary kept in model/cpt_ray.json.

    Args:
        pair_shards: of the pairs table; not read if the run file names a preference set.
        key: hash of all that the model depends on; a model of the same key is not trained again.
        connecting: connects to Ray, once the pairs are read and checked; without one, Ray is connected already.
        rubrics: of the pairs; read for `train.contrast`.
    """
    done = run.read_json(MODEL_INFO_FILE)
    if done and done["key"] == key:
        say(f"train        done: {done['summary']['steps']} steps on {done['summary']['pairs']} pairs")
        return dict(done["summary"])
    start = time.monotonic()
    settings = config.train
    if isinstance(run.path, StorePath) and "mlflow" in settings.report_to and "MLFLOW_TRACKING_URI" not in os.environ:
        raise UserError("train.report_to: mlflow: its file cannot be in an object store; set MLFLOW_TRACKING_URI")
    begun = _started_rows(run, key)
    data = begun or _tokenised(config, run, pair_shards, key, rubrics)
    num_pairs, num_held_out = (sum(len(row["chosen"]) for row in rows) for rows in (data.rows, data.held_out))
    num_steps = steps_per_epoch(num_pairs, settings.batch_size)
    check_rows(settings, len(data.rows), num_steps)
    with connecting or nullcontext():
        check_workers(settings)
        if begun is None:
            _keep_with_reference(config, run, key, data)
        outcome = _fit(_task(config, run, key, data), math.ceil(settings.epochs * num_steps))
    seconds = round(time.monotonic() - start, 1)
    summary = {"pairs": num_pairs, **_summary(outcome["logs"]), **outcome["export"], "wall_seconds": seconds}
    tokens = round(settings.epochs * sum(len(row["prompt"]) + sum(map(len, row["answers"])) for row in data.rows))
    rows_in = num_pairs + num_held_out + len(data.rejects)
    entry = {"rows_in": rows_in, "rows_out": num_pairs, "rejected": reasons(data.rejects), "wall_seconds": seconds}
    entry |= {"held_out": num_held_out, "steps": summary["steps"], "trained_tokens": tokens}
    run.add_to_ledger("train", entry | {"num_workers": str(settings.num_workers)})
    for note in training_notes(summary):
        say(f"note: train: {note}")
    write_cards(config, run, summary)
    say(f"model        {run.model} ({summary['steps']} steps on {num_pairs} pairs, {num_held_out} held out)")
    run.write_json(MODEL_INFO_FILE, {"key": key, "summary": summary})
    return summary


@dataclass(frozen=True)
class _TrainingSet:
    """Rows to train on, rows held out, and rejects; every pair of the input is in one of the three."""

    rows: list[Row]
    held_out: list[Row]
    rejects: list[Reject]


def _held_out(key: str) -> str:
    return f"{key}-held_out"


def _started_rows(run: RunDir, key: str) -> _TrainingSet | None:
    """The rows of a training that has begun, so that it continues with the same tokens if the template has the time."""
    if not rows_path(run, key).exists():
        return None
    rejects = run.read("rejects", [f"train-{key}"], Reject)
    return _TrainingSet(read_rows_file(rows_path(run, key)), read_rows_file(rows_path(run, _held_out(key))), rejects)


def _tokenised(
    config: TuneConfig, run: RunDir, pair_shards: Sequence[str], key: str, rubrics: Sequence[Rubric]
) -> _TrainingSet:
    """Pairs read, rendered, checked and selected; their rows have no reference yet."""
    settings = config.train
    policy = open_policy(config)
    tokeniser = policy.tokeniser
    unwanted: list[Reject] = []  # by the run file's choice, so not worth a note
    if isinstance(config, PreferenceRunConfig):
        pairs = preference_pairs(config.preferences, tokeniser)
    else:
        for note in tokeniser.check():
            say(f"note: {note}")
        pairs, seen = TokenPairs(), set[str]()
        for shard in pair_shards:  # one after the other, since texts take ten times the memory of their tokens
            own = run.read("pairs", [shard], Pair)
            seen |= {pair.rubric_id for pair in own}
            wanted, others = end_pairs(own, rubrics) if settings.contrast == "ends" else (own, [])
            unwanted += others
            pairs.add(own_pairs(wanted, tokeniser))
            tokeniser.forget()
        kept_rubrics = {pair.rubric_id for pair in pairs} | {reject.rubric_id for reject in pairs.rejects}
        for name in sorted(seen - kept_rubrics):
            say(f"note: rubric {name}: no pair has both answers at its ends, so nothing of it is trained on")
    kept, held_out, rejects = select_pairs(pairs, policy.max_length, settings.max_pairs, settings.held_out, config.seed)
    lost = pairs.rejects + unwanted + rejects
    run.write("rejects", f"train-{key}", lost)
    noted = rejects if isinstance(config, PreferenceRunConfig) else pairs.rejects + rejects
    if not kept:
        remedy = "; raise train.max_length" if any(reject.reason == "too long" for reject in lost) else ""
        why = f"none of {len(lost)} is left: {counted(lost)}{remedy}" if lost else "see the rejects table for why"
        run.add_to_ledger("train", {"rows_in": len(lost), "rows_out": 0, "rejected": reasons(lost)})
        raise UserError(f"train: there are no pairs; {why}")
    if noted:
        say(f"note: {len(noted)} pairs are not trained on: {counted(noted)}")
    _say_selection(settings, len(kept), len(held_out), len(unwanted))
    check_vocabulary(kept, policy.vocabulary)
    rows, held_rows = (make_rows(selected, settings.micro_batch_size) for selected in (kept, held_out))
    return _TrainingSet(rows, held_rows, lost)


def _say_selection(settings: TrainConfig, kept: int, held_out: int, unwanted: int) -> None:
    shown = f"{kept:,} pairs, {held_out:,} held out"
    if held_out < settings.held_out and "held_out" in settings.model_fields_set:
        shown += f" (train.held_out is {settings.held_out:,}; at most a tenth, of whole prompts)"
    if unwanted:
        shown += f"; {unwanted:,} with a middle level are left out (train.contrast: ends)"
    say(f"train        {shown}")


def _keep_with_reference(config: TuneConfig, run: RunDir, key: str, data: _TrainingSet) -> None:
    """Writes the rows with their reference, the training rows last, so that where they are, all is there."""
    whole = add_reference(config, run, data.rows + data.held_out)
    write_rows(run, _held_out(key), whole[len(data.rows) :])
    write_rows(run, key, whole[: len(data.rows)])


def _summary(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the trainer's log: each step, each measurement, the last tenth of the steps in two numbers."""
    names = {"step": "step", "loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    history = [{name: log[logged] for name, logged in names.items()} for log in logs if "loss" in log]
    measured = [log for log in logs if "eval_loss" in log]
    last = history[-max(1, len(history) // 10) :]
    return {
        "steps": history[-1]["step"],
        "first_loss": history[0]["loss"],
        "last_loss": sum(step["loss"] for step in last) / len(last),
        "last_accuracy": sum(step["accuracy"] for step in last) / len(last),
        "history": history,
        "held_out": [{name.removeprefix("eval_"): log[name] for name in log if name != "epoch"} for log in measured],
    }


def _task(config: TuneConfig, run: RunDir, key: str, data: _TrainingSet) -> TrainingTask:
    name = config.policy.model if config.policy.is_stored else config.policy.gguf  # each node has its own of these
    return TrainingTask(
        config,
        RunDir(run.path.absolute()),
        key,
        policy=str(Path(name).absolute()) if Path(name).is_file() else name or policy_path(config),
        rows=str(rows_path(run, key)),
        held_out=str(rows_path(run, _held_out(key))) if data.held_out else None,
    )


def _fit(task: TrainingTask, num_steps: int) -> dict[str, Any]:
    """Runs the workers to their end; what `work` returns."""
    settings = task.config.train
    group = WorkerGroup(
        stage="train",
        num_workers=settings.num_workers,
        use_gpu=settings.use_gpu,
        resources=settings.worker_resources,
        max_failures=settings.max_failures,
        resumes_from="from the last checkpoint",
        less_memory="train.micro_batch_size or train.max_length",
    )
    outcome: dict[str, Any] = run_workers(
        work,
        {"task": task},
        group,
        name=task.key,
        storage=settings.checkpoints or str(task.run.checkpoints),
        state=task.run.path / TRAIN_PROGRESS_FILE,
        title="train",
        steps=num_steps,
    )
    if outcome["refused"]:
        raise UserError(f"train: {outcome['refused']}")
    return outcome


def training_notes(summary: dict[str, Any]) -> list[str]:
    """Warnings about a training that ended without an error but may have learned little, or too much."""
    notes: list[str] = []
    last = summary["held_out"][-1] if summary["held_out"] else {}
    gone = {name: last[name] for name in ("kl", "drift") if last.get(name, 0) > FAR_NATS}
    if gone:
        shown = " and ".join(f"{name} {value:.1f}" for name, value in gone.items())
        notes.append(
            f"the policy is far from what it was ({shown} nats per token held out), its answers may be nonsense; lower "
            "train.learning_rate or train.epochs, or raise train.beta"
        )
    if not summary["held_out"]:
        notes.append(
            "no pair is held out, so nothing is measured on other prompts (at most a tenth of the pairs, whole prompts)"
        )
    if summary["last_loss"] > summary["first_loss"] + LOSS_RISE:
        notes.append(
            f"the loss rose from {summary['first_loss']:.3f} to {summary['last_loss']:.3f}; lower train.learning_rate"
        )
    if summary["kept_share"] < KEPT_SHARE:
        same = f" ({summary['unchanged']} of {summary['trained']} tensors are the policy's own)"
        notes.append(
            f"in the merged weights {summary['dtype']} keeps {summary['kept_share']:.0%} of what was learned"
            f"{same if summary['unchanged'] else ''}; train longer or with a higher train.learning_rate, or use the "
            "adapter, which is whole"
        )
    return notes
