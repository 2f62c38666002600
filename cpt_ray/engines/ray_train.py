"""A function on every rank of a Ray Train worker group, with its progress shown and its failures explained.

What is private in Ray Train is used for ray 2.60 (tests/test_contracts.py): the attributes of exceptions that lead to
the first cause, since Ray's own message is a traceback, and where it puts its actors.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cpt_ray.capacity import NO_GPU, node_types
from cpt_ray.config import Range
from cpt_ray.console import Advance, progress
from cpt_ray.engines.waiting import AT_WORK, Pulse, Waiting, explained, first_cause
from cpt_ray.errors import UserError
from cpt_ray.tables.store_path import AnyPath

if TYPE_CHECKING:
    from ray.train.torch import TorchTrainer

POLL_SECONDS = 0.5
WATCHER = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
"""Ray Train's only actor that asks for no node at all: Ray may put it on a GPU node, which then does not end as long as
a training on CPUs lasts. It tells ahead which nodes will be taken away; without it, Ray Train notices when they are."""


@dataclass(frozen=True, kw_only=True)
class WorkerGroup:
    """What a stage wants of Ray Train."""

    stage: str
    """Its section of the run file, with `num_workers` in it."""
    num_workers: Range
    use_gpu: bool
    resources: Mapping[str, float]
    """Of each worker, by Ray's names."""
    max_failures: int
    """How often workers that died are started again."""
    resumes_from: str
    """Where the same command resumes, for the message."""
    less_memory: str
    """The settings to lower where memory is short."""


def run_workers(
    work: Callable[[dict[str, Any]], Any],
    settings: dict[str, Any],
    group: WorkerGroup,
    *,
    name: str,
    storage: str,
    state: AnyPath,
    title: str,
    steps: int,
) -> Any:
    """Runs `work(settings)` on every rank and shows how far it is; what rank 0 returns, or UserError with the cause.

    Args:
        name: of the Ray Train run; a run of this name in `storage` is resumed.
        state: a file that rank 0 replaces as it goes: {"done": steps, "note": what to show, "error": why it ends}.
        title: of the progress line. steps: of a whole run.
    """
    least = group.num_workers.least
    types, remedy = node_types(), f"lower {group.stage}.num_workers"
    types.check(f"the training of {group.stage}", group.resources, least, remedy)
    each = types.placed(group.resources, least)
    waiting = Waiting(group.stage, each, least, remedy, "workers", types)
    is_off_gpus = NO_GPU in each and WATCHER not in os.environ
    if is_off_gpus:
        os.environ[WATCHER] = "0"
    trainer = _trainer({"work": work, "settings": settings, "pulse": waiting.pulse}, group, each, name, storage)
    state.unlink(missing_ok=True)
    fit: Future[Any] = Future()
    # in a thread of its own, so that Ctrl-C stays this program's and the progress can be shown
    threading.Thread(target=_fit, args=(trainer, fit), name="fit", daemon=True).start()
    try:
        with progress(title, steps, "steps") as advance, closing(waiting):
            _show_progress(fit, state, f"starting {group.num_workers} workers", steps, waiting, advance)
    finally:
        if is_off_gpus:  # only for this training: another of this process may be on GPUs
            del os.environ[WATCHER]
    if error := fit.exception():
        why = read_progress(state).get("error") or explain_failure(error, group)
        raise UserError(f"{group.stage}: {why}") from error
    return fit.result()


def _trainer(
    config: dict[str, Any], group: WorkerGroup, resources: Mapping[str, float], name: str, storage: str
) -> TorchTrainer:
    import ray.train
    from ray.train.torch import TorchTrainer

    least, most = group.num_workers
    return TorchTrainer(
        _work_with_pulse,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=least if least == most else (least, most),
            use_gpu=group.use_gpu,
            resources_per_worker=dict(resources),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            # a start that finds no room in a minute is tried again, as long as `Waiting` lets it
            failure_config=ray.train.FailureConfig(max_failures=group.max_failures, controller_failure_limit=-1),
            logging_config=ray.train.LoggingConfig(log_level="ERROR"),
        ),
    )


def _fit(trainer: TorchTrainer, outcome: Future[Any]) -> None:
    try:
        outcome.set_result(trainer.fit().return_value)
    except BaseException as error:  # raised by the thread that waits for this one
        outcome.set_exception(error)


def _show_progress(fit: Future[Any], state: AnyPath, note: str, steps: int, waiting: Waiting, advance: Advance) -> None:
    """Shows what `state` says until the training ends."""
    done = 0
    while not fit.done():
        waiting.look((done, note))
        advance(0, note)
        wait_for([fit], POLL_SECONDS)
        latest = read_progress(state)
        if "done" in latest:
            reached, note = latest["done"], latest["note"]
            if reached < done:
                note = f"a worker died; again from step {reached}"
            advance(max(0, reached - done), note)
            done = max(done, reached)
    advance(0 if fit.exception() else steps - done, note)


def _work_with_pulse(config: dict[str, Any]) -> Any:
    """On each rank: `work(settings)`, while the rank says that it gets on."""
    import ray

    pulse: Pulse = config["pulse"]
    pulse.start(ray.get_runtime_context().get_actor_id(), AT_WORK)
    return config["work"](config["settings"])


def read_progress(state: AnyPath) -> dict[str, Any]:
    """What rank 0 last said of its progress; nothing if it cannot be read now."""
    try:
        content: dict[str, Any] = json.loads(state.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # none yet, or just being replaced on a folder that nodes share
        return {}
    return content


def explain_failure(error: BaseException, group: WorkerGroup) -> str:
    """Why a worker group failed, in one line: the cause, not what the other ranks made of it."""
    from ray.exceptions import RayActorError

    failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
    causes = [first_cause(failure) for failure in failures.values()]
    cause = min(causes, key=lambda error: "Dist" in type(error).__name__ or "onnection" in str(error))
    if isinstance(cause, RayActorError):
        return (
            f"a worker died more than {group.max_failures} times (killed from outside, or out of memory); "
            f"the same command goes on {group.resumes_from}"
        )
    return explained(cause, group.less_memory)
