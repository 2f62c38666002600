"""Two users, two runs and somebody else's application on one cluster: each ends what is its own and nothing else."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import yaml

from cpt_ray.cluster import unused_port
from cpt_ray.config import load_config
from cpt_ray.errors import UserError
from cpt_ray.serving import deploy, holders, service
from cpt_ray.serving.deploy import started_serve
from cpt_ray.serving.haproxy import RunningServe, serve_env
from cpt_ray.serving.holders import Application, Holder, check_free, is_taken_from
from cpt_ray.tables.rundir import CATALOG_FILE, RunDir
from tests import toy
from tests.local_cluster import ROOT, LocalCluster
from tests.served import CATALOG, WAIT_SECONDS, Load, make_config
from tests.tiny_model import make_tiny_model

SOMEBODY_ELSES = """
import sys, ray
from ray import serve

ray.init(runtime_env={"env_vars": eval(sys.argv[2])})
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})

@serve.deployment(ray_actor_options={"num_cpus": 0})
class Hello:
    def __call__(self, request):
        return "hello"

serve.run(Hello.bind(), name="hello", route_prefix="/hello")
"""


class Server:
    """A `cpt serve`, as one user starts it, with a key of that user's own."""

    def __init__(self, cluster: LocalCluster, run: RunDir, name: str, *arguments: str):
        self.run, self.key = run, f"key-of-{run.path.name}"
        self.log = run.path / f"serve-{time.monotonic_ns()}.log"
        file = run.path / "run.file.yaml"
        file.write_text(yaml.safe_dump(make_config(run).model_dump(mode="json", exclude_unset=True)))
        command = [sys.executable, "-m", "cpt_ray", "serve", str(file), f"name={name}", *arguments]
        env = cluster.env | {"RAY_ADDRESS": cluster.address, "CPT_API_KEY": self.key, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=run.path)

    @property
    def said(self) -> str:
        return self.log.read_text()

    @property
    def url(self) -> str:
        """Once it serves."""
        until(lambda: "playground " in self.said or self.process.poll() is not None, self)
        match = re.search(r"^serving +\S+ at (\S+)", self.said, re.MULTILINE)
        assert match, self.said
        return match[1]

    def end(self, number: int) -> None:
        self.process.send_signal(number)
        self.process.wait(timeout=WAIT_SECONDS)

    def ask(self, url: str, path: str = "/v1/models") -> int:
        return httpx.get(url + path, headers={"Authorization": f"Bearer {self.key}"}, timeout=WAIT_SECONDS).status_code


