"""The tuned model on Ray Serve: `serve_model` deploys it, waits, says how to ask it, and stops it all."""

from __future__ import annotations

import contextlib
import io
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from cpt_ray.cluster import ON_HEAD, head_address, interrupted_by_sigterm, on_head, starts_own_cluster
from cpt_ray.config import RunConfig
from cpt_ray.console import progress, say
from cpt_ray.engines.waiting import Pulse, Waiting
from cpt_ray.errors import UserError
from cpt_ray.serving.app import HEALTH_PATH
from cpt_ray.serving.examples import print_examples
from cpt_ray.serving.haproxy import (
    RunningServe,
    checked_port,
    is_every_interface,
    reachable,
    running_serve,
    wait_until_healthy,
)
from cpt_ray.serving.holders import (
    NAMESPACE,
    POLL_SECONDS,
    TURN_SECONDS,
    Application,
    Holder,
    applications,
    check_free,
    is_of,
    is_taken_from,
    taking_turns,
)
from cpt_ray.serving.keys import Meter, choose_keys, is_loopback
from cpt_ray.serving.served import Served, plan_serving, untuned_name
from cpt_ray.serving.targets import make_targets, quiet_logging, waiting_for
from cpt_ray.serving.vllm_app import MAX_CAUSE, last_error
from cpt_ray.tables.rundir import SPENT_FILE, RunDir
from cpt_ray.tables.store_path import AnyPath

METER_FORMAT = 2
"""Goes up when `Key` or `Refusal` is another class: servers exchange them with a meter that outlives an upgrade."""
PROXY_PATH = "/-/healthz"
"""Serve's own: HEALTH_PATH is a replica's, and would wake a server that has gone to 0."""
TAKEOVER_POLL_SECONDS = 1.0
"""How often a `cpt serve` looks whether another one has taken over."""
STOP_SECONDS = 60.0
"""How long replicas may take to finish what they are at."""


def serve_model(
    config: RunConfig,
    run: RunDir,
    api_key: str | None,
    block: bool = True,
    model: AnyPath | None = None,
    insecure: bool = False,
    replace_other: bool = False,
    connecting: AbstractContextManager[None] | None = None,
) -> str:
    """Serves the run's model (or `model`) until Ctrl-C or SIGTERM and returns its base URL, http://HOST:PORT/NAME.

    `connecting` connects to Ray, once all is checked that can be without it; without one, Ray is connected already.

    Where the run is served already, this one takes its place, at the same address, without a request failing. A name
    that another run directory holds is refused, unless `replace_other` takes it over. Serve and the other applications
    on the cluster are left as they are. The keys are the run's (`cpt keys`) and `api_key` (else CPT_API_KEY); if there
    are none, one is made here and printed once. `insecure` does without. With `block=False` it returns once the model
    answers; `ray.serve.delete(NAME)` then ends it. UserError, naming the cause, for whatever keeps it from starting.
    """
    served = plan_serving(config, run, model or run.model)
    fixed, new_key = choose_keys(config.serve.host, run, api_key, insecure)
    served = replace(served, fixed_keys=fixed)
    owns_cluster = connecting is not None and starts_own_cluster()
    if owns_cluster:  # refused before Ray starts; asked again below, on the head node
        checked_port(config.serve.host, config.serve.port)
    holder = Holder(run_name=config.name, run_dir=str(run.path), meter=meter_name(run))
    with connecting or contextlib.nullcontext(), interrupted_by_sigterm():
        server = _Server(config, served, holder, owns_cluster)
        try:
            url = server.start(replace_other)
            print_examples(config, served.catalogs, url, new_key, block)
            if block:
                server.block()
        except BaseException as error:
            if server.previous is None or isinstance(error, KeyboardInterrupt):
                server.stop()
            raise
    return url


