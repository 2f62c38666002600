"""Settings every test runs under: an explicit Ray auth mode, one OpenMP thread per process, no hub."""

import os
from collections.abc import Iterator

import hypothesis
import pytest

from tests.local_cluster import LocalCluster

os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
hypothesis.settings.register_profile("shared machine", deadline=None)  # no test is about time
hypothesis.settings.load_profile("shared machine")


@pytest.fixture(scope="session", autouse=True)
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache of converted models for all tests of a session, whichever process they run in."""
    base = tmp_path_factory.getbasetemp()
    os.environ["CPT_CACHE"] = str((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted")


LONGEST = ("loop", "nodes", "training", "real_model", "serving", "steering_stage", "clusters", "faults", "jobs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that both processes end at about the same time; `slow` tests only if asked for."""
    order = {f"test_{name}": at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    reasons = {"slow": "slow; CPT_SLOW=1 runs it, as CI does", "cluster": "minutes; CPT_CLUSTER=1 runs it"}
    for name, reason in reasons.items():
        if not os.environ.get(f"CPT_{name.upper()}"):
            for item in items:
                if item.get_closest_marker(name):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """`ray start --head` with token authentication on."""
    started = LocalCluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.stop()
