"""This project's server against a bare vLLM OpenAI server: same model, same machine, alternating in one run.

python jobs/benchmarks/serving.py jobs/quickstart.yaml --clients 1 8 32 --seconds 6 --rounds 3
RAY_SERVE_ENABLE_HA_PROXY=1 python jobs/benchmarks/serving.py jobs/quickstart.yaml      # Ray's HAProxy in front

The bare server is sent the directive as a system message, this one a configuration: the same tokens reach both
engines, and their greedy answers must be equal. Every client asks again as soon as it is answered. The model is the
run's tuned one, else the policy as it is: only the time means anything. Printed are medians over the rounds; a ratio,
or a difference of medians, is taken within a round, where both servers have the machine in the same state.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import psutil
import uvloop

from cpt_ray.cluster import ENGINE_ENV, connected
from cpt_ray.config import RunConfig, load_config
from cpt_ray.engines.roles import with_dtype
from cpt_ray.engines.vllm import engine_arguments, engine_env
from cpt_ray.rubrics.catalog import Catalog, CatalogLevel, CatalogRubric
from cpt_ray.serving.deploy import serve_model
from cpt_ray.serving.haproxy import checked_port, serve_env
from cpt_ray.tables.rundir import CATALOG_FILE, RunDir

KEY = "benchmark"
NO_STOPS = ("policy.sampling.stop=[]", "policy.sampling.include_stop=false")
"""Every answer has as many tokens, here as from a server that knows no run file."""
DIRECTIVE = "Write in a plain manner. Use short words, and no more of them than you need."
PROMPTS = [f"Write about the {what} at {when}." for what in ("harbor", "market", "field") for when in ("dawn", "noon")]
LEVEL = CatalogLevel(name="plain", score=0, directive=DIRECTIVE, directive_id="plain")
CATALOG = Catalog(
    (CatalogRubric(id="manner", title="Manner", version=1, objective="How it is written.", levels=(LEVEL,)),)
)
START_SECONDS = 600


@dataclass
class Server:
    """Where to ask, and how the directive is said there."""

    name: str
    url: str
    headers: dict[str, str]
    process: psutil.Process
    """Its processes are under this one."""
    system: list[dict[str, str]]
    extra: dict[str, Any]

    def body(self, prompt: str, tokens: int, stream: bool) -> bytes:
        """A chat request for exactly `tokens` tokens."""
        messages = [*self.system, {"role": "user", "content": prompt}]
        sampling = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
        return json.dumps({"model": "bench", "messages": messages, **sampling, **self.extra}).encode()


@dataclass
class Measured:
    """One server under one number of clients, over the rounds."""

    rates: list[float] = field(default_factory=list)
    """Requests per second, one a round."""
    firsts: list[list[float]] = field(default_factory=list)
    """Milliseconds to the first byte of every answer's body, round by round."""
    cpu: Counter[str] = field(default_factory=Counter)
    """CPU seconds by part, over all rounds."""
    done: int = 0


class Client(asyncio.Protocol):
    """One connection that asks and notes when an answer begins and ends; it parses no more than that needs."""

    async def ask(self, transport: asyncio.WriteTransport, request: bytes) -> float:
        """Sends the request, waits for the whole answer, and gives the seconds until its body began."""
        self._data, self._end, self._first = b"", 0, 0.0
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        start = time.perf_counter()
        transport.write(request)
        await self._answered
        return self._first - start

    def connection_lost(self, error: Exception | None) -> None:
        """asyncio's."""
        if not self._answered.done():
            self._answered.set_exception(ConnectionError("the server broke off an answer"))

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if not self._first:
            self._data += data
            head, _, data = self._data.partition(b"\r\n\r\n")
            if not data:
                return
            if not head.startswith(b"HTTP/1.1 200"):
                raise SystemExit(self._data.decode())
            self._first, length = time.perf_counter(), re.search(rb"(?i)content-length: (\d+)", head)
            self._end, self._data = int(length[1]) if length else 0, b""
        if self._end:
            self._end -= len(data)
            is_last = self._end == 0
        else:
            self._data = (self._data + data)[-5:]
            is_last = self._data == b"0\r\n\r\n"
        if is_last and not self._answered.done():
            self._answered.set_result(None)