class _Server:
    """The applications of one run on the cluster, as long as they are this process's."""

    def __init__(self, config: RunConfig, served: Served, holder: Holder, owns_cluster: bool):
        self._config, self._served, self._holder, self._owns_cluster = config, served, holder, owns_cluster
        self._names = [config.name, *([served.untuned["model"]] if served.untuned else [])]
        self.previous: Holder | None = None
        """Who is taken over from."""
        self._old_meter = ""
        """Of a run that was taken over from, to be ended."""

    def start(self, replace_other: bool) -> str:
        """Deploys and waits until the model answers; returns its URL."""
        waiting = waiting_for(self._config, len(self._names))
        with contextlib.closing(waiting), progress("serve", waiting.count, "replicas") as advance:
            advance(0, "starting Serve")
            running = self._deploy(replace_other, waiting.pulse)
            self._wait(advance, waiting)
        host, port = self._config.serve.host, self._config.serve.port
        if running.host != host or port not in (0, running.port):
            say(
                f"note: Serve was on this cluster already and listens on {running.host}:{running.port}; "
                f"serve.host={host} and serve.port={port} do not apply"
            )
        self._end_untuned()
        here, path = f"http://{reachable(running.host)}:{running.port}", f"/{self._config.name}"
        asleep = self._config.serve.replicas.least == 0
        on_head(wait_until_healthy, here, PROXY_PATH if asleep else path + HEALTH_PATH)
        if self._owns_cluster or not is_every_interface(running.host):
            return here + path
        return f"http://{reachable(head_address())}:{running.port}{path}"  # who reads it may be on another machine

    def _deploy(self, replace_other: bool, pulse: Pulse) -> RunningServe:
        """Takes the run's name."""
        from ray import serve
        from ray.exceptions import RayTaskError

        config, name = self._config, self._config.name
        with taking_turns(name):
            routes = [f"/{name}", f"/{name}/base"][: len(self._names)]
            previous = check_free(self._names, routes, self._holder, replace_other)
            running = started_serve(config, needs_no_key=self._served.fixed_keys is None)
            self._holder = replace(self._holder, previous=previous.id if previous else "")
            self.previous, self._old_meter = previous, previous.meter if previous else ""
            with counting(self._served.run) as meter:
                served = replace(self._served, pulse=pulse)
                targets = make_targets(config, served, self._holder, meter, running.has_haproxy())
                try:
                    serve.run_many(targets, wait_for_applications_running=False)
                except RayTaskError as error:  # somebody took the path meanwhile
                    raise UserError(f"name: {_shortened(str(error.cause))}") from None
                self._wait_until_taken_up()
        return running

    def _wait_until_taken_up(self) -> None:
        name, deadline = self._config.name, time.monotonic() + TURN_SECONDS
        while (there := applications().get(name)) is None or there.holder != self._holder:
            if time.monotonic() > deadline:
                raise UserError(f"Serve has not taken up {name} after {TURN_SECONDS:.0f} s; look at its controller")
            time.sleep(POLL_SECONDS)

    def _wait(self, advance: Callable[[int, str], None], waiting: Waiting) -> None:
        """Until every replica runs; UserError with the replica's own reason if one cannot."""
        running = 0
        while True:
            there = applications()
            parts = [there[name] for name in self._names if name in there]
            if taker := next((part.holder for part in parts if is_taken_from(self._holder, part)), None):
                raise UserError(f"name: {self._config.name} was taken over by {taker}, while this one started")
            if len(parts) < len(self._names):
                raise UserError("the server was stopped while it started")
            why = "\n".join(part.why for part in parts)
            before, running = running, sum(part.replicas["RUNNING"] for part in parts)
            if all(part.status == "RUNNING" for part in parts):
                advance(running - before, "")
                return
            # a replica that no node has room for is only told from others by Serve's text (Ray 2.60)
            advance(running - before, "no node has room yet" if "be scheduled" in why else "starting the engine")
            if any(part.status == "DEPLOY_FAILED" for part in parts):
                raise UserError(f"the model cannot be served: {last_error(why) or _shortened(why)}")
            waiting.look(running)
            time.sleep(POLL_SECONDS)

    def _end_untuned(self) -> None:
        """Deletes the untuned model of who was here before, if it is no longer asked for."""
        from ray import serve

        run_name, name = self._config.name, untuned_name(self._config)
        if name in self._names or name not in applications():
            return
        with taking_turns(run_name):
            there = applications()
            other, tuned = (there[part].holder if part in there else None for part in (name, run_name))
            if other is not None and other.run_name == run_name and tuned == self._holder:
                serve.delete(name, _blocking=False)

    def block(self) -> None:
        """Until Ctrl-C, which stops the server; or until another `cpt serve` has taken over, which keeps it."""
        name = self._config.name
        try:
            while True:
                time.sleep(TAKEOVER_POLL_SECONDS)
                there = applications().get(name)
                if there is None or there.is_going:
                    say("the server was stopped")
                    self.stop()  # what else there is of it
                    break
                if there.status == "RUNNING" and is_taken_from(self._holder, there):
                    say(f"{there.holder} has taken over {name}; this one ends, and leaves the server to it")
                    break
                self._end_old_meter(there)
        except KeyboardInterrupt:
            say("stopping")
            self.stop()

    def _end_old_meter(self, there: Application) -> None:
        """Ends the meter of the run that was taken over from, once the last of its replicas has counted."""
        if self._old_meter and set(there.replicas) <= {"RUNNING"}:
            with contextlib.suppress(UserError):  # somebody deploys with it for long: asked again at the next look
                _end_meter(self._old_meter)
                self._old_meter = ""

    def stop(self) -> None:
        """Gives back all that is this process's, and nothing else: the name may be another's by now."""
        from ray import serve

        with taking_turns(self._config.name):
            there = applications()
            mine = [name for name in self._names if name in there and is_of(self._holder, there[name])]
            for name in mine:
                serve.delete(name, _blocking=False)
        deadline = time.monotonic() + STOP_SECONDS
        while mine and not applications().keys().isdisjoint(mine) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        with contextlib.suppress(UserError):  # who deploys with it for so long ends it when they stop
            _end_meter(self._holder.meter)
        if self._owns_cluster:
            with contextlib.redirect_stdout(io.StringIO()):  # Ray prints that the controller has ended, as intended
                serve.shutdown()


