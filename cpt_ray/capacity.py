"""What the cluster has, what it can have, and what is on its way: what a stage needs is compared with it.

What is private in Ray is that of 2.60 (tests/test_contracts.py): its autoscalers tell a driver what they launch, but
not which types of nodes there can be; that is read from the file that the autoscaler itself reads.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cpt_ray.cluster import HEAD, on_head
from cpt_ray.errors import UserError

NO_GPU = "no_gpu"
"""A resource that nodes without GPUs may be given (cluster.yaml). Where there is one, or can be, work that needs no GPU
runs there alone, so that it starts no GPU node and keeps none from ending."""
_SHARE = 0.001
"""Of NO_GPU, for each actor."""
_MEMORY, _NODE = "memory", "node:"
"""Ray's names: bytes of a node, and the beginning of a name that one node alone has."""
_ROUNDING = 1e-6
"""A CPU holds ten times a tenth."""


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind."""

    name: str
    resources: Mapping[str, float]
    """Of one node; none if they are not known before it is there."""
    most: float
    """How many there can be."""

    def holds(self, each: Mapping[str, float]) -> float:
        """How many times one node has these resources; which node is asked for by its address does not count."""
        wanted = {name: amount for name, amount in each.items() if amount and not name.startswith(_NODE)}
        times = (self.resources.get(name, 0) / amount for name, amount in wanted.items())
        return min((math.floor(count + _ROUNDING) for count in times), default=math.inf)

    def shown(self, each: Mapping[str, float]) -> str:
        """As in "cpu: {CPU: 16}"; the memory, which every node has, only if it is asked for."""
        names = {"CPU", *(self.resources.keys() - {_MEMORY}), *(each.keys() & {_MEMORY})}
        return f"{self.name}: {shown_resources({name: self.resources.get(name, 0) for name in names})}"


@dataclass(frozen=True)
class NodeTypes:
    """The nodes that a cluster has and, if it can grow, those that it can have."""

    here: Sequence[NodeType]
    to_come: Sequence[NodeType] = ()
    most_workers: float = 0
    """Nodes to come, of all types together."""
    is_known: bool = True
    """False where nodes may come of types that nobody tells of."""

    def room(self, each: Mapping[str, float]) -> float:
        """How many times these resources fit, each on one node; infinity if that cannot be known."""
        if not self.is_known or any(not node_type.resources for node_type in self.to_come):
            return math.inf
        here = sum(node_type.holds(each) * node_type.most for node_type in self.here)
        left, grown = self.most_workers, sum(head.holds(each) for head in self.here if head.name == "head")
        for node_type in sorted(self.to_come, key=lambda node_type: -node_type.holds(each)):
            count = min(left, node_type.most)
            left, grown = left - count, grown + (count * node_type.holds(each) if count else 0)
        return max(here, grown)

    def check(self, what: str, each: Mapping[str, float], count: int, remedy: str) -> None:
        """UserError if the cluster neither has nor can have `count` times these resources, each on one node."""
        room = self.room(each)
        if room >= count:
            return
        wanted = shown_resources(each)
        remedy += ", or add such nodes" if os.environ.get("RAY_ADDRESS") else ", or run on a cluster (RAY_ADDRESS)"
        if room < 1:
            whose = "no node type of this cluster has that" if self.to_come else "no node here has that"
            raise UserError(f"{what} needs {wanted} on one node; {whose} ({self._shown(each)}); {remedy}")
        raise UserError(f"{what} needs {count} x {wanted}; there is room for {room:g} ({self._shown(each)}); {remedy}")

    def placed(self, each: Mapping[str, float], count: int = 1) -> dict[str, float]:
        """The resources to ask for: with a share of NO_GPU if there is no GPU or custom resource among them, and there
        can be nodes of that kind for all of `count`."""
        asked = {name: amount for name, amount in each.items() if amount}
        with_share = {**asked, NO_GPU: _SHARE}
        is_there = any(NO_GPU in node_type.resources for node_type in (*self.here, *self.to_come))
        is_for_cpus = set(asked) <= {"CPU", "memory"}
        return with_share if is_for_cpus and is_there and self.room(with_share) >= count else asked

    def may_hold(self, name: str, each: Mapping[str, float]) -> bool:
        """Whether a node of the type of this name can have these resources, as far as that is known."""
        kinds = [kind for kind in self.to_come if kind.name == name and kind.resources]
        return not kinds or any(kind.holds(each) >= 1 for kind in kinds)

    def _shown(self, each: Mapping[str, float]) -> str:
        kinds = self.to_come and [kind for kind in self.here if kind.name == "head"]
        return ", ".join(dict.fromkeys(kind.shown(each) for kind in [*(kinds or self.here), *self.to_come]))


def actor_options(each: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options of an actor with these resources: three have an option of their own."""
    named = {"num_cpus": each.get("CPU", 0), "num_gpus": each.get("GPU", 0)}
    if _MEMORY in each:
        named[_MEMORY] = each[_MEMORY]
    return {**named, "resources": {name: each[name] for name in each.keys() - {"CPU", "GPU", _MEMORY}}}


