"""Training: DPO on rows of twin pairs (`cpt_ray/training/trl_trainer.py`) on every rank of a Ray Train worker group.

The driver tokenises, checks and selects the pairs, so that a directive is never cut and a pair never loses its twin,
looks up their reference log-probabilities, writes the rows to parquet and starts the workers. A worker group that died
starts again from its last checkpoint; the same command does the same. What is exported is always the last checkpoint,
never the trainer's memory.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_ray.chat.templates import stop_tokens
from cpt_ray.cluster import check_room
from cpt_ray.config import LoraConfig, ModelConfig, PreferenceRunConfig, TrainConfig, TuneConfig
from cpt_ray.console import progress, say
from cpt_ray.engines.losses import reasons
from cpt_ray.errors import UserError, first_line
from cpt_ray.logprobs.reference import add_reference, is_autocast, loading, read_rows_file, rows_path, write_rows
from cpt_ray.logprobs.rows import Row, Tokeniser
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import Pair, Reject, content_id
from cpt_ray.tables.rundir import MARK, RunDir
from cpt_ray.training.export import empty_folder, export
from cpt_ray.training.publishing import write_cards
from cpt_ray.training.rows import (
    TokenPair,
    counted,
    end_pairs,
    make_rows,
    own_pairs,
    preference_pairs,
    select_pairs,
    steps_per_epoch,
)

PROGRESS = ".train_progress.json"
START_MINUTES = 15
"""How long the cluster may take to find room for the workers (autoscaling included)."""
POLL_SECONDS = 0.5
LN_2 = math.log(2)
FAR_NATS = 2.0
"""Of `kl` or `drift` per token, from which on a policy is said to be far from its reference."""
LOSS_RISE = 0.1
KEPT_SHARE = 0.9
"""Of the learned change, that merged weights should keep."""
SERVED_RANK = 512
"""The highest rank of an adapter that vLLM serves."""


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
        key: hash of all that the model depends on; the model that has it is not made again.
        connecting: connects to Ray, once the pairs are read and checked; without one, Ray is connected already.
        rubrics: of the pairs; read for `train.contrast`.
    """
    done = run.read_json(MARK)
    if done and done["key"] == key:
        say(f"train        done: {done['summary']['steps']} steps on {done['summary']['pairs']} pairs")
        return dict(done["summary"])
    start = time.monotonic()
    settings = config.train
    begun = _begun(run, key)
    data = begun or _tokenised(config, run, pair_shards, key, rubrics)
    num_pairs, num_held_out = (sum(len(row["chosen"]) for row in rows) for rows in (data.rows, data.held_out))
    num_steps = steps_per_epoch(num_pairs, settings.batch_size)
    _check_rows(settings, len(data.rows), num_steps)
    with connecting or nullcontext():
        check_workers(settings)
        if begun is None:
            _keep_with_reference(config, run, key, data)
        outcome = _fit(_job(config, run, key, data), math.ceil(settings.epochs * num_steps))
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
    run.write_json(MARK, {"key": key, "summary": summary})
    return summary


@dataclass(frozen=True)
class _Data:
    """What a training is of; every pair of the input is in one of the three."""

    rows: list[Row]
    held_out: list[Row]
    rejects: list[Reject]


def _held_out(key: str) -> str:
    return f"{key}-held_out"


def _begun(run: RunDir, key: str) -> _Data | None:
    """The rows of a training that has begun: it goes on with the same tokens, even if the template shows the time."""
    if not rows_path(run, key).exists():
        return None
    rejects = run.read("rejects", [f"train-{key}"], Reject)
    return _Data(read_rows_file(rows_path(run, key)), read_rows_file(rows_path(run, _held_out(key))), rejects)


