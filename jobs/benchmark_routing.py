"""Two replicas behind HAProxy: who gets a request, and what the prefix caches make of it.

python jobs/benchmark_routing.py jobs/quickstart.yaml policy.model=/models/some-model --seconds 10 --rounds 3

Every request has one of a number of configurations and the same long system message behind the directive, so that its
prompt begins like those of its configuration and no other. By turns, a server of its own each time: requests in turn
(`roundrobin`), to whom has the fewest
(`leastconn`, Ray's own way), and by configuration (`serve.route_by: configuration`). The
model is the run's tuned one, else the policy as it is: only times and shares mean anything. Printed are medians.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import random
import secrets
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import aiohttp

from cpt_ray.cluster import by_configuration, connected
from cpt_ray.config import RunConfig, load_config
from cpt_ray.engines.roles import with_dtype
from cpt_ray.rubrics.catalog import CATALOG_FILE, Catalog, CatalogLevel, CatalogRubric
from cpt_ray.serving.deploy import serve_model
from cpt_ray.tables.rundir import RunDir

KEY = "benchmark"
WAYS = {
    **{name: {"RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": name} for name in ("roundrobin", "leastconn")},
    "by configuration": by_configuration(),
}


def make_catalog(count: int) -> Catalog:
    """One rubric with `count` levels."""
    levels = tuple(
        CatalogLevel(
            name=f"level{at}", score=100 * at / count, directive=f"Write in manner {at}.", directive_id=str(at)
        )
        for at in range(count)
    )
    return Catalog(
        (CatalogRubric(id="manner", title="Manner", version=1, objective="How it is written.", levels=levels),)
    )


async def ask_for(url: str, seconds: float, options: argparse.Namespace) -> dict[str, float]:
    """Clients that ask again as soon as they are answered: requests/s, ms an answer, cached share."""
    numbers, took, prompts, cached = itertools.count(), [], 0, 0
    system = "Keep to the point and to what you know. " * options.repeats
    end = time.perf_counter() + seconds
    connector = aiohttp.TCPConnector(limit=0)
    headers = {"Authorization": f"Bearer {KEY}"}
    async with aiohttp.ClientSession(url, headers=headers, connector=connector) as session:

        async def client() -> None:
            nonlocal prompts, cached
            while (start := time.perf_counter()) < end:
                number = next(numbers)
                level = random.Random(number).randrange(options.configurations)
                messages = [
                    {"role": "system", "content": system},
                    {"role": "user", "content": f"Write about {number}."},
                ]
                body = {"model": "bench", "messages": messages, "max_tokens": options.tokens, "temperature": 0}
                body |= {"ignore_eos": True, "configuration": {"manner": f"level{level}"}}
                async with session.post("/v1/chat/completions", json=body) as answer:
                    answer.raise_for_status()
                    usage = (await answer.json())["usage"]
                took.append(time.perf_counter() - start)
                prompts += usage["prompt_tokens"]
                cached += (usage["prompt_tokens_details"] or {}).get("cached_tokens") or 0

        await asyncio.gather(*(client() for _ in range(options.clients)))
    rate = options.clients / statistics.mean(took)
    return {"requests/s": rate, "median ms": 1000 * statistics.median(took), "cached": cached / prompts}


def measure(config: RunConfig, model: Path, way: str, options: argparse.Namespace) -> dict[str, float]:
    """One server with one way, from its start to its end."""
    from ray import serve

    os.environ |= WAYS[way]
    with tempfile.TemporaryDirectory() as folder, connected(log=Path(folder) / "ray.log"):
        run = RunDir(Path(folder))
        run.write_json(CATALOG_FILE, make_catalog(options.configurations).to_json())
        url = serve_model(config, run, KEY, block=False, model=model)
        asyncio.run(ask_for(url, 3, options))  # warm
        found = asyncio.run(ask_for(url, options.seconds, options))
        serve.shutdown()
        return found


def main() -> None:
    """Round by round, way by way; then the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_file", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--configurations", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=25, help="of a sentence of ten words that the system message is")
    parser.add_argument("--tokens", type=int, default=16, help="of every answer")
    parser.add_argument("--seconds", type=float, default=10, help="of every measurement")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}  # before Ray is imported
    fixed = ["name=bench", "serve.port=0", "serve.replicas=2", "serve.frontend={enable_prompt_tokens_details: true}"]
    fixed += ["policy.sampling.stop=[]", "policy.sampling.include_stop=false"]  # every answer has as many tokens
    config = load_config(options.run_file, [*fixed, *options.overrides])
    config, _ = with_dtype(config, RunDir(Path(config.run_dir)))
    tuned = Path(config.run_dir) / "model"
    model = tuned.absolute() if (tuned / "config.json").exists() else Path(config.policy.path)
    found = defaultdict(list)
    for at in range(options.rounds):
        for way in WAYS if at % 2 == 0 else reversed(WAYS):
            found[way].append(measure(config, model, way, options))
            print(way, {name: round(value, 3) for name, value in found[way][-1].items()}, flush=True)
    for way, rounds in found.items():
        print(
            f"{way}: " + ", ".join(f"{name} {statistics.median(one[name] for one in rounds):.2f}" for name in rounds[0])
        )


if __name__ == "__main__":
    main()