def node_types() -> NodeTypes:
    """The cluster's, now."""
    import ray

    shapes = Counter(
        ("head" if HEAD in node["Resources"] else "node", frozenset(_plain(node["Resources"]).items()))
        for node in ray.nodes()
        if node["Alive"]
    )
    here = [NodeType(name, dict(shape), count) for (name, shape), count in shapes.items()]
    address = ray.get_runtime_context().gcs_address
    config = on_head(_autoscaling_config, address) if os.environ.get("RAY_ADDRESS") else {}
    if not config:
        return NodeTypes(here, is_known=config is not None)
    most = config.get("max_workers", 0)
    to_come = [
        NodeType(name, _plain(kind.get("resources") or {}), kind.get("max_workers", most))
        for name, kind in config["available_node_types"].items()
        if name != config["head_node_type"]
    ]
    return NodeTypes(here, to_come, most)


def _autoscaling_config(gcs_address: str) -> dict[str, Any] | None:
    """On the head node: what its autoscaler was started with, {} if it was started with nothing and so never adds
    nodes, None if it does not run on this node (as with KubeRay).

    Neither autoscaler of Ray 2.60 writes it where a driver could read it, so it is found by its process.
    """
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode(errors="replace").split("\0")
            if f"--gcs-address={gcs_address}" not in words or not any(word.endswith("monitor.py") for word in words):
                continue
            files = [word.partition("=")[2] for word in words if word.startswith("--autoscaling-config=")]
            config: dict[str, Any] = yaml.safe_load(Path(files[0]).expanduser().read_text()) if files else {}
            return config
        except (OSError, yaml.YAMLError):  # it has ended, or is another user's
            continue
    return None


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """Without what Ray adds to every node by itself, but for the memory, which may be asked for."""
    added = (_NODE, "object_store_memory")
    return {name: amount for name, amount in resources.items() if not name.startswith(added)}


def shown_resources(resources: Mapping[str, float]) -> str:
    """As in "{CPU: 1, GPU: 1}"."""
    names = sorted(resources, key=lambda name: (name not in ("CPU", "GPU"), name))
    shown = [name for name in names if (resources[name] or name == "CPU") and name != NO_GPU]
    return "{" + ", ".join(f"{name}: {resources[name]:g}" for name in shown) + "}"


# ---------------------------------------------------------------- what is on its way


@dataclass(frozen=True)
class Growth:
    """What an autoscaler says."""

    launching: Mapping[str, int]
    """Nodes on their way, by type."""
    wanted: Sequence[tuple[Mapping[str, float], int]]
    """Resources that wait for a node, and how often; of everybody on the cluster."""
    problems: Sequence[str] = ()
    """Why nodes did not come, in the provider's words."""

    @property
    def is_nothing(self) -> bool:
        """Nothing comes and nothing waits for a node: what was asked for has room, or no autoscaler is there to say."""
        return not (self.launching or self.wanted or self.problems)

    def __str__(self) -> str:
        nodes = ", ".join(f"{count} x {name}" for name, count in self.launching.items())
        wanted = ", ".join(f"{count} x {shown_resources(each)}" for each, count in self.wanted)
        parts = [f"launching {nodes}" if nodes else "no node is launching"]
        parts += [f"waiting for a node: {wanted}"] if wanted else []
        return "; ".join([*parts, *self.problems])


def growth() -> Growth:
    """What the cluster's autoscaler last said; nothing where there is none."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return _growth_v2() if is_autoscaler_v2(fetch_from_server=True) else _growth_v1()


def _growth_v1() -> Growth:
    """Autoscaler v1 writes its report into the key-value store, for `ray status`."""
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get

    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or b"{}")
    report, load = status.get("autoscaler_report") or {}, status.get("load_metrics_report") or {}
    launching = Counter(report.get("pending_launches", {}))
    launching.update(node_type for _, node_type, _ in report.get("pending_nodes", []))
    demand = [(each, count) for each, count in load.get("resource_demand", [])]
    demand += [(each, count * times) for group, times in load.get("pg_demand", []) for each, count in group["bundles"]]
    available = (report.get("node_availability_summary") or {}).get("node_availabilities", {})
    reasons = [(name, node.get("unavailable_node_information")) for name, node in available.items()]
    return Growth(launching, demand, [f"{name}: {why['description']:.200}" for name, why in reasons if why])


def _growth_v2() -> Growth:
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    launching: Counter[str] = Counter()
    for launch in status.pending_launches:
        launching[launch.ray_node_type_name] += launch.count
    launching.update(node.ray_node_type_name for node in status.pending_nodes)
    demands = status.resource_demands
    asked = [*demands.ray_task_actor_demand, *demands.placement_group_demand]
    wanted = [(by_count.bundle, by_count.count) for demand in asked for by_count in demand.bundles_by_count]
    problems = {f"{launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches if launch.details}
    return Growth(launching, wanted, sorted(problems))
