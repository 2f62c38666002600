"""A served run of a tiny model, and what its clients send it; for tests of the real Ray Serve and vLLM."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from transformers import AutoTokenizer

from cpt_ray.chat.conversations import policy_messages, token_ids
from cpt_ray.config import RunConfig
from cpt_ray.engines.vllm import TIGHT_JSON
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.steering.inference import Candidates, make_candidates
from cpt_ray.tables.rundir import CATALOG_FILE, QUESTIONS_FILE, RunDir
from tests.builders import make_directives, make_rubric
from tests.tiny_model import CHAT_TEMPLATE, make_tiny_model

KEY = "a-test-key"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
CATALOG = Catalog.build([make_rubric()], make_directives())
HIGH = "Write in the high manner, please (a)."
USER: list[Any] = [{"role": "user", "content": "Tell me about the sea."}]
SYSTEM: list[Any] = [{"role": "system", "content": "Be brief."}, *USER]
TURNS: list[Any] = [*USER, {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "And the hills?"}]
CHAT = "/v1/chat/completions"


def some_port() -> int:
    """One that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


PAGE_ORIGIN, OTHER_ORIGIN = (f"http://127.0.0.1:{some_port()}" for _ in range(2))
ONE_GIB = 1 << 30
WAIT_SECONDS = 400.0
"""For anything, an engine that starts on a busy machine included; a test that passes waits for far less."""
TEMPLATES = {
    "qwen": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
    "llama": "<|begin|>{% for m in messages %}<|head|>{{ m.role }}<|end_head|>\n\n{{ m.content }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|head|>assistant<|end_head|>\n\n{% endif %}",
    "mistral": "<s>{% for m in messages %}{% if m.role == 'system' %}[SYSTEM]{{ m.content }}[/SYSTEM]"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}",
    "gemma": "<bos>{% set first = '' %}{% set turns = messages %}{% if messages[0].role == 'system' %}"
    "{% set first = messages[0].content + '\n\n' %}{% set turns = messages[1:] %}{% endif %}"
    "{% for m in turns %}<start>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}",
    "no-system": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}",
}
"""Of the shapes of well-known ones; which of them the tiny model uses, a template argument says."""
ANY_TEMPLATE = (
    "{% if family is not defined %}"
    + CHAT_TEMPLATE
    + "".join(f"{{% elif family == '{name}' %}}{text}" for name, text in TEMPLATES.items())
    + "{% endif %}"
)
TEMPLATE_KWARGS = {"shout": True, "enable_thinking": False}


def make_config(run: RunDir, **changes: Any) -> RunConfig:
    engine: dict[str, Any] = {"enforce_eager": True, "max_model_len": 512, "kv_cache_memory_bytes": ONE_GIB // 16}
    engine["structured_outputs_config"] = TIGHT_JSON  # random weights would write blanks for ever
    data = {
        "name": "tiny",
        "run_dir": str(run.path),
        "rubrics": ["unused"],
        "prompts": {"source": "unused"},
        "writer": {"model": "unused"},
        "policy": {
            "model": str(run.path / "base"),
            "num_cpus": 0.5,
            "engine": engine,
            "chat_template_kwargs": TEMPLATE_KWARGS,
            "sampling": {"temperature": 0},
        },
        "serve": {
            "port": 0,
            "configurations": {"poet": {"ornament": 88}},
            "frontend": {
                "enable_auto_tool_choice": True,
                "tool_call_parser": "hermes",
                "allowed_origins": [PAGE_ORIGIN],
            },
            **changes,
        },
    }
    return RunConfig.model_validate(data)


def make_run(path: Path) -> RunDir:
    """A run directory as training leaves it, as far as serving reads it."""
    made = RunDir(path)
    make_tiny_model(made.model, chat_template=ANY_TEMPLATE)
    made.write_json(CATALOG_FILE, CATALOG.to_json())
    known = {"margins": [-4, 0, 4]}
    asked = [{"prompt": f"Day {at}?", "first": f"High {at}.", "second": f"Low {at}."} | known for at in range(4)]
    made.write_json(QUESTIONS_FILE, {"key": make_served_candidates(made).key, "questions": asked})
    return made


def make_served_candidates(run: RunDir) -> Candidates:
    policy = make_config(run).policy.model_copy(update={"model": str(run.model)})
    return make_candidates(make_config(run), CATALOG, policy)


def post(url: str, path: str = CHAT, key: str = KEY, **given: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return httpx.post(f"{url}{path}", headers=headers, timeout=WAIT_SECONDS, **given)


def noted(run: RunDir, count: int, which: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """So many lines of the access log, which is written after the answer."""
    deadline = time.monotonic() + WAIT_SECONDS
    while True:
        logs = (log.read_text().splitlines() for log in sorted((run.path / "access").iterdir()))
        found = [line for log in logs for line in map(json.loads, log) if which(line)]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def expected_ids(run: RunDir, directive: str | None, messages: Any, **template_kwargs: Any) -> list[int]:
    """As training and evaluation have them."""
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    return token_ids(tokenizer, policy_messages(directive, messages), TEMPLATE_KWARGS | template_kwargs)


def begin(url: str, sent: float, name: str) -> socket.socket:
    """A request for a long answer of which only a part was sent, by a client that reads little at a time."""
    options = {"model": "tiny", "messages": USER, "max_tokens": 200, "logprobs": True, "top_logprobs": 9}
    body = json.dumps({**options, "stream": True, "ignore_eos": True}).encode()
    where = urlsplit(url)
    headers = {**AUTHORIZED, "Host": str(where.hostname), "X-Request-ID": name}
    headers |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    lines = [f"POST {where.path}{CHAT} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items()), "", ""]
    request = "\r\n".join(lines).encode() + body
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect((where.hostname, where.port))
    client.sendall(request[: int(sent * len(request))])
    return client


class Load:
    """Clients that ask again and again, each waiting for its answer, and what they were told."""

    def __init__(self, url: str, clients: int, key: str = KEY):
        self.answers: list[tuple[float, int, str]] = []
        """(when it was asked, status, text); the status is 0 if the connection ended without an answer."""
        self._url, self._key, self._stop = url, key, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]

    def _ask(self) -> None:
        body = {"model": "cpt:poet", "messages": USER, "max_tokens": 16, "temperature": 0}
        while not self._stop.is_set():
            asked = time.monotonic()
            try:
                content = self._late(json.dumps({**body, "ignore_eos": True}).encode())
                answer = post(self._url, content=content, key=self._key)
                self.answers.append((asked, answer.status_code, answer.text))
            except httpx.HTTPError as error:
                self.answers.append((asked, 0, repr(error)))
            self._stop.wait(0.2)  # leaves something of a small machine to what starts

    def _late(self, body: bytes) -> Iterator[bytes]:
        """In a packet of its own, after that of the headers, as many clients do."""
        time.sleep(0.05)
        yield body

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_for(self, count: int, since: float = 0.0) -> None:
        """Until so many answers to what was asked after `since` are good."""
        deadline = time.monotonic() + WAIT_SECONDS
        while sum(status == 200 and asked > since for asked, status, _ in list(self.answers)) < count:
            assert time.monotonic() < deadline, self.answers[-3:]
            time.sleep(0.1)


def make_adapter(run: RunDir, name: str, seed: int) -> Path:
    """An adapter of random weights on the tiny model, with its catalog, as training leaves it."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    options = peft.LoraConfig(r=8, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(run.path / "base"), options)
    model.save_pretrained(run.path / name)
    RunDir(run.path / name).write_json(CATALOG_FILE, CATALOG.to_json())
    return run.path / name
