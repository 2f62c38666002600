"""Training: DPO on the twin pairs, TRL's trainer on every rank of a Ray Train worker group.

The driver checks and selects the pairs, so that a directive is never cut and a pair never loses its twin, writes
them to one parquet and starts the workers. A worker group that died starts again from its last checkpoint; the
same command does the same. What is exported is always the last checkpoint, never the trainer's memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cpt_ray.config import LoraConfig, RunConfig, TrainConfig
from cpt_ray.console import progress, say
from cpt_ray.errors import UserError
from cpt_ray.prompting import ChatMessage, token_ids
from cpt_ray.records import Message, Pair, Reject, content_id
from cpt_ray.rundir import RunDir

MARK = "model/cpt_ray.json"
"""Written last: the model is complete, and this is what it was made from."""
PROGRESS = ".train_progress.json"
START_MINUTES = 15
"""How long the cluster may take to find room for the workers (autoscaling included)."""
POLL_SECONDS = 0.5
LN_2 = math.log(2)


def train(config: RunConfig, run: RunDir, pair_shards: Sequence[str], key: str) -> dict[str, Any]:
    """Pairs to `run.model` (and `run.adapter`); the summary kept in model/cpt_ray.json.

    Args:
        key: hash of all that the model depends on; the model that has it is not made again.
    """
    done = run.read_json(MARK)
    if done and done["key"] == key:
        say(f"train        done: {done['summary']['steps']} steps on {done['summary']['pairs']} pairs")
        return dict(done["summary"])
    start = time.monotonic()
    pairs = run.read("pairs", pair_shards, Pair)
    policy = str(Path(config.policy.path).absolute()) if Path(config.policy.path).is_dir() else config.policy.path
    tokenizer, max_length = _open_policy(config, policy)
    lengths = {one.pair_id: _measure(tokenizer, one, config.policy.chat_template_kwargs) for one in pairs}
    kept, rejects = select_pairs(pairs, lengths, max_length, config.train.max_pairs, config.seed)
    run.write("rejects", f"train-{key}", rejects)
    if not kept:
        problem = f"none of {len(pairs)} pairs is left within {max_length} tokens; raise train.max_length"
        raise UserError(f"train: {problem if pairs else 'there are no pairs; see the rejects table for why'}")
    data = _write_training_set(run, key, kept, config.policy.chat_template_kwargs)
    job = Job(config, RunDir(run.path.absolute()), key, policy=policy, data=str(data), max_length=max_length)
    history = _fit(job, num_steps(len(kept), config.train))
    first, last = history[0], history[-max(1, len(history) // 10) :]
    seconds = time.monotonic() - start
    summary = {
        "pairs": len(kept),
        "steps": history[-1]["step"],
        "first_loss": first["loss"],
        "last_loss": sum(one["loss"] for one in last) / len(last),
        "last_accuracy": sum(one["accuracy"] for one in last) / len(last),
        "wall_seconds": round(seconds, 1),
        "history": history,
    }
    tokens = round(config.train.epochs * sum(lengths[one.pair_id].all_tokens for one in kept))
    counts = Counter(one.reason for one in rejects)
    entry = {"rows_in": len(pairs), "rows_out": len(kept), "rejected": dict(counts), "wall_seconds": round(seconds, 1)}
    entry |= {"steps": summary["steps"], "trained_tokens": tokens, "num_workers": config.train.num_workers}
    run.add_to_ledger("train", entry)
    run.write_json(MARK, {"key": key, "summary": summary})
    return summary


# ---------------------------------------------------------------- before any worker starts


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one pair."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def longest(self) -> int:
        """Of the two sequences."""
        return self.prompt + max(self.chosen, self.rejected)

    @property
    def all_tokens(self) -> int:
        """Of both sequences."""
        return 2 * self.prompt + self.chosen + self.rejected


def _open_policy(config: RunConfig, policy: str) -> tuple[Any, int]:
    """The policy's tokenizer and how many tokens a sequence may have; UserError if the policy cannot be trained."""
    from transformers import AutoConfig, AutoTokenizer

    try:
        model_config = AutoConfig.from_pretrained(policy)
        tokenizer = AutoTokenizer.from_pretrained(policy)
    except (OSError, ValueError) as error:
        raise UserError(f"policy.model: {config.policy.model!r} cannot be loaded: {_first_line(error)}") from None
    if not tokenizer.chat_template:
        raise UserError(f"policy.model: {config.policy.model!r} has no chat template; use an instruction-tuned model")
    lora = config.train.lora
    if lora and lora.target_modules != "all-linear":
        _check_lora(lora, model_config)
    limit = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return tokenizer, min(config.train.max_length, limit or config.train.max_length)


