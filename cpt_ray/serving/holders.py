"""Who serves under which name on a cluster that others use too.

Every run is a Serve application of its own, named as the run is. Its deployment is marked with the `cpt serve` that
deployed it, its holder: in the deployment's user_config, so that mark and deployment are replaced together, and outlive
the process that wrote them and Serve's controller.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from cpt_ray.cluster import ON_HEAD
from cpt_ray.config import JOB_ENV
from cpt_ray.errors import UserError
from cpt_ray.serving.haproxy import running_serve

NAMESPACE = "cpt"
"""Ray's namespace of what has a name here."""
TURN_SECONDS = 120.0
"""Longest wait for another `cpt serve` of the same name to deploy or to end, which takes seconds."""
POLL_SECONDS = 0.2


def _this_job() -> str:
    """The submission id of a Ray job, else the process."""
    try:
        submission = json.loads(os.environ[JOB_ENV])["metadata"]["job_submission_id"]
    except (KeyError, ValueError, TypeError):
        return f"process {os.getpid()} on {socket.gethostname()}"
    return f"job {submission}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """One `cpt serve`."""

    run_name: str
    run_dir: str
    meter: str
    """Name of the run's meter, an actor in NAMESPACE."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    since: float = field(default_factory=time.time)
    """Unix seconds."""
    job: str = field(default_factory=_this_job)
    previous: str = ""
    """The id of the holder that this one takes over from."""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        return f"{self.run_dir} ({self.job}, since {since})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """One of Serve's applications, of anybody."""

    holder: Holder | None
    """None: no `cpt serve` deployed it."""
    route: str | None
    status: str
    why: str
    """Serve's messages about it and its deployments."""
    replicas: Counter[str]
    """How many are in each state."""

    @property
    def is_going(self) -> bool:
        """Whether it has been deleted and its replicas end."""
        return self.status == "DELETING"


def applications() -> dict[str, Application]:
    """All that are on the cluster, by name."""
    serve = running_serve()
    return {} if serve is None else {name: _parsed(details) for name, details in serve.applications.items()}


def _parsed(details: Mapping[str, Any]) -> Application:
    deployments = list(details["deployments"].values())
    marks = [deployment["deployment_config"].get("user_config") for deployment in deployments]
    holders = [_holder(mark) for mark in marks]
    return Application(
        holder=holders[0] if holders else None,
        route=details["route_prefix"],
        status=str(details["status"].value),
        why="\n".join(part["message"] for part in (details, *deployments)),
        replicas=Counter(str(replica["state"].value) for part in deployments for replica in part["replicas"]),
    )


def _holder(mark: Any) -> Holder | None:
    """What is in a deployment's user_config, if a `cpt serve` of this or a later version wrote it."""
    names = {entry.name for entry in fields(Holder)}
    if not isinstance(mark, dict) or not names <= mark.keys():
        return None
    return Holder(**{name: mark[name] for name in names})


def marked(holder: Holder) -> dict[str, Any]:
    """A deployment's user_config."""
    return asdict(holder)


class _Turn:
    """An actor that does nothing but have a name."""


@contextmanager
def taking_turns(name: str) -> Iterator[None]:
    """One `cpt serve` of a name at a time is in here, to look who holds it and then to deploy or to delete.

    The lock is the name of an actor: Ray gives a name once, and ends the actor with the process that made it. UserError
    if another one does not come out in time.
    """
    import ray

    deadline = time.monotonic() + TURN_SECONDS
    while True:
        try:
            options = {"name": f"turn {name}", "namespace": NAMESPACE, "num_cpus": 0, "resources": ON_HEAD}
            turn = ray.remote(_Turn).options(**options).remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise UserError(
                    f"another `cpt serve` has been deploying or ending {name} for {TURN_SECONDS:.0f} s; look at its job"
                ) from None
            time.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        ray.kill(turn)


def check_free(names: Sequence[str], routes: Sequence[str], holder: Holder, replace: bool) -> Holder | None:
    """Who is taken over from: None if nobody serves under the run's name; UserError if it is not to be had.

    Args:
        names: of the run's applications, the tuned model's first.
        routes: their paths.
        replace: whether to take the name over from another run directory.
    """
    there = {name: application for name, application in applications().items() if not application.is_going}
    another_name = "give this run another name (name=NAME)"
    for name, application in there.items():
        other = application.holder
        if name in names and other is None:
            raise UserError(f"name: {name} is the name of a Serve application that is not of cpt; {another_name}")
        if name in names and other is not None and other.run_name != holder.run_name:
            raise UserError(f"serve.base: the name {name} is held by {other}; {another_name}")
        if name in names and other is not None and other.run_dir != holder.run_dir and not replace:
            raise UserError(f"name: {name} is served already, by {other}; {another_name}, or take over with --replace")
        if name not in names and application.route in routes:
            raise UserError(f"name: {application.route} is the path of the Serve application {name}; {another_name}")
    return next((there[name].holder for name in names if name in there), None)


def is_taken_from(holder: Holder, application: Application) -> bool:
    """Whether another `cpt serve` has it; not if one tried to take over from `holder` and failed."""
    other = application.holder
    if other is None or other.id == holder.id:
        return False
    return not (other.previous == holder.id and application.status == "DEPLOY_FAILED")


def is_of(holder: Holder, application: Application) -> bool:
    """Whether it is `holder`'s to end."""
    other = application.holder
    return other is not None and other.run_name == holder.run_name and not is_taken_from(holder, application)