def started_serve(config: RunConfig, needs_no_key: bool) -> RunningServe:
    """Serve as it runs already, whoever started it, else started here with what the run file says.

    UserError if it lets a network in that the run file does not, and nobody needs a key.
    """
    from ray import serve

    host, port = config.serve.host, config.serve.port
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if running_serve() is None:
        options = {"host": host, "port": on_head(checked_port, host, port)}
        with contextlib.suppress(ValueError):  # another one has just started it
            serve.start(proxy_location="HeadOnly", http_options=options, logging_config=quiet_logging())
    running = running_serve()
    if running is None:
        raise UserError("Ray Serve did not start on this cluster; look at its controller")
    if needs_no_key and is_loopback(host) and not is_loopback(running.host):
        raise UserError(
            f"serve.host: Serve on this cluster listens on {running.host}, which is open to the network; leave out "
            f"--insecure, or give serve.host={running.host} with it"
        )
    return running


def meter_name(run: RunDir) -> str:
    """One per run directory, whatever the run's name: what a key has spent is written there."""
    return f"meter {METER_FORMAT} of {run.path}"


def _end_meter(name: str) -> None:
    """Ends a run's meter, unless an application still counts with it."""
    import ray

    with taking_turns(name):  # nobody begins to count with it meanwhile, under whatever name it serves the run
        if any(part.holder is not None and part.holder.meter == name for part in applications().values()):
            return
        with contextlib.suppress(ValueError):  # it never started
            ray.kill(ray.get_actor(name, namespace=NAMESPACE))


@contextlib.contextmanager
def counting(run: RunDir) -> Iterator[Any]:
    """The run's meter, which nobody ends while the block runs: in it, Serve is told who counts with the meter."""
    with taking_turns(meter_name(run)):
        yield _start_meter(run)


def _start_meter(run: RunDir) -> Any:
    """The run's meter: the one that is there already, or a new one."""
    import ray

    with contextlib.suppress(ValueError):  # an earlier version's outlives its server, and would write the same file
        ray.kill(ray.get_actor(f"meter of {run.path}", namespace=NAMESPACE))
    return (
        ray.remote(Meter)
        .options(
            name=meter_name(run),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",  # outlives a `cpt serve` that another one takes over from
            num_cpus=0,
            resources=ON_HEAD,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(run.path / SPENT_FILE)
    )


def _shortened(text: str) -> str:
    return " ".join(text.split())[-MAX_CAUSE:]
