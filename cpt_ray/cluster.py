"""Connecting to Ray: the running cluster inside a job, else a local one; where its output goes; how SIGTERM ends what
is connected; its key-value store.

The key-value store is private in Ray; what is used of it is that of 2.60 (tests/test_contracts.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from cpt_ray.config import NO_PROGRESS_MINUTES
from cpt_ray.errors import UserError
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.node_cache import CACHE_ENV, cache_folder
from cpt_ray.tables.store_path import AnyPath, StorePath

QUIET_ENV = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "GLOO_LOG_LEVEL": "ERROR",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "PYTHONWARNINGS": "ignore",
}
"""Log levels of the libraries underneath, unless --verbose."""
ENGINE_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process more than needed: starts faster, dies with its actor
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines on a node must not pin themselves to the same cores
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    # Actors that wait are what brings nodes. Ray Data would ask for more of its own accord where those that there are
    # are busy, by CPUs and GPUs alone, so that other nodes than those that an actor can run on would start.
    **{
        f"RAY_DATA_DEFAULT_CLUSTER_SCALING_UP_{resource}_UTIL_THRESHOLD": "1e9"
        for resource in ("CPU", "GPU", "MEMORY", "OBJECT_STORE_MEMORY")
    },
}


Result = TypeVar("Result")


@contextmanager
def connected(
    verbose: bool = False,
    log: AnyPath | None = None,
    more_env: Mapping[str, str] | None = None,
    patience: float = NO_PROGRESS_MINUTES,
) -> Iterator[None]:
    """Ray, for as long as the block runs: the cluster in RAY_ADDRESS, else one that starts and ends with it.

    Unless `verbose`, what Ray and the libraries under it print to stderr meanwhile goes to the file `log`. `more_env`
    is for the processes of Ray, and this one, unless it has been set. `patience`: `patience_minutes` of this process.
    """
    global _patience
    _patience = patience
    is_own = not os.environ.get("RAY_ADDRESS")
    if is_own and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface: nobody else gets in
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a job's own env_vars are in os.environ already
    env = {**ENGINE_ENV, **({} if verbose else QUIET_ENV), **(more_env or {})}
    for name, value in env.items():
        os.environ.setdefault(name, value)
    variables = {name: os.environ[name] for name in env}
    if CACHE_ENV in os.environ:  # absolute, since not all workers have this working directory
        variables[CACHE_ENV] = str(cache_folder())
    options: dict[str, Any] = {"runtime_env": {"env_vars": variables}}
    if not verbose:
        options |= {"log_to_driver": False, "logging_level": logging.ERROR}
    if is_own:
        options |= {"include_dashboard": False, "address": "local"}
    with nullcontext() if verbose else _stderr_to(log or Path(os.devnull)):
        import ray

        if ray.is_initialized():  # a test's or a notebook's own cluster
            yield
            return
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(**options)
        except SystemExit as error:  # Ray's own handler of SIGTERM, while it starts
            if error.code != signal.SIGTERM or not callable(handler):
                raise
            terminated.set()
            raise KeyboardInterrupt from None
        except Exception as error:  # Ray has no kind of its own for it
            if "timed out during startup" not in str(error):
                raise
            raise UserError("Ray did not start in time; where the machine is busy, try again") from error
        if callable(handler) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)  # Ray has put one in its place that aborts the process
        if not verbose:
            _quiet_ray()
        try:
            yield
        finally:
            ray.shutdown()


terminated = threading.Event()
"""That SIGTERM (`kill`, `ray job stop`, Kubernetes) came, which ends a command as Ctrl-C does."""


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt in the block, if this is the main thread: no other can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        terminated.set()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def starts_own_cluster() -> bool:
    """Whether `connected` would start a cluster: none is named, and this process is in none yet."""
    ray = sys.modules.get("ray")
    return not os.environ.get("RAY_ADDRESS") and not (ray and ray.is_initialized())


def unused_port() -> int:
    """A port that nobody listens on, below the range that the kernel gives out by itself, since it is bound only
    seconds later."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def patience_minutes() -> float:
    """How long this process waits without any progress, where nothing is pending; what it connected with."""
    return _patience


_patience = NO_PROGRESS_MINUTES


def on_head(work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` on the cluster's head node: here, if this is it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    head = _head()
    if head is None or ray.get_runtime_context().get_node_id() == head["NodeID"]:
        return work(*arguments)
    there = NodeAffinitySchedulingStrategy(head["NodeID"], soft=False)
    try:
        result: Result = ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(work).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return result


def head_address() -> str:
    """The head node's, as the other nodes know it; this machine's if there is none."""
    head = _head()
    return head["NodeManagerAddress"] if head else "127.0.0.1"


def _head() -> Mapping[str, Any] | None:
    import ray

    return next((node for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]), None)


HEAD = "node:__internal_head__"
"""Ray has no public name for the head node; it gives it this resource (2.60)."""
ON_HEAD = {HEAD: 0.001}
"""Of an actor that asks for nothing else: Ray would put it on any node, and keep a GPU node from ending."""


# ---------------------------------------------------------------- notes that processes leave for their driver

_NOTES = "cpt"
"""The namespace, in Ray's key-value store, of what actors say of themselves: an actor that is still starting can be
asked nothing, and a further actor to tell it to would cost every pool a process."""


def leave_note(key: str, text: str) -> None:
    """Replaces the note of that key."""
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(key, text, namespace=_NOTES)


def read_notes(prefix: str) -> dict[str, str]:
    """The notes whose keys begin so."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    keys = _internal_kv_list(prefix, namespace=_NOTES)
    return {key.decode(): (_internal_kv_get(key, namespace=_NOTES) or b"").decode() for key in keys}


def remove_notes(prefix: str) -> None:
    """Removes them."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(prefix, del_by_prefix=True, namespace=_NOTES)


@contextmanager
def _stderr_to(path: AnyPath) -> Iterator[None]:
    """Sends file descriptor 2 to the end of a file: Ray's C++ core writes there, past sys.stderr.

    An object cannot be added to: it is put at the end, and has what the last command printed.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() if isinstance(path, StorePath) else path.open("ab") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            if isinstance(path, StorePath) and file.seek(0, os.SEEK_END):
                file.seek(0)
                with contextlib.suppress(StoreError):  # what led here is said, not this
                    path.put(file.read())


def _quiet_ray() -> None:
    import ray._private.worker
    import ray.data

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # what Ray says of lost nodes and retries is printed to stdout whatever `log_to_driver` is; private, in Ray 2.60
    ray._private.worker.print_to_stdstream = _print_to_stderr


def _print_to_stderr(data: Mapping[str, Any], ignore_prefix: bool) -> None:
    print(*data["lines"], sep="\n", file=sys.stderr, flush=True)