def _tokenised(
    config: TuneConfig, run: RunDir, pair_shards: Sequence[str], key: str, rubrics: Sequence[Rubric]
) -> _Data:
    """Pairs read, rendered, checked and selected; their rows have no reference yet."""
    settings = config.train
    tokeniser, max_length, vocabulary = open_policy(config)
    unwanted: list[Reject] = []  # by the run file's choice, so nothing that has to be said
    if isinstance(config, PreferenceRunConfig):
        pairs = preference_pairs(config.preferences, tokeniser)
    else:
        for note in tokeniser.check():
            say(f"note: {note}")
        made = run.read("pairs", pair_shards, Pair)
        wanted, unwanted = end_pairs(made, rubrics) if settings.contrast == "ends" else (made, [])
        for name in sorted({pair.rubric_id for pair in made} - {pair.rubric_id for pair in wanted}):
            say(f"note: rubric {name}: no answer at one of its ends has a partner, so nothing of it is trained on")
        pairs = own_pairs(wanted, tokeniser)
    kept, held_out, rejects = select_pairs(pairs, max_length, settings.max_pairs, settings.held_out, config.seed)
    lost = pairs.rejects + unwanted + rejects
    run.write("rejects", f"train-{key}", lost)
    unsaid = rejects if isinstance(config, PreferenceRunConfig) else pairs.rejects + rejects
    if not kept:
        remedy = "; raise train.max_length" if any(reject.reason == "too long" for reject in lost) else ""
        why = f"none of {len(lost)} is left: {counted(lost)}{remedy}" if lost else "see the rejects table for why"
        run.add_to_ledger("train", {"rows_in": len(lost), "rows_out": 0, "rejected": reasons(lost)})
        raise UserError(f"train: there are no pairs; {why}")
    if unsaid:
        say(f"note: {len(unsaid)} pairs are not trained on: {counted(unsaid)}")
    _check_vocabulary(kept, vocabulary)
    rows, held_rows = (make_rows(some, settings.micro_batch_size) for some in (kept, held_out))
    return _Data(rows, held_rows, lost)


def _check_vocabulary(pairs: Sequence[TokenPair], size: int) -> None:
    """UserError if the tokenizer gives a token for which the model has no embedding."""
    highest = max(max(*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids) for pair in pairs)
    if highest >= size:
        raise UserError(
            f"policy: its tokenizer gives token {highest}, but the model has embeddings for {size} tokens; "
            "use the tokenizer that belongs to the model"
        )


def _keep_with_reference(config: TuneConfig, run: RunDir, key: str, data: _Data) -> None:
    """Writes the rows with their reference, those that are trained on last: if they are there, all is."""
    whole = add_reference(config, run, data.rows + data.held_out)
    write_rows(run, _held_out(key), whole[len(data.rows) :])
    write_rows(run, key, whole[: len(data.rows)])


