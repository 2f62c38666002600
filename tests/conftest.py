"""Settings every test runs under: an explicit Ray auth mode, one OpenMP thread per process, no hub."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from xdist.scheduler import LoadFileScheduling

from tests.local_cluster import LocalCluster
from tests.object_store import BUCKET, ObjectStore, forget_stores, set_environment

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


LONGEST = ("loop", "nodes", "training/", "real_model", "serving/", "steering_stage", "clusters", "faults", "jobs")


def group(node_id: str) -> str:
    """What one process runs: a file, or all files of a folder ("serving/"), which share their fixtures."""
    path = Path(node_id.partition("::")[0]).relative_to("tests")
    return path.stem.removeprefix("test_") if path.parent == Path() else f"{path.parts[0]}/"


class ByGroup(LoadFileScheduling):  # type: ignore[misc]
    """xdist's own mark of groups does nothing under pytest 9.2, which keeps ids elsewhere."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByGroup:
    """In the place of `--dist loadfile`."""
    return ByGroup(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest groups first, so that both processes end at about the same time; `slow` tests only if asked for."""
    order = {name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(group(item.nodeid), len(order)))
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


@pytest.fixture(scope="session")
def object_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ObjectStore]:
    """An S3-compatible server, which starts in a second."""
    started = ObjectStore(tmp_path_factory.mktemp("store") / "log")
    yield started
    started.stop()


@pytest.fixture
def store(object_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an empty folder in the store; this process and its children are set to use it."""
    set_environment(monkeypatch, object_store.url, tmp_path / "cache")
    yield f"s3://{BUCKET}/{tmp_path.name}"
    forget_stores()
