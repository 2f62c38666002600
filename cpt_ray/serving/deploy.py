"""The tuned model on Ray Serve: `serve_model` deploys it, waits, says how to ask it, and stops it all."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import signal
import threading
import time
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from cpt_ray.cluster import starts_own_cluster
from cpt_ray.config import ModelConfig, RunConfig
from cpt_ray.console import progress, say
from cpt_ray.engines.vllm import engine_env
from cpt_ray.errors import UserError
from cpt_ray.rubrics.catalog import EXAMPLE_PROMPT, Catalog
from cpt_ray.serving.app import CONFIGURATIONS_PATH, HEALTH_PATH, PAGE_PATHS
from cpt_ray.serving.haproxy import checked_port, on_head, reachable, running_port, wait_until_healthy
from cpt_ray.serving.keys import KEY_VARIABLE, Meter, choose_keys
from cpt_ray.serving.served import Served, plan_serving
from cpt_ray.serving.vllm_app import MAX_CAUSE, VllmServer, last_error
from cpt_ray.tables.rundir import SPENT_FILE, RunDir

APPLICATION = "cpt"
METER_FORMAT = 2
"""Goes up when `Key` or `Refusal` is another class: servers exchange them with a meter that outlives an upgrade."""
MAX_ONGOING_REQUESTS = 1024
"""Requests per replica that vLLM queues and batches itself; Serve holds back what is beyond."""
START_TIMEOUT_SECONDS = 1800.0
"""Loading and compiling a large model takes minutes; a node may have to start first."""
PROXY_PATH = "/-/healthz"
"""Serve's own: HEALTH_PATH is a replica's, and would wake a server that has gone to 0."""
UPSCALE_SECONDS = 5.0
"""How long more load must last before a replica is added; Serve's own 30 s lets a queue build up."""
LEAST_LOOK_BACK_SECONDS = 11.0
"""Serve measures the load every 10 s and averages over more than one measurement."""
TAKEOVER_POLL_SECONDS = 1.0
"""How often a `cpt serve` looks whether another one has taken over."""


def serve_model(
    config: RunConfig,
    run: RunDir,
    api_key: str | None,
    block: bool = True,
    model: Path | None = None,
    insecure: bool = False,
    connecting: AbstractContextManager[None] | None = None,
) -> str:
    """Serves the run's model (or `model`) until Ctrl-C or SIGTERM and returns its base URL.

    `connecting` connects to Ray, once all is checked that can be without it; without one, Ray is connected already.

    Where a model is served already, this one takes its place, at the same address, without a request failing. The keys
    are the run's (`cpt keys`) and `api_key` (else CPT_API_KEY); if there are none, one is made here and printed once.
    `insecure` does without. With `block=False` it returns once the model answers; `ray.serve.shutdown()` then ends
    it. UserError, naming the cause, for whatever keeps it from starting.
    """
    served = plan_serving(config, run, model or run.model)
    fixed, new_key = choose_keys(config.serve.host, run, api_key, insecure)
    served = replace(served, fixed_keys=fixed)
    if (
        connecting is not None and starts_own_cluster()
    ):  # refused before Ray starts; asked again below, on the head node
        checked_port(config.serve.host, config.serve.port)
    with connecting or contextlib.nullcontext():
        return _serve(config, run, served, new_key, block)


def _serve(config: RunConfig, run: RunDir, served: Served, new_key: str | None, block: bool) -> str:
    from ray import serve

    status = serve.status()
    is_replacing = APPLICATION in status.applications
    if status.proxies and not is_replacing:
        raise UserError("Ray Serve already runs something else on this cluster; stop it first (serve shutdown --yes)")
    host = config.serve.host
    port = running_port() if is_replacing else on_head(checked_port, host, config.serve.port)
    url = f"http://{reachable(host)}:{port}"
    with _interrupted_by_sigterm():
        try:
            targets = _applications(config, served)
            _start(config, targets, port)
            for name in set(status.applications) - {target.name for target in targets}:
                serve.delete(name)  # an untuned model that is no longer asked for
            asleep = config.serve.replicas.least == 0
            on_head(wait_until_healthy, url, PROXY_PATH if asleep else HEALTH_PATH)
            _print_examples(config, served.catalogs, url, new_key, block)
            if block:
                _block(run)
        except BaseException as error:
            if not is_replacing or isinstance(error, KeyboardInterrupt):
                _stop(run)
            raise
    return url


def _block(run: RunDir) -> None:
    """Until Ctrl-C, which stops the server; or until another `cpt serve` has taken over, which keeps it."""
    from ray import serve

    deployed = serve.status().applications[APPLICATION].last_deployed_time_s
    try:
        while True:
            time.sleep(TAKEOVER_POLL_SECONDS)
            application = serve.status().applications.get(APPLICATION)
            if application is None or application.last_deployed_time_s != deployed:
                say("the server was stopped" if application is None else "another `cpt serve` has taken over")
                return
    except KeyboardInterrupt:
        say("stopping")
        _stop(run)


def _meter_name(run: RunDir) -> str:
    """One per run directory: what a key has spent is written there."""
    return f"meter {METER_FORMAT} of {run.path}"


def _stop(run: RunDir) -> None:
    import ray
    from ray import serve

    with contextlib.redirect_stdout(io.StringIO()):  # Ray prints that the controller has ended, which is intended
        serve.shutdown()
    with contextlib.suppress(ValueError):  # it never started
        ray.kill(ray.get_actor(_meter_name(run), namespace=APPLICATION))


