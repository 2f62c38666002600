"""Ray's provider of fake nodes, with the time that a machine of a cloud takes to boot; loaded by Ray's autoscalers."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from typing import Any

from ray._private import services
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME
from ray.exceptions import RayError

START_SECONDS = 300.0
"""Ray gives a node's processes 30 s; on a busy machine they come later, as nodes that nobody counts."""
_get_node = services.get_node


def _get_node_in_time(*arguments: Any) -> Any:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            return _get_node(*arguments)
        except (RuntimeError, RayError):  # it is not known yet, or the head is late
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


services.get_node = _get_node_in_time


class SlowNodeProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """Nodes that are asked for together boot together, in `boot_seconds` of the provider's settings."""

    def __init__(self, *arguments: Any):
        super().__init__(*arguments)
        # Ray's own lock is held while a node starts, and asked for between listing the nodes and counting those that
        # launch: nodes that came meanwhile were counted by neither, and launched again beyond `max_workers`.
        self.lock = nullcontext()
        self._starting = threading.Lock()

    def non_terminated_nodes(self, tag_filters: dict[str, str]) -> list[str]:
        """Ray's own, while another thread adds nodes; without those whose processes were killed, as a cloud has it."""
        for name, node in list(self._nodes.items()):
            if "node" in node and node["node"].dead_processes():
                self._nodes.pop(name)
        return [name for name, node in list(self._nodes.items()) if tag_filters.items() <= node["tags"].items()]

    def create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Ray's own, later."""
        time.sleep(self.provider_config["boot_seconds"])
        with self._starting:
            super().create_node_with_resources_and_labels(*arguments)

    def _create_node_with_resources_and_labels(self, node_config: Any, tags: dict[str, str], *arguments: Any) -> None:
        """Ray's own; the node is listed before Ray runs on it, as a cloud has it.

        Autoscaler v2 takes a node that runs and is not listed for one more than it asked for.
        """
        name = self._next_hex_node_id()
        self._next_node_id -= 1  # Ray's own counts it again
        self._nodes[name] = {"tags": {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_NODE_NAME: name, **tags}}
        super()._create_node_with_resources_and_labels(node_config, tags, *arguments)