async def ask_for(server: Server, clients: int, seconds: float, tokens: int, stream: bool, into: Measured) -> None:
    """`clients` clients ask for `seconds`, each again as soon as it is answered.

    The rate is clients / mean seconds per answer, which does not depend on where in an answer the time runs out.
    """
    loop, where = asyncio.get_running_loop(), urlsplit(server.url)
    before, end = cpu_seconds(server.process), time.perf_counter() + seconds
    took: list[float] = []
    firsts: list[float] = []

    async def client(number: int) -> None:
        transport, one = await loop.create_connection(Client, "127.0.0.1", where.port or 80)
        body = server.body(PROMPTS[number % len(PROMPTS)], tokens, stream)
        headers = "".join(f"{name}: {value}\r\n" for name, value in server.headers.items())
        head = f"POST {where.path}/v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        head += f"{headers}Content-Length: {len(body)}\r\n\r\n"
        while (start := time.perf_counter()) < end:
            firsts.append(1000 * await one.ask(transport, head.encode() + body))
            took.append(time.perf_counter() - start)
        transport.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    into.rates.append(clients / statistics.mean(took))
    into.firsts.append(firsts)
    into.done += len(took)
    into.cpu += cpu_seconds(server.process) - before


def cpu_seconds(root: psutil.Process) -> Counter[str]:
    """CPU time used so far under `root`, by part: front, engine, proxy, and the rest of Ray."""
    used: Counter[str] = Counter()
    for process in root.children(recursive=True) + [root] * (root.pid != os.getpid()):
        with contextlib.suppress(psutil.NoSuchProcess):
            title, times = " ".join(process.cmdline()), process.cpu_times()
            parts = {"EngineCore": "engine", "api_server": "front", "ServeReplica": "front", "haproxy -": "proxy"}
            parts |= {"ProxyActor": "proxy", "HAProxyManager": "proxy"}
            used[next((part for name, part in parts.items() if name in title), "Ray")] += times.user + times.system
    return used


async def check_equal(servers: Sequence[Server], tokens: int) -> None:
    """Every prompt's greedy answer, token by token, from all servers; SystemExit if two differ."""
    answers = []
    for server in servers:
        async with aiohttp.ClientSession(f"{server.url}/", headers=server.headers) as session:
            found = []
            for prompt in PROMPTS:
                body = {**json.loads(server.body(prompt, tokens, False)), "return_token_ids": True}
                async with session.post("v1/chat/completions", json=body) as answer:
                    data = await answer.json()
                    found.append((data["prompt_token_ids"], data["choices"][0]["token_ids"]))
        answers.append(found)
    if any(one != answers[0] for one in answers):
        raise SystemExit("the servers gave different tokens at temperature 0")
    print(f"tokens identical at temperature 0: {len(PROMPTS)} prompts x {tokens} tokens", flush=True)


def start_bare(config: RunConfig, model: str) -> tuple[subprocess.Popen[bytes], Server]:
    """vLLM's own server, with the same engine arguments and environment."""
    port = checked_port("127.0.0.1", 0)
    arguments = engine_arguments(config.policy) | {"model": model, "served_model_name": "bench", "port": port}
    command = [sys.executable, "-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    for name, value in arguments.items():
        flag = f"--{name.replace('_', '-')}"
        command += [f"--no-{flag[2:]}"] if value is False else [flag] if value is True else [flag, str(value)]
    command += ["--api-key", KEY, "--disable-uvicorn-access-log"]
    if config.policy.chat_template_kwargs:
        command += ["--default-chat-template-kwargs", json.dumps(config.policy.chat_template_kwargs)]
    threads = str(max(1, int(config.policy.num_cpus)))  # as Ray has it for a replica
    env = os.environ | ENGINE_ENV | engine_env(config.policy)
    env |= {"VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": threads}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL)
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    system = [{"role": "system", "content": DIRECTIVE}]
    return process, Server("bare vLLM", f"http://127.0.0.1:{port}", headers, psutil.Process(process.pid), system, {})


