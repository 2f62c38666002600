"""Ray's provider of fake nodes, with the time that a machine of a cloud takes to boot; loaded by Ray's autoscaler."""

from __future__ import annotations

import time
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider


class SlowNodeProvider(FakeMultiNodeProvider):  # type: ignore[misc]
    """Nodes that are asked for together boot together, in `boot_seconds` of the provider's settings."""

    def create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        """Ray's own, later."""
        time.sleep(self.provider_config["boot_seconds"])
        super().create_node_with_resources_and_labels(*arguments)
