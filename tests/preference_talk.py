"""Talks with a server of `/v1/preferences` whose policy's log-probabilities are known, for tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import httpx

from cpt_ray.serving.app import ConfiguredApp
from cpt_ray.serving.keys import Key, Keyring, Meter, key_hash
from cpt_ray.serving.preferences import PreferenceStore
from cpt_ray.steering.choices import Question
from cpt_ray.steering.inference import Scorer
from cpt_ray.tables.rundir import SPENT_FILE
from tests.front import echo
from tests.test_steering_inference import KnownPolicy, candidates, catalog, choose

PATH = "/v1/preferences"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Tell me about the sea."}]
HIGH = [{"prompt": one.prompt, "chosen": one.chosen, "rejected": one.rejected} for one in choose(6)]
LOW = [one | {"chosen": one["rejected"], "rejected": one["chosen"]} for one in HIGH]
QUESTION = Question(prompt="asked", first="90 50", second="10 50", margins=(-8, 0, 8, 0, 0, 0))

Ask = Callable[..., Awaitable[httpx.Response]]


def talk(
    folder: Path,
    conversation: Callable[[Ask], Awaitable[None]],
    scorer: Scorer | None = None,
    policy: str = "",
    questions: Sequence[Question] = (QUESTION,),
    conditioner: Any = None,
) -> None:
    """One server's life; every request is made with the key "one" unless `key` names another."""
    known = candidates(policy=policy)
    store = PreferenceStore(folder, known, scorer or KnownPolicy(), questions, conditioner)
    keys = tuple(Key(name=name, hash=key_hash(name), created=0.0) for name in ("one", "other"))
    nowhere = Path("/nonexistent")
    keyring = Keyring(nowhere / "keys.json", keys)
    front = ConfiguredApp(echo, {"m": catalog()}, keyring, Meter(nowhere / SPENT_FILE), preferences=store)

    async def go() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:

            async def ask(method: str, path: str, key: str = "one", **given: Any) -> httpx.Response:
                return await client.request(method, path, headers={"Authorization": f"Bearer {key}"}, **given)

            await conversation(ask)

    asyncio.run(go())


async def tell(ask: Ask, choices: Sequence[Any], name: str = "") -> dict[str, Any]:
    answer = await ask("POST", f"{PATH}/{name}" if name else PATH, json={"choices": choices})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def chat(ask: Ask, **body: Any) -> httpx.Response:
    return await ask("POST", CHAT, json={"model": "m", "messages": USER} | body)
