"""A chat server that misbehaves as it is told, for tests of what an engine makes of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pydantic import SecretStr

from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import Request
from cpt_ray.engines.openai import OpenAIEngine

KEY = "sk-not-to-be-seen"
ASK = [{"role": "user", "content": "Write."}]


class Server:
    """Misbehaves as told: each request takes the next of `script`; when it is used up, all is well."""

    def __init__(self, *script: Callable[[BaseHTTPRequestHandler], None]):
        self.script, self.seen, self.most_at_once = list(script), [], 0
        self.times: list[float] = []
        self._now, lock = 0, threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                with lock:
                    server._now += 1
                    server.most_at_once = max(server.most_at_once, server._now)
                    server.times.append(time.monotonic())
                    act = server.script.pop(0) if server.script else fine
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.seen.append((self.headers["Authorization"], self.body))
                act(self)
                with lock:
                    server._now -= 1

            def log_message(self, *_: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def engine(self, **endpoint: Any) -> OpenAIEngine:
        made = {"base_url": self.url, "api_key_env": "X", "max_retries": 4, "timeout_seconds": 1} | endpoint
        return OpenAIEngine(ModelConfig(model="m", endpoint=made), SecretStr(KEY))


def reply(handler: BaseHTTPRequestHandler, status: int, body: str, **headers: str) -> None:
    handler.send_response(status)
    for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body.encode())


def completion(handler: Any, text: Any = "", reason: str | None = "stop", logprobs: Any = None, **more: Any) -> str:
    text = text or handler.body["messages"][0]["content"].upper()
    message = {"role": "assistant", "content": text} | more
    choice = {"index": 0, "finish_reason": reason, "message": message, "logprobs": logprobs}
    usage = {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13}
    choices = [choice | {"index": at} for at in range(handler.body["n"])]
    made = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": choices}
    return json.dumps({**made, "usage": usage | {"prompt_tokens_details": {"cached_tokens": 4}}})


def fine(handler: BaseHTTPRequestHandler) -> None:
    time.sleep(0.02)
    reply(handler, 200, completion(handler))


def one_of(act: Callable[[Any], None], **more: Any) -> Any:
    """What comes of one request that a server answers so."""
    return Server(act).engine().run([Request(messages=ASK, max_tokens=9, **more)])[0]


def sends(*arguments: Any, **more: Any) -> Callable[[Any], None]:
    return lambda one: reply(one, 200, completion(one, *arguments, **more))


EXTRA = [{"type": "extra_forbidden", "loc": ["body", "max_completion_tokens"], "msg": "Extra inputs are not permitted"}]