def until(condition: Any, server: Server) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, server.said
        time.sleep(0.2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def make_trained(folder: Path, model: Path) -> RunDir:
    """A run directory as training leaves it."""
    run = RunDir(folder)
    run.write_json(CATALOG_FILE, CATALOG.to_json())
    run.model.symlink_to(model)
    return run


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """One of its own: whoever comes first decides how Serve listens."""
    started = LocalCluster(tmp_path)
    yield started
    started.stop()


def test_serves_own_config_files_take_their_turn_at_the_meter_too(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[str] = []
    begun: list[list[str]] = []

    @contextmanager
    def taking_turns(name: str) -> Iterator[None]:
        turns.append(name)
        yield
        turns.remove(name)

    def make_targets(config: Any, served: Any, holder: Holder, meter: Any, is_haproxy: bool) -> list[Any]:
        assert (turns, meter) == ([holder.meter], "a meter")
        return [SimpleNamespace(target="an application")]

    monkeypatch.setattr(deploy, "taking_turns", taking_turns)
    monkeypatch.setattr(deploy, "_start_meter", lambda run: begun.append([*turns]) or "a meter")
    monkeypatch.setattr(service, "make_targets", make_targets)
    monkeypatch.setattr(service, "running_serve", lambda: None)
    monkeypatch.setenv("CPT_API_KEY", "a-key")
    run = make_trained(tmp_path / "run", model)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(make_config(run).model_dump(mode="json", exclude_unset=True)))
    assert service.application({"run_file": str(file)}) == "an application"
    assert begun == [[deploy.meter_name(run)]]
    assert not turns


@pytest.mark.cluster
def test_neighbours_are_left_alone(cluster: LocalCluster, tmp_path: Path, model: Path) -> None:
    first, second, third = (make_trained(tmp_path / name, model) for name in ("first", "second", "third"))
    port = unused_port()
    env = serve_env() | {"PYTHONPATH": ""}  # with HAProxy; the jobs below choose Ray's proxy, which is not there
    command = [sys.executable, "-c", SOMEBODY_ELSES, str(port), repr(env)]
    subprocess.run(command, env=cluster.env | env | {"RAY_ADDRESS": cluster.address}, check=True, timeout=WAIT_SECONDS)
    hello = f"http://127.0.0.1:{port}/hello"

    ones, twos = Server(cluster, first, "one", "serve.port=8000"), Server(cluster, second, "two")
    url, other = f"http://127.0.0.1:{port}/one", f"http://127.0.0.1:{port}/two"
    assert (ones.url, twos.url) == (url, other)
    note = f"note: Serve was on this cluster already and listens on 127.0.0.1:{port}"
    assert f"{note}; serve.host=127.0.0.1 and serve.port=8000 do not apply" in ones.said
    assert [ones.ask(url), ones.ask(other), twos.ask(url), twos.ask(other)] == [200, 401, 401, 200]
    assert httpx.get(url, follow_redirects=True).url == f"{url}/playground"
    assert ones.ask(f"http://127.0.0.1:{port}") == 404

    with Load(url, clients=2, key=ones.key) as load:
        load.wait_for(2)
        twos.end(signal.SIGKILL)
        assert twos.ask(other) == 200  # Serve goes on without the process that deployed
        refused = Server(cluster, third, "two")
        assert refused.process.wait(timeout=WAIT_SECONDS) == 1
        assert f"name: two is served already, by {second.path} (process {twos.process.pid} on" in refused.said
        taker = Server(cluster, third, "two", "--replace")
        failed = Server(cluster, first, "one", "policy.engine.no_such_argument=1")
        assert taker.url == other
        assert [twos.ask(other), taker.ask(other)] == [401, 200]
        until(lambda: cluster.actors() == {f"meter 2 of {run.path}" for run in (first, third)}, taker)
        taker.end(signal.SIGTERM)
        assert (taker.process.returncode, twos.ask(other), httpx.get(hello).text) == (0, 404, "hello")

        assert failed.process.wait(timeout=WAIT_SECONDS) == 1
        assert "the model cannot be served: " in failed.said
        load.wait_for(2, since=time.monotonic())
        assert ones.process.poll() is None

        again = [Server(cluster, first, "one"), Server(cluster, first, "one")]  # at the same moment
        until(lambda: [server.process.poll() for server in (ones, *again)].count(None) == 1, ones)
        (winner,) = (server for server in again if server.process.poll() is None)
        (loser,) = (server for server in again if server is not winner)
        assert winner.url == url
        assert ones.process.returncode == 0
        assert "has taken over one; this one ends, and leaves the server to it" in ones.said
        assert f"{first.path} (process {winner.process.pid} on" in loser.said
        load.wait_for(2, since=time.monotonic())
    assert [answer for answer in load.answers if answer[1] != 200] == []

    winner.end(signal.SIGTERM)
    assert (ones.ask(url), httpx.get(hello).text, cluster.actors()) == (404, "hello", set())


# ---------------------------------------------------------------- whose a name is


def make_holder(run_name: str = "one", run_dir: str = "/runs/one", **given: Any) -> Holder:
    return Holder(run_name=run_name, run_dir=run_dir, meter=f"meter of {run_dir}", **given)


def there(monkeypatch: pytest.MonkeyPatch, **applications: Application) -> None:
    monkeypatch.setattr(holders, "applications", lambda: applications)


def make_application(holder: Holder | None, route: str, status: str = "RUNNING") -> Application:
    return Application(holder=holder, route=route, status=status, why="", replicas=Counter())


OTHERS = make_holder(run_dir="/runs/other", job="job raysubmit_1", since=0.0)
UNTUNED = make_holder(run_name="one-base")


@pytest.mark.parametrize(
    ("name", "application", "replaces", "said"),
    [
        ("one", make_application(OTHERS, "/one"), False, r"^name: one is served already, by /runs/other \(job raysub"),
        (
            "one",
            make_application(None, "/hi"),
            True,
            "^name: one is the name of a Serve application that",
        ),
        ("hi", make_application(None, "/one"), True, "^name: /one is the path of the Serve application hi"),
        (
            "one-base",
            make_application(UNTUNED, "/one-base"),
            True,
            "^serve.base: the name one-base is held by /runs",
        ),
    ],
)
def test_a_name_that_is_not_to_be_had_is_refused_with_who_holds_it(
    monkeypatch: pytest.MonkeyPatch, name: str, application: Application, replaces: bool, said: str
) -> None:
    there(monkeypatch, **{name: application})
    with pytest.raises(UserError, match=rf"{said}.*give this run another name \(name=NAME\)"):
        check_free(["one", "one-base"], ["/one", "/one/base"], make_holder(), replaces)
    there(monkeypatch, **{name: replace(application, status="DELETING")})
    assert check_free(["one", "one-base"], ["/one", "/one/base"], make_holder(), replaces) is None


@pytest.mark.parametrize("replaces", [False, True])
def test_the_same_run_directory_takes_over_and_another_one_only_if_told_to(
    monkeypatch: pytest.MonkeyPatch, replaces: bool
) -> None:
    mine = make_holder()
    there(monkeypatch, hello=make_application(None, "/"))
    assert check_free(["one"], ["/one"], make_holder(), replaces) is None
    there(monkeypatch, one=make_application(mine, "/one"), two=make_application(OTHERS, "/two"))
    assert check_free(["one"], ["/one"], make_holder(), replaces) is mine
    there(monkeypatch, one=make_application(OTHERS, "/one"))
    assert check_free(["one"], ["/one"], make_holder(), True) is OTHERS


def test_a_network_that_the_run_file_does_not_know_of_is_not_let_in_without_a_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    running = RunningServe(host="0.0.0.0", port=8000, proxies=(), applications={})
    monkeypatch.setattr("cpt_ray.serving.deploy.running_serve", lambda: running)
    config = make_config(RunDir(tmp_path))
    with pytest.raises(UserError, match=r"^serve.host: Serve on this cluster listens on 0.0.0.0, .* --insecure"):
        started_serve(config, needs_no_key=True)
    assert started_serve(config, needs_no_key=False) is running
    assert started_serve(make_config(RunDir(tmp_path), host="0.0.0.0"), needs_no_key=True) is running


def test_who_failed_to_take_over_has_not() -> None:
    mine = make_holder()
    taker = make_holder(previous=mine.id)
    for status, is_taken in (("RUNNING", True), ("DEPLOYING", True), ("DEPLOY_FAILED", False)):
        assert is_taken_from(mine, make_application(taker, "/one", status)) is is_taken
    assert is_taken_from(mine, make_application(make_holder(), "/one", "DEPLOY_FAILED"))
    assert not is_taken_from(mine, make_application(mine, "/one"))


def test_a_name_that_cannot_be_a_path_is_refused() -> None:
    for name in ("a b", "a/b", "", "-a", "ä", "a?b", "a%2e", "a" * 81):
        with pytest.raises(UserError, match=r"name: found"):
            load_config(toy.RUN_FILE, [f"name={name!r}"])
