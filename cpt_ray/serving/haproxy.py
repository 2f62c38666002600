"""Where the server listens: HAProxy (or Ray's own proxy) on the head node, before the replicas' own ports.

All settings of HAProxy and of Ray Serve's processes are here, and what it takes of Ray that is private, for Ray 2.60.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

from cpt_ray.cluster import unused_port
from cpt_ray.errors import UserError

HEALTH_TIMEOUT_SECONDS = 60.0
"""Longest wait between all replicas running and the first answer over HTTP."""
REQUEST_SECONDS = 20
"""Time that a client has to send a request, or its first 64 KB."""
BUFFER_BYTES = 64 << 10
"""What HAProxy holds of a request: it can only repeat one that it holds whole."""
RETRY_ON = f"conn-failure empty-response\n    option http-buffer-request\n    timeout http-request {REQUEST_SECONDS}s"
"""HAProxy's `retry-on`, and two settings behind it that Ray 2.60 has no name for; it writes the text as it is.

A request is sent to another replica if one dies before the first byte of the answer. Ray's default is not to, since a
request may then be done twice: here that writes an answer, or at worst adds the same choices, again. For this HAProxy
waits for the whole request, within a bound, or until its buffer is full.
"""
HAPROXY_VARIABLE = "RAY_SERVE_ENABLE_HA_PROXY"
SERVE_ENV = {
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # Python alone may take more than Serve's 5 s
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",  # else a replica that is replaced stays for 30 s
}
"""Ray Serve reads these when it is imported, in every process of its own."""


def serve_env() -> dict[str, str]:
    """Environment of the processes of a cluster that serves.

    HAProxy takes the place of Ray's proxy in Python, which halves the requests per second. It must reach the replicas'
    own ports, so it is the default on a cluster of one machine only.
    """
    haproxy = {"RAY_SERVE_HAPROXY_RETRY_ON": RETRY_ON, "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES)}
    if os.environ.get("RAY_ADDRESS"):  # a variable of the job's own goes before these, and turns HAProxy on
        return SERVE_ENV | haproxy | {HAPROXY_VARIABLE: "0"}
    # any free ones, since several servers may be on a machine
    ports = ("RAY_SERVE_HAPROXY_METRICS_PORT", "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT")
    return {
        **SERVE_ENV,
        **haproxy,
        HAPROXY_VARIABLE: "1",
        **{name: str(unused_port()) for name in ports},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningServe:
    """Ray Serve as it runs on the cluster, whoever started it."""

    host: str
    port: int
    proxies: tuple[str, ...]
    """Names of the actors."""
    applications: dict[str, dict[str, Any]]
    """`ray.serve.schema.ApplicationDetails` by the application's name."""

    def has_haproxy(self) -> bool:
        """Whether HAProxy is in front, else Ray's proxy in Python: only the actor's class tells (Ray 2.60)."""
        import ray

        for name in self.proxies:
            with contextlib.suppress(ValueError):  # its node has just gone
                actor = ray.get_actor(name, namespace="serve")
                return bool(actor._ray_actor_creation_function_descriptor.class_name == "HAProxyManager")
        return os.environ.get(HAPROXY_VARIABLE) == "1"


def running_serve() -> RunningServe | None:
    """None where Serve does not run.

    Only its client knows how Serve listens, and `serve.status()` leaves the deployments' settings out (Ray 2.60). Ray
    keeps the client, also of a Serve that somebody has shut down since, and has no public way to forget it.
    """
    from ray.exceptions import ActorDiedError
    from ray.serve.context import _disconnect, _get_global_client

    try:
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is None:
            return None
        details, listening = client.get_serve_details(), client.http_config
    except ActorDiedError:  # one that restarts is waited for by Ray
        _disconnect()
        return None
    return RunningServe(
        host=str(listening.host),
        port=int(listening.port),
        proxies=tuple(proxy["actor_name"] for proxy in details["proxies"].values()),
        applications=details["applications"],
    )


def checked_port(host: str, port: int) -> int:
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


_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""What listens on every interface, and where this machine reaches it."""


def is_every_interface(host: str) -> bool:
    """Whether Serve listens on all addresses of its machine."""
    return host in _ANY


def reachable(host: str) -> str:
    """The host as a URL on this machine has it."""
    host = _ANY.get(host, host)
    return f"[{host}]" if ":" in host else host


def wait_until_healthy(origin: str, path: str) -> None:
    """UserError if `path` at `origin` (http://HOST:PORT) does not answer 200 in time."""
    deadline = time.monotonic() + HEALTH_TIMEOUT_SECONDS
    while True:
        # not urllib, which would ask `http_proxy` for an address of this machine
        connection = http.client.HTTPConnection(origin.removeprefix("http://"), timeout=HEALTH_TIMEOUT_SECONDS)
        try:
            connection.request("GET", path)
            answer = f"status {connection.getresponse().status}"
        except OSError as error:
            answer = str(error)
        finally:
            connection.close()
        if answer == "status 200":
            return
        if time.monotonic() > deadline:
            raise UserError(f"{origin}{path} does not answer after {HEALTH_TIMEOUT_SECONDS:.0f} s ({answer})")
        time.sleep(0.1)