async def wait_for(server: Server, process: subprocess.Popen[bytes]) -> None:
    """Until /health answers."""
    deadline = time.monotonic() + START_SECONDS
    async with aiohttp.ClientSession(server.url) as session:
        while time.monotonic() < deadline and process.poll() is None:
            try:
                async with session.get("/health") as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                await asyncio.sleep(0.5)
    raise SystemExit("the bare server did not start")


async def measure(servers: Sequence[Server], options: argparse.Namespace) -> None:
    """Round by round, server by server; then the table."""
    await check_equal(servers, options.tokens)
    cells = [(clients, stream) for clients in options.clients for stream in (False, True)]
    found = {(cell, server.name): Measured() for cell in cells for server in servers}
    for server in servers:
        await ask_for(server, 8, 2, options.tokens, True, Measured())  # warm
    for at in range(options.rounds):
        for clients, stream in cells:
            for server in servers if at % 2 == 0 else reversed(servers):
                into = found[(clients, stream), server.name]
                await ask_for(server, clients, options.seconds, options.tokens, stream, into)
                print(f"{server.name}, {clients} clients, stream {stream}: {into.rates[-1]:.1f}/s", file=sys.stderr)
    print("clients | requests/s: bare, this, ratio | median first byte, ms: bare, this, more | CPU ms per request")
    for clients, stream in cells:
        bare, this = (found[(clients, stream), server.name] for server in servers)
        rates = [statistics.median(one.rates) for one in (bare, this)]
        ratios = [mine / theirs for mine, theirs in zip(this.rates, bare.rates, strict=True)]
        firsts = [statistics.median(chain.from_iterable(one.firsts)) for one in (bare, this)]
        more = [
            statistics.median(mine) - statistics.median(theirs)
            for mine, theirs in zip(this.firsts, bare.firsts, strict=True)
        ]
        costs = [
            ", ".join(f"{part} {1000 * used / max(1, one.done):.1f}" for part, used in one.cpu.most_common())
            for one in (bare, this)
        ]
        print(
            f"{clients} {'stream' if stream else 'whole'} | {rates[0]:.1f} {rates[1]:.1f} {over_rounds(ratios, '.2f')} "
            f"| {firsts[0]:.1f} {firsts[1]:.1f} {over_rounds(more, '+.1f')} | {'; '.join(costs)}"
        )


def over_rounds(values: Sequence[float], form: str) -> str:
    """The median of the rounds' values and, with several, the standard error of their mean."""
    shown = format(statistics.median(values), form)
    if len(values) < 2:
        return shown
    return f"{shown} (se {statistics.stdev(values) / len(values) ** 0.5:{form.removeprefix('+')}})"


def main() -> None:
    """Starts both servers, measures, stops both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--tokens", type=int, default=48, help="of every answer")
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    overrides = ["name=bench", "serve.port=0", "serve.host=127.0.0.1", *NO_STOPS, *options.overrides]
    config = load_config(options.run_file, overrides)
    config, _ = with_dtype(config, RunDir(Path(config.run_dir)))
    tuned = Path(config.run_dir) / "model"
    model = str(tuned.absolute() if (tuned / "config.json").exists() else config.policy.path)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(Path(folder))
        run.write_json(CATALOG_FILE, CATALOG.to_json())
        process, bare = start_bare(config, model)
        try:
            with connected(more_env=serve_env()):
                url = serve_model(config, run, KEY, block=False, model=Path(model))
                extra = {"configuration": {"manner": "plain"}}
                this = Server("this server", url, bare.headers, psutil.Process(), [], extra)
                uvloop.run(wait_for(bare, process))
                uvloop.run(measure([bare, this], options))
                from ray import serve

                serve.delete(config.name)
        finally:
            process.terminate()
            process.wait(timeout=60)


if __name__ == "__main__":
    main()