def _start_meter(run: RunDir) -> Any:
    """The run's meter: the one that is there already, or a new one."""
    import ray

    with contextlib.suppress(ValueError):  # an earlier version's outlives its server, and would write the same file
        ray.kill(ray.get_actor(f"meter of {run.path}", namespace=APPLICATION))
    return (
        ray.remote(Meter)
        .options(
            name=_meter_name(run),
            namespace=APPLICATION,
            get_if_exists=True,
            lifetime="detached",  # outlives a `cpt serve` that another one takes over from
            num_cpus=0,
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(run.path / SPENT_FILE)
    )


def _applications(config: RunConfig, served: Served) -> list[Any]:
    """The Serve applications: the tuned model and, if it is asked for, the untuned one."""
    from ray import serve

    policy, options = config.policy, config.serve
    count = 2 if served.untuned else 1
    meter = _start_meter(served.run)
    least, most = options.replicas
    scaling: dict[str, Any] = {"num_replicas": most}
    if least != most:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "initial_replicas": max(least, 1),
                "max_replicas": most,
                "target_ongoing_requests": options.target_ongoing_requests,
                "upscale_delay_s": UPSCALE_SECONDS,
                "downscale_delay_s": options.idle_seconds,
                "look_back_period_s": min(30.0, max(options.idle_seconds, LEAST_LOOK_BACK_SECONDS)),
            }
        }
    deployment = serve.deployment(
        serve.ingress()(VllmServer),
        **scaling,
        ray_actor_options={
            "num_cpus": policy.num_cpus,
            "num_gpus": policy.num_gpus,
            "runtime_env": {"env_vars": engine_env(policy)},
        },
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # what fails to start once fails again; after a first start Serve retries
        max_surge_percent=100 if _has_room(policy, count) else 0,  # newer weights start beside the older ones
    )
    quiet = _quiet_logging()
    tuned = deployment.options(name=APPLICATION).bind(served, meter)
    targets = [serve.RunTarget(tuned, name=APPLICATION, logging_config=quiet)]
    if base := served.untuned:
        untuned = replace(
            served,
            model=served.model.model_copy(update={"model": policy.model}),
            name=base["model"],
            adapters={},
            catalogs={base["model"]: next(iter(served.catalogs.values()))},
            candidates=None,
            conditioning=None,
            untuned=None,
        )
        bound = deployment.options(name=base["model"]).bind(untuned, meter)
        targets.append(serve.RunTarget(bound, name=base["model"], route_prefix=base["path"], logging_config=quiet))
    return targets


def _has_room(policy: ModelConfig, count: int) -> bool:
    """Whether the cluster could hold `count` more replicas now."""
    import ray

    free: dict[str, float] = ray.available_resources()
    return free.get("CPU", 0) >= policy.num_cpus * count and free.get("GPU", 0) >= policy.num_gpus * count


def _quiet_logging() -> Any:
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)


def _start(config: RunConfig, targets: list[Any], port: int) -> None:
    """Deploys and waits until every replica runs; UserError with the replica's own reason if one cannot."""
    from ray import serve

    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    wanted = max(config.serve.replicas.least, 1)
    with progress("serve", wanted * len(targets), "replicas") as advance:
        advance(0, "starting Serve")
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http_options = {"host": config.serve.host, "port": port}
        serve.start(proxy_location="HeadOnly", http_options=http_options, logging_config=_quiet_logging())
        serve.run_many(targets, wait_for_applications_running=False)
        running = 0
        while True:
            status = serve.status().applications
            applications = [status[target.name] for target in targets]
            deployments = [part for application in applications for part in application.deployments.values()]
            why = "\n".join(part.message for part in (*applications, *deployments))
            before, running = running, sum(part.replica_states.get("RUNNING", 0) for part in deployments)
            if all(application.status == "RUNNING" for application in applications):
                advance(running - before, "")
                return
            # a replica that no node has room for is only told from others by Serve's text (Ray 2.60)
            advance(running - before, "no node has room yet" if "be scheduled" in why else "starting the engine")
            if any(application.status == "DEPLOY_FAILED" for application in applications):
                raise UserError(f"the model cannot be served: {last_error(why) or _shortened(why)}")
            if time.monotonic() > deadline:
                raise UserError(f"the model is not served after {START_TIMEOUT_SECONDS:.0f} s: {_shortened(why)}")
            time.sleep(0.25)


def _shortened(text: str) -> str:
    return " ".join(text.split())[-MAX_CAUSE:]


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM (`ray job stop`, Kubernetes) ends what is inside as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: types.FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _print_examples(
    config: RunConfig, catalogs: dict[str, Catalog], url: str, new_key: str | None, block: bool
) -> None:
    name, catalog = next(iter(catalogs.items()))
    example = json.dumps({rubric.id: rubric.levels[-1].name for rubric in catalog.rubrics[:1]})
    messages = json.dumps([{"role": "user", "content": EXAMPLE_PROMPT}])
    if new_key:
        say(f"API key (made for this server, shown only here): {new_key}\n  export {KEY_VARIABLE}={new_key}")
    say(f"""serving      {name} at {url}{" (Ctrl-C stops it)" if block else ""}
playground   {url}{PAGE_PATHS[1]}

curl {url}/v1/chat/completions -H "Authorization: Bearer ${KEY_VARIABLE}" -H "Content-Type: application/json" \\
  -d '{{"model": "{name}", "configuration": {example}, "messages": {messages}}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="...")
client.chat.completions.create(model="{name}", messages={messages},
                               extra_body={{"configuration": {example}}})

What can be asked for:
curl {url}{CONFIGURATIONS_PATH} -H "Authorization: Bearer ${KEY_VARIABLE}\"""")
