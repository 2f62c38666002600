"""Pushing a tuned model: to a folder, and to a local stand-in for the Hub's API."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from cpt_ray.cli import main
from cpt_ray.config import PreferenceRunConfig
from cpt_ray.tables.rundir import RunDir
from cpt_ray.training.publishing import write_cards


class Hub(ThreadingHTTPServer):
    """As much of the Hub as takes small files: makes a repository and keeps what is committed."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.made: list[dict[str, Any]] = []
        self.refusal: tuple[int, dict[str, Any]] | None = None
        """What a push is answered, once it is known who asks."""
        self.files: dict[str, bytes] = {}


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        text = self.rfile.read(int(self.headers["Content-Length"])).decode()
        if self.headers.get("Authorization") != "Bearer hf_test":
            self._send(401, {"error": "who are you?"})
        elif self.server.refusal is not None:
            self._send(*self.server.refusal)
        elif self.path == "/api/repos/create":
            self.server.made.append(json.loads(text))
            self._send(200, {"url": f"http://127.0.0.1:{self.server.server_address[1]}/owner/name"})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [one["path"] for one in json.loads(text)["files"]]
            self._send(200, {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in paths]})
        elif "/commit/" in self.path:
            for line in (json.loads(one) for one in text.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._send(
                200,
                {
                    "commitUrl": f"http://127.0.0.1:{self.server.server_address[1]}/owner/name/commit/1",
                    "commitOid": "1",
                    "success": True,
                },
            )
        else:
            self._send(404, {"error": self.path})

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run file whose model and adapter are there."""
    for name in ("model/config.json", "model/README.md", "model/cpt_ray.json", "adapter/adapter_config.json"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    config = {
        "name": "mine",
        "run_dir": str(tmp_path / "run"),
        "policy": {"model": "x"},
        "preferences": {"source": "y"},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "mine.yaml"


def test_a_model_is_pushed_to_a_new_folder_once(
    run_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert main(["push", str(run_file), str(target)]) == 0
    found = sorted(str(one.relative_to(target)) for one in target.rglob("*") if one.is_file())
    assert found == ["README.md", "adapter/adapter_config.json", "config.json", "cpt_ray.json"]
    assert main(["push", str(run_file), str(target)]) == 1
    assert "is not an empty folder" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_not_pushed(run_file: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["push", str(run_file), str(tmp_path / "out"), f"run_dir={tmp_path}/other"]) == 1
    assert "there is no tuned model; run `cpt train`" in capsys.readouterr().err
    (run_file.parent / "run/model/cpt_ray.json").unlink()
    assert main(["push", str(run_file), str(tmp_path / "out")]) == 1
    assert "the tuned model is not complete; run `cpt train`" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", ["ftp://host/a", "s3:/bucket/a", "file:///a", "$OUT/a"])
def test_a_target_that_would_become_a_folder_of_that_name_is_refused(
    run_file: Path, target: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(run_file), target]) == 1
    assert f"TARGET: found '{target}'; " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "line"),
    [("org/name", "base_model: org/name\n"), ("gpt2", "base_model: gpt2\n"), ("tests/toy", ""), ("{folder}", "")],
)
def test_a_card_names_its_base_only_if_the_hub_can_know_it(tmp_path: Path, model: str, line: str) -> None:
    policy = {"model": model.format(folder=tmp_path)}
    data = {"name": "mine", "policy": policy, "preferences": {"source": "y"}}
    summary = {"held_out": [], "pairs": 1, "steps": 1, "first_loss": 0.7, "last_loss": 0.6}
    run = RunDir(tmp_path / "run")
    write_cards(PreferenceRunConfig.model_validate(data), run, summary)
    card = (run.model / "README.md").read_text()
    assert card.startswith(f"---\n{line}library_name: transformers\n")
    assert f"| tuned from | `{policy['model']}` " in card


def push_to(hub: Hub, run_file: Path, token: str, target: str = "hf://owner/name") -> Any:
    address = f"http://127.0.0.1:{hub.server_address[1]}"
    env = {"HF_ENDPOINT": address, "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(run_file.parent)}
    env |= {"PYTHONPATH": str(Path(__file__).parent.parent), "PATH": "", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-m", "cpt_ray", "push", str(run_file), target]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)


def test_what_the_hub_says_is_repeated_and_no_login_is_blamed(run_file: Path, hub: Hub) -> None:
    hub.refusal = (400, {"error": "Invalid metadata in README.md: base_model"})
    done = push_to(hub, run_file, "hf_test")
    assert done.returncode == 1
    assert done.stderr.startswith("error: hf://owner/name: the Hub refused: Invalid metadata in README.md: base_model")
    assert "log in" not in done.stderr
    assert done.stderr.count("\n") == 1
    done = push_to(hub, run_file, "hf_test", "hf://no/such/name")
    assert "hf://no/such/name: not the name of a repository" in done.stderr
    assert "log in" not in done.stderr
    hub.refusal = (403, {"error": "not yours"})
    assert "the Hub refused (not yours); log in with `hf auth login`" in push_to(hub, run_file, "hf_test").stderr


@pytest.mark.parametrize("token", ["hf_test", "hf_other"])
def test_a_model_is_pushed_to_a_private_repository_of_the_hub_by_who_may(run_file: Path, hub: Hub, token: str) -> None:
    done = push_to(hub, run_file, token)
    if token == "hf_test":
        assert done.returncode == 0, done.stderr
        assert [(one["name"], one["visibility"]) for one in hub.made] == [("name", "private")]
        assert hub.files == {
            "config.json": b"model/config.json",
            "README.md": b"model/README.md",
            "cpt_ray.json": b"model/cpt_ray.json",
            "adapter/adapter_config.json": b"adapter/adapter_config.json",
        }
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("error: hf://owner/name: the Hub refused (")
        assert done.stderr.count("\n") == 1