def _summary(logs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is kept of the trainer's log: each step, each measurement, the last tenth of the steps in two numbers."""
    names = {"step": "step", "loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    history = [{name: one[logged] for name, logged in names.items()} for one in logs if "loss" in one]
    measured = [one for one in logs if "eval_loss" in one]
    last = history[-max(1, len(history) // 10) :]
    return {
        "steps": history[-1]["step"],
        "first_loss": history[0]["loss"],
        "last_loss": sum(one["loss"] for one in last) / len(last),
        "last_accuracy": sum(one["accuracy"] for one in last) / len(last),
        "history": history,
        "held_out": [{name.removeprefix("eval_"): one[name] for name in one if name != "epoch"} for one in measured],
    }


# ---------------------------------------------------------------- before any worker starts


def _policy_path(config: TuneConfig) -> str:
    """Absolute if it is a folder, since Ray Train changes the working directory."""
    path = config.policy.path
    return str(Path(path).absolute()) if Path(path).is_dir() else path


def _policy_name(config: TuneConfig) -> str:
    """What a worker, on whichever node, finds the policy by: it converts a GGUF that its node has not converted."""
    name = config.policy.gguf
    return str(Path(name).absolute()) if Path(name).is_file() else name or _policy_path(config)


def open_policy(config: TuneConfig) -> tuple[Tokeniser, int, int]:
    """How the policy renders, how many tokens a sequence may have, and how many tokens it knows.

    UserError if it cannot be trained, as far as its configuration, its tokenizer and its chat template tell.
    """
    from transformers import AutoConfig, AutoTokenizer

    policy = _policy_path(config)

    try:
        model_config = AutoConfig.from_pretrained(policy)
        tokenizer = AutoTokenizer.from_pretrained(policy)
    except (OSError, ValueError) as error:
        name = config.policy.model
        if (name.startswith((".", "/")) or name.count("/") > 1) and not Path(name).is_dir():  # no name of a hub's
            raise UserError(f"policy.model: {name}: no such folder") from None
        raise UserError(f"policy.model: {name!r} cannot be loaded: {first_line(error)}") from None
    settings = config.train
    _check_sharding(settings)
    if settings.lora:
        _check_lora(settings.lora, model_config)
    packages: dict[str, str] = dict.fromkeys(settings.report_to, "train.report_to")
    if settings.lora and settings.lora.quantize:
        packages["bitsandbytes"] = "train.lora.quantize"
    for name, key in packages.items():
        if not importlib.util.find_spec(name):
            raise UserError(f"{key}: {name} is not installed; pip install {name}, or leave {key} out")
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    tokeniser = Tokeniser(tokenizer, config.policy.chat_template_kwargs, stop_tokens(policy, tokenizer))
    return tokeniser, min(settings.max_length, limit or settings.max_length), model_config.get_text_config().vocab_size


def _check_sharding(settings: TrainConfig) -> None:
    if settings.sharding == "ddp":
        return
    if not settings.lora or settings.lora.quantize:
        other = "train.lora.quantize" if settings.lora else "train.lora: null"
        raise UserError(f"train.sharding: fsdp shards frozen weights in full precision, {other} has none; use ddp")


def _check_lora(lora: LoraConfig, model_config: Any) -> None:
    """UserError if the model has no such modules (tried on a model without weights) or vLLM could not serve them."""
    if lora.r > SERVED_RANK:
        raise UserError(f"train.lora.r: {lora.r}; vLLM serves adapters of rank {SERVED_RANK} at most")
    if lora.target_modules == "all-linear":
        return
    unserved = [name for name in ("lm_head", "embed_tokens") if name in str(lora.target_modules)]
    if unserved:
        raise UserError(f"train.lora.target_modules: vLLM serves no adapter on {unserved[0]}; leave it out")
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            get_peft_model(AutoModelForCausalLM.from_config(model_config), _peft_config(lora))
    except ValueError as error:
        raise UserError(f"train.lora.target_modules: {first_line(error)}; 'all-linear' fits every model") from None


def _check_rows(settings: TrainConfig, num_rows: int, num_steps: int) -> None:
    """UserError if a step has no row for each worker."""
    most = settings.num_workers.most
    if num_rows // num_steps < most:
        raise UserError(
            f"train.num_workers: {most} workers share {num_rows // num_steps} prompts per step of "
            f"{settings.batch_size} pairs; lower train.num_workers or raise train.batch_size"
        )


# ---------------------------------------------------------------- the worker group, from outside


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; paths are absolute, since Ray Train changes the working directory."""

    config: TuneConfig
    run: RunDir
    key: str
    """Names the Ray Train run, so that no other training's checkpoints are gone on from."""
    policy: str
    """A folder, a GGUF or a Hugging Face name; `work` makes it what transformers loads."""
    rows: str
    """The training set's parquet file."""
    held_out: str | None


def _job(config: TuneConfig, run: RunDir, key: str, data: _Data) -> Job:
    return Job(
        config,
        RunDir(run.path.absolute()),
        key,
        policy=_policy_name(config),
        rows=str(rows_path(run, key)),
        held_out=str(rows_path(run, _held_out(key))) if data.held_out else None,
    )


def _fit(job: Job, total: int) -> dict[str, Any]:
    """Runs the worker group to its end and shows how far it is; what `work` returns, or UserError with the cause."""
    import ray.train
    from ray.train.torch import TorchTrainer

    settings = job.config.train
    least, most = settings.num_workers
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=settings.use_gpu,
            resources_per_worker=settings.resources_per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=job.key,
            storage_path=settings.checkpoints or str(job.run.checkpoints),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(
                max_failures=settings.max_failures, controller_failure_limit=START_MINUTES
            ),  # a start that finds no room fails after a minute and is tried again
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )
    (job.run.path / PROGRESS).unlink(missing_ok=True)
    outcome: dict[str, Any] = {}

    def fit() -> None:
        try:
            outcome["done"] = trainer.fit().return_value
        except BaseException as error:  # raised by the thread that waits for this one
            outcome["error"] = error

    # in a thread of its own, so that Ctrl-C stays this program's and the progress can be shown
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    _show_progress(thread, job, total)
    if "error" in outcome:
        raise UserError(f"train: {describe_failure(outcome['error'], settings)}") from outcome["error"]
    done: dict[str, Any] = outcome["done"]
    if done["refused"]:
        raise UserError(f"train: {done['refused']}")
    return done


def check_workers(settings: TrainConfig) -> None:
    """UserError if a cluster that cannot grow has no room for the workers."""
    remedy = "lower train.num_workers or train.resources_per_worker"
    check_room("train.num_workers", settings.worker_resources, settings.num_workers.least, remedy)


def _show_progress(thread: threading.Thread, job: Job, total: int) -> None:
    done, note = 0, f"starting {job.config.train.num_workers} workers"
    with progress("train", total, "steps") as advance:
        while thread.is_alive():
            advance(0, note)
            thread.join(POLL_SECONDS)
            state = job.run.read_json(PROGRESS)
            if not state:
                continue
            note = f"loss {state['loss']:.3f}, reward accuracy {state['accuracy']:.2f}, {state['num_workers']} workers"
            if state["step"] < done:
                note = f"a worker died; again from step {state['step']}"
            advance(max(0, state["step"] - done), note)
            done = max(done, state["step"])


def describe_failure(error: BaseException, settings: TrainConfig) -> str:
    """Why the worker group failed, in one line: the cause, not what the other ranks made of it."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError

    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    causes = [_unwrap(one) for one in failures.values()]
    cause = min(causes, key=lambda one: "Dist" in type(one).__name__ or "onnection" in str(one))
    if isinstance(cause, WorkerGroupStartupTimeoutError):
        wanted = f"{settings.num_workers.least} workers of {settings.worker_resources}"
        return f"no room for {wanted} in {START_MINUTES} minutes; lower train.num_workers or add nodes"
    if isinstance(cause, OutOfMemoryError) or "OutOfMemory" in type(cause).__name__:
        return f"out of memory; lower train.micro_batch_size or train.max_length ({first_line(cause)})"
    if isinstance(cause, RayActorError):
        return (
            f"a worker died more than {settings.max_failures} times (killed from outside, or out of memory); "
            "the same command goes on from the last checkpoint"
        )
    return f"{type(cause).__name__}: {first_line(cause)}"


def _unwrap(error: BaseException) -> BaseException:
    for name in ("_base_exc", "health_check_failure", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error


# ---------------------------------------------------------------- the worker group, from inside


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each rank does: train from the last checkpoint if there is one; rank 0 exports the final one.

    Returns:
        logs: the trainer's, of rank 0. export: what `export` measured.
        refused: why the result is no model, "" if it is one. Returned, since Ray Train would try again what is raised.
    """
    import ray.train

    job: Job = settings["job"]
    job = replace(job, policy=ModelConfig(model=job.policy).path)
    start, rank = ray.train.get_checkpoint(), ray.train.get_context().get_world_rank()
    # a fixed name: what a killed worker left behind is removed by the next one
    name = f"cpt_ray-train-{content_id(str(job.run.path), job.key)}-{rank}"
    folder = empty_folder(Path(tempfile.gettempdir()) / name)
    try:
        if start is None:
            _train_rank(job, folder, None)
        else:
            with start.as_directory() as checkpoint:
                state = _trainer_state(Path(checkpoint))
                if state["global_step"] < state["max_steps"]:
                    _train_rank(job, folder, checkpoint)
        return _exported(job) if rank == 0 else {"refused": ""}
    except UserError as error:
        return {"refused": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exported(job: Job) -> dict[str, Any]:
    import ray.train

    last = ray.train.get_checkpoint()
    assert last is not None, "transformers saves at the last step"
    with last.as_directory() as checkpoint:
        made = export(job.config.train, job.run, job.policy, job.rows, Path(checkpoint))
        return {"refused": "", "logs": _trainer_state(Path(checkpoint))["log_history"], "export": made}


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def _peft_config(lora: LoraConfig) -> Any:
    import peft

    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return peft.LoraConfig(
        r=lora.r, lora_alpha=lora.alpha, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def _train_rank(job: Job, folder: Path, checkpoint: str | None) -> None:
    """Builds the trainer and trains, from the checkpoint on if there is one."""
    import datasets
    import ray
    import torch
    from transformers import AutoTokenizer

    from cpt_ray.training.trl_trainer import GridTrainer

    settings = job.config.train
    if not settings.use_gpu:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(job.run.path / "tensorboard" / job.key)
    for name, value in (
        ("WANDB_DIR", str(job.run.path)),
        ("WANDB_PROJECT", job.config.name),
        ("WANDB_RUN_ID", job.key),  # a worker group that starts again goes on with the same run
        ("WANDB_RESUME", "allow"),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{job.run.path}/mlflow.db"),
        ("MLFLOW_EXPERIMENT_NAME", job.config.name),
    ):
        os.environ.setdefault(name, value)
    datasets.disable_progress_bars()
    rows, held_out = (
        datasets.Dataset.from_parquet(path, cache_dir=str(folder / "cache")) if path else None
        for path in (job.rows, job.held_out)
    )
    trainer = GridTrainer(
        model=job.policy,
        args=_arguments(job, folder),
        step_pairs=settings.batch_size,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(job.policy),
        peft_config=_peft_config(settings.lora) if settings.lora else None,
        callbacks=[_reporter(job, folder)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if "wandb" in settings.report_to:
        import wandb

        wandb.finish()  # Ray ends this process before wandb has written everything


def _arguments(job: Job, folder: Path) -> Any:
    """The run file's settings in TRL's words; train.dtype is that of the frozen weights and of the arithmetic."""
    import ray.train
    from trl import DPOConfig

    settings = job.config.train
    how = loading(settings) | {"device_map": None}
    if settings.sharding == "fsdp":
        how["distributed_config"] = {"fsdp_size": ray.train.get_context().get_world_size()}
    return DPOConfig(
        output_dir=str(folder / "out"),
        loss_type=list(settings.loss),
        loss_weights=list(settings.loss.values()),
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_size,
        warmup_steps=settings.warmup_ratio,  # below 1: a share of all steps
        model_init_kwargs=how,
        bf16=is_autocast(settings),
        use_cpu=not settings.use_gpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        dataloader_pin_memory=settings.use_gpu,
        seed=job.config.seed if settings.seed is None else settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if job.held_out else "no",
        eval_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show a loss that is no number as 0
        report_to=list(settings.report_to),
        disable_tqdm=True,
        log_level="error",
    )


def _reporter(job: Job, folder: Path) -> Any:
    """The callback that reports checkpoints to Ray and progress to the driver."""
    import ray.train
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate |= job.held_out is not None and state.global_step >= state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            check_finite(state.global_step, logs)
            if "loss" not in logs:
                return
            if state.global_step == 1:
                check_first_loss(logs["loss"], job.config.train)
            if state.is_world_process_zero:
                now = {"step": state.global_step, "loss": logs["loss"], "accuracy": logs["rewards/accuracies"]}
                now |= {"num_workers": ray.train.get_context().get_world_size(), "pid": os.getpid()}
                job.run.write_json(PROGRESS, now)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Each rank has a folder of its own: rank 0's holds everything but the other ranks' random states.
            # Ray uploads each rank's files into one checkpoint, and is the barrier.
            saved = ray.train.Checkpoint.from_directory(folder / "out" / f"checkpoint-{state.global_step}")
            ray.train.report({"step": state.global_step}, checkpoint=saved, delete_local_checkpoint_after_upload=True)

    return Reporter()


def check_finite(step: int, logs: dict[str, float]) -> None:
    """UserError if something that was logged is not a finite number; the last checkpoint is then from before."""
    names = ("loss", "grad_norm", *(name for name in logs if name.startswith("eval_")))
    wrong = [name for name in names if name in logs and not math.isfinite(logs[name])]
    if not wrong:
        return
    what = {"loss": "the loss", "grad_norm": "the gradient"}.get(wrong[0], wrong[0].removeprefix("eval_") + " held out")
    why = (
        "the policy itself gives none in this train.dtype"
        if wrong[0] == "loss" and step == 1
        else ("training has diverged; lower train.learning_rate")
    )
    raise UserError(f"step {step}: {what} is not a finite number ({logs[wrong[0]]}): {why}")


def check_first_loss(loss: float, settings: TrainConfig) -> None:
    """RuntimeError if policy and reference differ before the first step (float32 and the sigmoid loss only)."""
    is_told = settings.precision == "float32" and settings.loss == {"sigmoid": 1.0}
    if is_told and abs(loss - LN_2) > 1e-3:
        raise RuntimeError(f"the first loss is {loss:.5f}, not ln 2: policy and reference are not the same model")


def training_notes(summary: dict[str, Any]) -> list[str]:
    """What somebody should know of a training that ended well but may not have gone well."""
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
            "no pair is held out, so that nothing tells how it does on others (a tenth of whole prompts can be)"
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
