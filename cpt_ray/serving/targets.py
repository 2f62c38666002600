"""What a run deploys on Ray Serve: the settings of its applications."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from cpt_ray.capacity import actor_options, node_types
from cpt_ray.config import ModelConfig, RunConfig, ServeConfig
from cpt_ray.engines.vllm import engine_env
from cpt_ray.engines.waiting import Waiting
from cpt_ray.serving.haproxy import HAPROXY_VARIABLE
from cpt_ray.serving.holders import Holder, marked
from cpt_ray.serving.served import Served
from cpt_ray.serving.vllm_app import VllmServer

MAX_ONGOING_REQUESTS = 1024
"""Requests per replica that vLLM queues and batches itself; Serve holds back what is beyond."""
UPSCALE_SECONDS = 5.0
"""How long more load must last before a replica is added; Serve's own 30 s lets a queue build up."""
LEAST_LOOK_BACK_SECONDS = 11.0
"""Serve measures the load every 10 s and averages over more than one measurement."""


def make_targets(config: RunConfig, served: Served, holder: Holder, meter: Any, is_haproxy: bool) -> list[Any]:
    """`serve.RunTarget`s: the tuned model and, if it is asked for, the untuned one."""
    from ray import serve

    policy, count = config.policy, 2 if served.untuned else 1
    # a replica listens by itself where HAProxy is in front, which may be another job's choice; and Serve, which starts
    # it, may be older than this job, so that it does not have its environment
    environment = engine_env(policy) | {HAPROXY_VARIABLE: str(int(is_haproxy))} | served.run.environment
    deployment = serve.deployment(
        serve.ingress()(VllmServer),
        **_scaling(config.serve),
        ray_actor_options=actor_options(replica_resources(config, count)) | {"runtime_env": {"env_vars": environment}},
        user_config=marked(holder),
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=1,  # what fails to start once fails again; after a first start Serve retries
        max_surge_percent=100 if _has_room(policy, count) else 0,  # newer weights start beside the older ones
    )
    quiet = quiet_logging()
    name = config.name
    tuned = deployment.options(name=name).bind(served, meter)
    targets = [serve.RunTarget(tuned, name=name, route_prefix=f"/{name}", logging_config=quiet)]
    if base := served.untuned:
        bound = deployment.options(name=base["model"]).bind(_untuned(served, base["model"], policy), meter)
        route = f"/{name}{base['path']}"
        targets.append(serve.RunTarget(bound, name=base["model"], route_prefix=route, logging_config=quiet))
    return targets


def _scaling(options: ServeConfig) -> dict[str, Any]:
    """How many replicas there are, in Serve's words."""
    least, most = options.replicas
    if least == most:
        return {"num_replicas": most}
    return {
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


def _untuned(served: Served, name: str, policy: ModelConfig) -> Served:
    """The untuned model under a name of its own, with neither adapters nor preferences."""
    return replace(
        served,
        model=served.model.model_copy(update={"model": policy.model}),
        name=name,
        adapters={},
        catalogs={name: next(iter(served.catalogs.values()))},
        candidates=None,
        conditioning=None,
        untuned=None,
    )


def waiting_for(config: RunConfig, num_applications: int) -> Waiting:
    """For the replicas; UserError if the cluster can never have them."""
    count, types = max(config.serve.replicas.least, 1) * num_applications, node_types()
    remedy = "lower serve.replicas, policy.num_cpus or policy.num_gpus"
    types.check("the server", config.policy.actor_resources, count, remedy)
    return Waiting("serve", replica_resources(config, num_applications), count, remedy, "replicas", types)


def replica_resources(config: RunConfig, num_applications: int) -> dict[str, float]:
    """What each replica asks for: without a GPU, on nodes that have none, if there can be enough for all replicas."""
    return node_types().placed(config.policy.actor_resources, config.serve.replicas.most * num_applications)


def _has_room(policy: ModelConfig, count: int) -> bool:
    """Whether the cluster could hold `count` more replicas now."""
    import ray

    free: dict[str, float] = ray.available_resources()
    return free.get("CPU", 0) >= policy.num_cpus * count and free.get("GPU", 0) >= policy.num_gpus * count


def quiet_logging() -> Any:
    """Serve's `LoggingConfig` without its line per request: the access log has them."""
    from ray.serve.schema import LoggingConfig

    return LoggingConfig(log_level="WARNING", enable_access_log=False)
