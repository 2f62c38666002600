"""What runs on each worker of a training: TRL's trainer on rows, checkpoints to Ray, and the export of the last one."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cpt_ray.config import ModelConfig, TrainConfig, TuneConfig
from cpt_ray.errors import UserError
from cpt_ray.logprobs.precision import is_autocast, load_arguments
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import TRAIN_PROGRESS_FILE, RunDir
from cpt_ray.tables.store_path import StorePath, path_of
from cpt_ray.training.checks import peft_config
from cpt_ray.training.export import empty_folder, export

LN_2 = math.log(2)
TENSORBOARD = "tensorboard"
PROGRESS_SECONDS = 1.0


@dataclass(frozen=True)
class TrainingTask:
    """What each worker is sent; paths are absolute, since Ray Train changes the working directory."""

    config: TuneConfig
    run: RunDir
    key: str
    """Names the Ray Train run, so that it never continues from another training's checkpoints."""
    policy: str
    """A folder, a GGUF or a Hugging Face name; `work` makes it what transformers loads."""
    rows: str
    """The training set's parquet file."""
    held_out: str | None


def work(settings: dict[str, Any]) -> dict[str, Any]:
    """What each rank does: train from the last checkpoint if there is one; rank 0 exports the final one.

    Returns:
        logs: the trainer's, of rank 0. export: what `export` measured.
        refused: why the result is no model, "" if it is one. Returned, since Ray Train would try again what is raised,
            as it should if it is the store that fails.
    """
    import ray.train

    task: TrainingTask = settings["task"]
    task = replace(task, policy=ModelConfig(model=task.policy).path)
    start, rank = ray.train.get_checkpoint(), ray.train.get_context().get_world_rank()
    # a fixed name: what a killed worker left behind is removed by the next one
    name = f"cpt_ray-train-{content_id(str(task.run.path), task.key)}-{rank}"
    folder = empty_folder(Path(tempfile.gettempdir()) / name)
    try:
        if start is None:
            _train_rank(task, folder, None)
        else:
            with start.as_directory() as checkpoint:
                state = _trainer_state(Path(checkpoint))
                if state["global_step"] < state["max_steps"]:
                    _train_rank(task, folder, checkpoint)
        return _exported(task) if rank == 0 else {"refused": ""}
    except StoreError:
        raise  # of one rank: the others would wait for it if it returned
    except UserError as error:
        return {"refused": str(error)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exported(task: TrainingTask) -> dict[str, Any]:
    import ray.train

    last = ray.train.get_checkpoint()
    assert last is not None, "transformers saves at the last step"
    with last.as_directory() as checkpoint:
        measured = export(task.config.train, task.run, task.policy, task.rows, Path(checkpoint))
        # the log of the whole training, and not only of the steps since this worker group started
        return {"refused": "", "logs": _trainer_state(Path(checkpoint))["log_history"], "export": measured}


def _trainer_state(checkpoint: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return state


def _train_rank(task: TrainingTask, folder: Path, checkpoint: str | None) -> None:
    """Builds the trainer and trains, from the checkpoint on if there is one."""
    import datasets
    import ray
    import torch
    from transformers import AutoTokenizer

    from cpt_ray.training.trl_trainer import GridTrainer

    settings = task.config.train
    if not settings.use_gpu:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    _name_trackers(task, folder)
    datasets.disable_progress_bars()
    rows, held_out = (
        datasets.Dataset.from_parquet(_on_this_node(path, folder), cache_dir=str(folder / "cache")) if path else None
        for path in (task.rows, task.held_out)
    )
    trainer = GridTrainer(
        model=task.policy,
        args=_arguments(task, folder),
        step_pairs=settings.batch_size,
        train_dataset=rows,
        eval_dataset=held_out,
        processing_class=AutoTokenizer.from_pretrained(task.policy),
        peft_config=peft_config(settings.lora) if settings.lora else None,
        callbacks=[_reporter(task, folder)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    if "wandb" in settings.report_to:
        import wandb

        wandb.finish()  # Ray ends this process before wandb has written everything


def _on_this_node(where: str, folder: Path) -> str:
    """A file, or its copy in `folder` if it is in an object store."""
    path = path_of(where)
    if isinstance(path, StorePath):
        path.download(folder / path.name)
        return str(folder / path.name)
    return where


def _name_trackers(task: TrainingTask, folder: Path) -> None:
    """Where TensorBoard, wandb and MLflow write, and under which name; transformers reads it from the environment.

    Nothing can be added to an object: there, what TensorBoard wrote is put with every checkpoint.
    """
    is_stored = isinstance(task.run.path, StorePath)
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / TENSORBOARD if is_stored else task.run.tensorboard / task.key)
    for name, value in (
        ("WANDB_DIR", str(folder if is_stored else task.run.path)),
        ("WANDB_PROJECT", task.config.name),
        ("WANDB_RUN_ID", task.key),  # a worker group that starts again goes on with the same run
        ("WANDB_RESUME", "allow"),
        ("MLFLOW_TRACKING_URI", f"sqlite:///{task.run.path}/mlflow.db"),
        ("MLFLOW_EXPERIMENT_NAME", task.config.name),
    ):
        os.environ.setdefault(name, value)


def _arguments(task: TrainingTask, folder: Path) -> Any:
    """The run file's settings in TRL's words; train.dtype is that of the frozen weights and of the arithmetic."""
    import ray.train
    from trl import DPOConfig

    settings = task.config.train
    model_arguments = load_arguments(settings) | {"device_map": None}
    if settings.sharding == "fsdp":
        model_arguments["distributed_config"] = {"fsdp_size": ray.train.get_context().get_world_size()}
    return DPOConfig(
        output_dir=str(folder / "out"),
        loss_type=list(settings.loss),
        loss_weights=list(settings.loss.values()),
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_size,
        warmup_steps=settings.warmup_ratio,  # below 1: a share of all steps
        model_init_kwargs=model_arguments,
        bf16=is_autocast(settings),
        use_cpu=not settings.use_gpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        dataloader_pin_memory=settings.use_gpu,
        seed=task.config.seed if settings.seed is None else settings.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        eval_strategy="steps" if task.held_out else "no",
        eval_steps=settings.save_steps,
        logging_steps=1,
        logging_nan_inf_filter=False,  # it would show a loss that is no number as 0
        report_to=list(settings.report_to),
        disable_tqdm=True,
        log_level="error",
    )


def _reporter(task: TrainingTask, folder: Path) -> Any:
    """The callback that reports checkpoints to Ray and progress to the driver."""
    import ray.train
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        shown_at = -math.inf

        def show(self, progress: dict[str, Any]) -> None:
            """Once a second at most where it is a request to a store."""
            if not isinstance(task.run.path, StorePath) or time.monotonic() - self.shown_at >= PROGRESS_SECONDS:
                self.shown_at = time.monotonic()
                with suppress(StoreError):  # a note is not worth a training
                    task.run.write_json(TRAIN_PROGRESS_FILE, progress)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_evaluate |= task.held_out is not None and state.global_step >= state.max_steps

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            check_finite(state.global_step, logs)
            if "loss" not in logs:
                return
            if state.global_step == 1:
                check_first_loss(logs["loss"], task.config.train)
            if state.is_world_process_zero:
                workers = ray.train.get_context().get_world_size()
                note = f"loss {logs['loss']:.3f}, reward accuracy {logs['rewards/accuracies']:.2f}, {workers} workers"
                progress = {"done": state.global_step, "note": note, "num_workers": workers, "pid": os.getpid()}
                self.show(progress)

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Each rank has a folder of its own: rank 0's holds everything but the other ranks' random states.
            # Ray uploads each rank's files into one checkpoint, and is the barrier.
            shown = task.run.tensorboard / task.key
            if isinstance(shown, StorePath) and state.is_world_process_zero:
                with suppress(StoreError):  # the next one has it too
                    shown.upload(folder / TENSORBOARD)
            saved = ray.train.Checkpoint.from_directory(folder / "out" / f"checkpoint-{state.global_step}")
            ray.train.report({"step": state.global_step}, checkpoint=saved, delete_local_checkpoint_after_upload=True)

    return Reporter()


def check_finite(step: int, logs: dict[str, float]) -> None:
    """UserError if something that was logged is not a finite number; the last checkpoint is then from before."""
    names = ("loss", "grad_norm", *(name for name in logs if name.startswith("eval_")))
    wrong = next((name for name in names if name in logs and not math.isfinite(logs[name])), None)
    if wrong is None:
        return
    what = {"loss": "the loss", "grad_norm": "the gradient"}.get(wrong, wrong.removeprefix("eval_") + " held out")
    why = "training has diverged; lower train.learning_rate"
    if wrong == "loss" and step == 1:
        why = "the policy itself gives none in this train.dtype"
    raise UserError(f"step {step}: {what} is not a finite number ({logs[wrong]}): {why}")


def check_first_loss(loss: float, settings: TrainConfig) -> None:
    """RuntimeError if policy and reference differ before the first step (float32 and the sigmoid loss only)."""
    is_known = settings.precision == "float32" and settings.loss == {"sigmoid": 1.0}
    if is_known and abs(loss - LN_2) > 1e-3:
        raise RuntimeError(f"the first loss is {loss:.5f}, not ln 2: policy and reference are not the same model")