def _check_lora(lora: LoraConfig, model_config: Any) -> None:
    """UserError if the model has no such modules; tried on a model without weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            get_peft_model(AutoModelForCausalLM.from_config(model_config), _peft_config(lora))
    except ValueError as error:
        raise UserError(f"train.lora.target_modules: {_first_line(error)}; 'all-linear' fits every model") from None


def _chat(messages: Sequence[Message]) -> list[ChatMessage]:
    return [{"role": one.role, "content": one.content} for one in messages]


def conversation_ids(tokenizer: Any, messages: list[ChatMessage], template_kwargs: dict[str, Any]) -> list[int]:
    """Token ids of a finished conversation, the answer's end mark included."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **template_kwargs))


def _measure(tokenizer: Any, pair: Pair, template_kwargs: dict[str, Any]) -> Lengths:
    """The pair's lengths; UserError if the template loses the directive or the end of the prompt."""
    from jinja2 import TemplateError

    messages = _chat(pair.prompt)
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **template_kwargs)
        prompt = token_ids(tokenizer, messages, template_kwargs)
        answers = [
            conversation_ids(tokenizer, messages + _chat(answer), template_kwargs)
            for answer in (pair.chosen, pair.rejected)
        ]
    except TemplateError as error:
        raise UserError(
            f"policy: its chat template refuses a system message ({_first_line(error)}); "
            "directives are system messages, use a model that takes them"
        ) from None
    lost = next((one for one in messages if one["role"] == "system" and one["content"].strip() not in text), None)
    if lost:
        raise UserError("policy: its chat template drops the system message, where the directive is; use another model")
    for ids in answers:
        if ids[: len(prompt)] != prompt:
            raise UserError(
                f"policy: its chat template renders a prompt otherwise once it is answered (pair {pair.pair_id}); set "
                "policy.chat_template_kwargs (for example {enable_thinking: false}) or use another model"
            )
    return Lengths(len(prompt), *(len(ids) - len(prompt) for ids in answers))


def select_pairs(
    pairs: Sequence[Pair], lengths: dict[str, Lengths], max_length: int, max_pairs: int | None, seed: int
) -> tuple[list[Pair], list[Reject]]:
    """The pairs to train on, and the rest with the reason. A pair and its twin stay or go together.

    Args:
        lengths: by pair_id.
        max_length: tokens of prompt plus answer that still fit.
        max_pairs: keep at most this many, chosen by hash.
    """
    twins: dict[str, list[Pair]] = {}
    for one in pairs:
        twins.setdefault(min(one.pair_id, one.twin_id), []).append(one)
    rejects: list[Reject] = []
    fitting: dict[str, list[Pair]] = {}
    for name, group in twins.items():
        longest = max(lengths[one.pair_id].longest for one in group)
        if longest <= max_length:
            fitting[name] = group
            continue
        for one in group:
            found = lengths[one.pair_id]
            detail = f"{found.prompt} prompt + {max(found.chosen, found.rejected)} answer tokens, {max_length} fit"
            if found.longest <= max_length:
                detail += f"; its twin has {longest}"
            rejects.append(_reject(one, "too long", detail))
    kept: set[str] = set()
    left = len(pairs) if max_pairs is None else max_pairs
    for name in sorted(fitting, key=lambda name: content_id(name, seed)):
        if len(fitting[name]) <= left:
            kept.add(name)
            left -= len(fitting[name])
        else:
            rejects += [_reject(one, "over max_pairs", f"train.max_pairs is {max_pairs}") for one in fitting[name]]
    return [one for one in pairs if min(one.pair_id, one.twin_id) in kept], rejects


def _reject(one: Pair, reason: str, detail: str) -> Reject:
    return Reject(
        stage="train", subject_id=one.pair_id, rubric_id=one.rubric_id, level=one.level, reason=reason, detail=detail
    )


def _write_training_set(run: RunDir, key: str, pairs: Sequence[Pair], template_kwargs: dict[str, Any]) -> Path:
    """The columns that TRL reads, in one file that every node sees."""
    columns: dict[str, list[Any]] = {"pair_id": [one.pair_id for one in pairs]}
    for name in ("prompt", "chosen", "rejected"):
        columns[name] = [_chat(getattr(one, name)) for one in pairs]
    if template_kwargs:
        columns["chat_template_kwargs"] = [template_kwargs] * len(pairs)
    path = run.path.absolute() / "train_pairs" / f"{key}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    pq.write_table(pa.table(columns), temporary)
    os.replace(temporary, path)
    return path


def num_steps(num_pairs: int, settings: TrainConfig) -> int:
    """Optimizer steps of the whole training, as transformers counts them."""
    micro_batches = math.ceil(math.ceil(num_pairs / settings.micro_batch_size) / settings.num_workers)
    return math.ceil(settings.epochs * math.ceil(micro_batches / _accumulation(settings)))


