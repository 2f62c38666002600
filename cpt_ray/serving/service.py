"""The tuned model for Serve's own config files (`serve deploy`, KubeRay's RayService), which deploy and keep it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from cpt_ray.config import load_config
from cpt_ray.engines.roles import with_dtype
from cpt_ray.errors import UserError
from cpt_ray.serving.deploy import counting, meter_name
from cpt_ray.serving.haproxy import running_serve
from cpt_ray.serving.holders import Holder
from cpt_ray.serving.keys import choose_keys
from cpt_ray.serving.served import plan_serving
from cpt_ray.serving.targets import make_targets
from cpt_ray.tables.rundir import RunDir

EVERY_INTERFACE = "0.0.0.0"
"""Where the config file's proxies listen, as far as is known here."""


class ServiceArguments(BaseModel):
    """`args` of the application in a Serve config file."""

    model_config = ConfigDict(extra="forbid")
    run_file: str
    overrides: tuple[str, ...] = ()


def application(arguments: Mapping[str, Any]) -> Any:
    """The tuned model of a run as a Serve application; `import_path` in the config file.

    Args:
        arguments: those of `ServiceArguments`.

    UserError if there is no key: no terminal is there to print one, and such a service is open to a network.
    """
    given = ServiceArguments.model_validate(arguments)
    config = load_config(Path(given.run_file), given.overrides)
    if config.serve.base:
        raise UserError("serve.base: a Serve config file has one application for each model; leave it out")
    run = RunDir.at(config.run_dir)
    config, _ = with_dtype(config, run)
    fixed, _ = choose_keys(EVERY_INTERFACE, run, api_key=None, insecure=False)
    served = replace(plan_serving(config, run, run.model), fixed_keys=fixed)
    holder = Holder(run_name=config.name, run_dir=str(run.path), meter=meter_name(run))
    running = running_serve()
    is_haproxy = running is not None and running.has_haproxy()
    with counting(run) as meter:
        return make_targets(config, served, holder, meter, is_haproxy)[0].target
