"""A real S3-compatible server in a process of its own, and a proxy in front of it that fails and dawdles on demand."""

from __future__ import annotations

import http.client
import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.cluster import unused_port

BUCKET = "bucket"


class ObjectStore:
    """Moto's server; `url` is what clients ask."""

    def __init__(self, log: Path):
        port = unused_port()
        self.url = f"http://127.0.0.1:{port}"
        code = f"from moto.server import main; main(['-H', '127.0.0.1', '-p', '{port}'])"
        with log.open("wb") as output:
            self._process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.url}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert self._process.poll() is None, log.read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        urllib.request.urlopen(urllib.request.Request(f"{self.url}/{BUCKET}", method="PUT"), timeout=10).close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def set_environment(patch: pytest.MonkeyPatch, url: str, cache: Path) -> None:
    """Of this process, and of those that it starts."""
    settings = {"ACCESS_KEY_ID": "who", "SECRET_ACCESS_KEY": "pass", "DEFAULT_REGION": "us-east-1"}
    for name, value in (settings | {"ENDPOINT_URL": url}).items():
        patch.setenv(f"AWS_{name}", value)
    patch.setenv("CPT_CACHE", str(cache))
    forget_stores()


def forget_stores() -> None:
    """Clients keep the endpoint that was in the environment when they were made."""
    from cpt_ray.tables import store_path

    store_path._open_store.cache_clear()


@contextmanager
def proxy(
    url: str, fault: Callable[[int, str], float | None], refusal: tuple[int, str] = (503, "SlowDown")
) -> Iterator[tuple[str, list[str]]]:
    """(its URL, what was asked of it): passes requests on to a server.

    Args:
        fault: of a request's number and its method and path: None to refuse it, else seconds to wait before.
        refusal: status and S3's code.
    """
    asked: list[str] = []
    refused = f"<Error><Code>{refusal[1]}</Code></Error>".encode()
    counting = threading.Lock()
    host = url.removeprefix("http://")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def _pass_on(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            line = f"{self.command} {self.path}"
            with counting:
                asked.append(line)
                seconds = fault(len(asked), line)
            if seconds is None:
                self.send_response(refusal[0])
                self.send_header("Content-Length", str(len(refused)))
                self.end_headers()
                self.wfile.write(refused if self.command != "HEAD" else b"")
                return
            time.sleep(seconds)
            connection = http.client.HTTPConnection(host, timeout=60)
            try:
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
            finally:
                connection.close()
            self.send_response(response.status)
            for name, value in response.getheaders():
                if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(name, value)
            length = response.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
            self.send_header("Content-Length", length or "0")
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _pass_on

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def environment() -> dict[str, str]:
    """For processes that a test starts."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