def _accumulation(settings: TrainConfig) -> int:
    return settings.batch_size // (settings.num_workers * settings.micro_batch_size)


# ---------------------------------------------------------------- the worker group, from outside


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; paths are absolute, since Ray Train changes the working directory."""

    config: RunConfig
    run: RunDir
    key: str
    """Names the Ray Train run, so that no other training's checkpoints are gone on from."""
    policy: str
    data: str
    """The training set's parquet file."""
    max_length: int


def _fit(job: Job, total: int) -> list[dict[str, float]]:
    """Runs the worker group to its end and shows how far it is; the log history, or UserError with the root cause."""
    import ray.train
    from ray.train.torch import TorchTrainer

    settings = job.config.train
    _check_room(settings)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": job},
        scaling_config=ray.train.ScalingConfig(
            num_workers=settings.num_workers,
            use_gpu=settings.use_gpu,
            resources_per_worker=settings.resources_per_worker,
        ),
        run_config=ray.train.RunConfig(
            name=job.key,
            storage_path=str(job.run.checkpoints),
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
            outcome["history"] = trainer.fit().return_value
        except BaseException as error:
            outcome["error"] = error

    # in a thread of its own, so that Ctrl-C stays this program's and the progress can be shown
    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    _show_progress(thread, job, total)
    if "error" in outcome:
        raise UserError(f"train: {describe_failure(outcome['error'], settings)}") from outcome["error"]
    history: list[dict[str, float]] = outcome["history"]
    return history


def _check_room(settings: TrainConfig) -> None:
    """UserError if a cluster that cannot grow has no room for the workers."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    here = ray.cluster_resources()
    for name, amount in _resources(settings).items():
        wanted = amount * settings.num_workers
        if wanted > here.get(name, 0):
            raise UserError(
                f"train.num_workers: {settings.num_workers} workers need {wanted:g} {name}, this machine gives Ray "
                f"{here.get(name, 0):g}; lower train.num_workers or train.resources_per_worker"
            )


def _resources(settings: TrainConfig) -> dict[str, float]:
    return settings.resources_per_worker or {"GPU" if settings.use_gpu else "CPU": 1}


def _show_progress(thread: threading.Thread, job: Job, total: int) -> None:
    done, note = 0, f"starting {job.config.train.num_workers} workers"
    with progress("train", total, "steps") as advance:
        while thread.is_alive():
            advance(0, note)
            thread.join(POLL_SECONDS)
            state = job.run.read_json(PROGRESS)
            if not state:
                continue
            note = f"loss {state['loss']:.3f}, reward accuracy {state['accuracy']:.2f}"
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
        wanted = f"{settings.num_workers} workers of {_resources(settings)}"
        return f"no room for {wanted} in {START_MINUTES} minutes; lower train.num_workers or add nodes"
    if isinstance(cause, OutOfMemoryError) or "OutOfMemory" in type(cause).__name__:
        return f"out of memory; lower train.micro_batch_size or train.max_length ({_first_line(cause)})"
    if isinstance(cause, RayActorError):
        return (
            f"a worker died more than {settings.max_failures} times (killed from outside, or out of memory); "
            "the same command goes on from the last checkpoint"
        )
    return f"{type(cause).__name__}: {_first_line(cause)}"


def _unwrap(error: BaseException) -> BaseException:
    for name in ("_base_exc", "health_check_failure", "cause"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException):
            return _unwrap(inner)
    return error


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[:300]


# ---------------------------------------------------------------- the worker group, from inside


def work(settings: dict[str, Any]) -> list[dict[str, float]]:
    """What each rank does: train from the last checkpoint if there is one; rank 0 exports the final one."""
    import ray.train

    job: Job = settings["job"]
    start, rank = ray.train.get_checkpoint(), ray.train.get_context().get_world_rank()
    # a fixed name: what a killed worker left behind is removed by the next one
    name = f"cpt_ray-train-{content_id(str(job.run.path), job.key)}-{rank}"
    folder = _empty_folder(Path(tempfile.gettempdir()) / name)
    try:
        if start is None:
            _train_rank(job, folder, None)
        else:
            with start.as_directory() as checkpoint:
                state = _trainer_state(Path(checkpoint))
                if state["global_step"] < state["max_steps"]:
                    _train_rank(job, folder, checkpoint)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if rank > 0:
        return []
    last = ray.train.get_checkpoint()
    assert last is not None, "transformers saves at the last step"
    with last.as_directory() as checkpoint:
        _export(job, Path(checkpoint))
        logs = _trainer_state(Path(checkpoint))["log_history"]
    names = {"step": "step", "loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    return [{name: one[logged] for name, logged in names.items()} for one in logs if "loss" in one]


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
    """Builds TRL's trainer and trains, from the checkpoint on if there is one."""
    import datasets
    import ray
    import torch
    from transformers import AutoTokenizer
    from trl import DPOTrainer

    settings = job.config.train
    if not settings.use_gpu:
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(job.run.path / "tensorboard" / job.key)
    datasets.disable_progress_bars()
    trainer = DPOTrainer(
        model=job.policy,
        args=_arguments(job, folder),
        train_dataset=datasets.Dataset.from_parquet(job.data, cache_dir=str(folder / "cache")),
        processing_class=AutoTokenizer.from_pretrained(job.policy),
        peft_config=_peft_config(settings.lora) if settings.lora else None,
        callbacks=[_reporter(job, folder)],
    )
    trainer.train(resume_from_checkpoint=checkpoint)


def _arguments(job: Job, folder: Path) -> Any:
    """The run file's settings in TRL's words.

    What is trained is kept in float32 (adapters by PEFT, all weights here), since a step is smaller than what
    bfloat16 can add to a weight; train.dtype is that of the frozen weights and of the arithmetic.
    """
    from trl import DPOConfig

    settings = job.config.train
    is_bfloat16 = settings.dtype == "bfloat16"
    return DPOConfig(
        output_dir=str(folder / "out"),
        beta=settings.beta,
        learning_rate=settings.learning_rate,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.micro_batch_size,
        gradient_accumulation_steps=_accumulation(settings),
        warmup_steps=settings.warmup_ratio,  # below 1: a share of all steps
        max_length=job.max_length,
        model_init_kwargs={"dtype": settings.dtype if settings.lora else "float32", "device_map": None},
        bf16=is_bfloat16 and (settings.use_gpu or settings.lora is None),
        use_cpu=not settings.use_gpu,
        gradient_checkpointing=settings.gradient_checkpointing,
        dataloader_pin_memory=settings.use_gpu,
        seed=job.config.seed,
        save_strategy="steps",
        save_steps=settings.save_steps,
        logging_steps=1,
        report_to=["tensorboard"],
        disable_tqdm=True,
        log_level="error",
    )


def _reporter(job: Job, folder: Path) -> Any:
    """The callback that reports checkpoints to Ray and progress to the driver."""
    import ray.train
    from transformers import TrainerCallback

    class Reporter(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
            if "loss" not in logs:
                return
            if state.global_step == 1:
                check_first_loss(logs["loss"], job.config.train)
            if state.is_world_process_zero:
                now = {"step": state.global_step, "loss": logs["loss"], "accuracy": logs["rewards/accuracies"]}
                job.run.write_json(PROGRESS, {**now, "pid": os.getpid()})

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Each rank has a folder of its own: rank 0's holds everything but the other ranks' random states.
            # Ray uploads each rank's files into one checkpoint, and is the barrier.
            saved = ray.train.Checkpoint.from_directory(folder / "out" / f"checkpoint-{state.global_step}")
            ray.train.report({"step": state.global_step}, checkpoint=saved, delete_local_checkpoint_after_upload=True)

    return Reporter()


def check_first_loss(loss: float, settings: TrainConfig) -> None:
    """RuntimeError if policy and reference differ before the first step (float32 only: others round)."""
    if settings.dtype == "float32" and abs(loss - LN_2) > 1e-3:
        raise RuntimeError(f"the first loss is {loss:.5f}, not ln 2: policy and reference are not the same model")


def _export(job: Job, checkpoint: Path) -> None:
    """`run.adapter` and `run.model` from a checkpoint, in the policy's own dtype; the mark is left to the driver."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoTokenizer
    from trl.trainer.utils import create_model_from_path  # the same model class as in training

    run = job.run
    (run.path / MARK).unlink(missing_ok=True)
    if job.config.train.lora:
        policy = create_model_from_path(job.policy, dtype="auto", device_map=None)
        model = PeftModel.from_pretrained(policy, str(checkpoint)).merge_and_unload(safe_merge=True)
        adapter = _empty_folder(run.path / ".adapter.tmp")
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copy(checkpoint / name, adapter)
        _replace_folder(adapter, run.adapter)
    else:
        dtype = AutoConfig.from_pretrained(job.policy).dtype or torch.float32
        model = create_model_from_path(str(checkpoint), dtype=dtype, device_map=None)
        shutil.rmtree(run.adapter, ignore_errors=True)
    made = _empty_folder(run.path / ".model.tmp")
    model.save_pretrained(made)
    AutoTokenizer.from_pretrained(job.policy).save_pretrained(made)
    _replace_folder(made, run.model)


def _empty_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path


def _replace_folder(made: Path, final: Path) -> None:
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    made.rename(final)
    shutil.rmtree(old, ignore_errors=True)
