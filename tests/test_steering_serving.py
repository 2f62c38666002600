"""`/v1/preferences` behind the real front, with a policy whose log-probabilities are known; a real server is asked in
serving/test_preferences.py."""

from __future__ import annotations

import asyncio
import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from cpt_ray.errors import UserError
from cpt_ray.serving import preferences
from cpt_ray.serving.app import ConfiguredApp
from cpt_ray.serving.asgi import MAX_BODY_BYTES
from cpt_ray.serving.keys import Key, Keyring, Meter, key_hash
from cpt_ray.serving.preferences import PreferenceStore
from cpt_ray.steering.choices import Choice, Question
from cpt_ray.tables.rundir import SPENT_FILE
from tests.front import echo
from tests.preference_talk import CHAT, HIGH, LOW, PATH, QUESTION, USER, Ask, chat, talk, tell
from tests.test_steering_inference import GOOD, KnownPolicy, candidates, catalog


def test_choices_become_a_configuration_that_steers_chats(tmp_path: Path) -> None:
    async def conversation(ask: Ask) -> None:
        first = await tell(ask, HIGH[:1])
        assert (first["configuration"], first["directive"], first["num_choices"]) == (None, None, 1)
        assert first["question"] == {"prompt": "asked", "first": "90 50", "second": "10 50"}
        answer = (await chat(ask, preferences=first["id"])).json()
        assert answer["configuration"] == {"applied": {}, "directive": None, "from": "preferences"}

        found = await tell(ask, HIGH[1:], first["id"])
        assert (found["id"], found["configuration"]) == (first["id"], {"ornament": "high"})
        assert found["probabilities"]["ornament"]["high"] > 0.5
        assert found["num_choices"] == 6
        directive = catalog().resolve({"ornament": "high"}).directive
        for named in ({"preferences": found["id"]}, {"model": f"cpt:{found['id']}"}, {"model": f"m:{found['id']}"}):
            answer = await chat(ask, **named)
            said = {"applied": {"ornament": "high"}, "directive": directive, "from": "preferences"}
            assert answer.json()["configuration"] == said
            seen = json.loads(answer.json()["body"])
            assert seen == {"model": "m", "messages": [{"role": "system", "content": directive}, *USER]}
            assert answer.headers["x-cpt-configuration-from"] == "preferences"

    talk(tmp_path, conversation)


def test_an_explicit_configuration_wins_and_the_answer_says_so(tmp_path: Path) -> None:
    async def conversation(ask: Ask) -> None:
        name = (await tell(ask, HIGH))["id"]
        for named in ({"configuration": {"ornament": "low"}}, {"model": "cpt:ornament=low"}):
            answer = await chat(ask, preferences=name, **named)
            assert answer.json()["configuration"]["applied"] == {"ornament": "low"}
            assert answer.json()["configuration"]["from"] == "configuration"
            assert answer.headers["x-cpt-configuration-from"] == "configuration"
            assert "preferences" not in json.loads(answer.json()["body"])
        plain = await chat(ask, configuration={"ornament": "low"})
        assert "from" not in plain.json()["configuration"]

    talk(tmp_path, conversation)


def test_another_key_knows_nothing_of_them_and_deletion_is_real(tmp_path: Path) -> None:
    async def conversation(ask: Ask) -> None:
        name = (await tell(ask, HIGH))["id"]
        own = f"{PATH}/{name}"
        for key, wanted in (("one", [name]), ("other", [])):
            listed = (await ask("GET", PATH, key=key)).json()
            assert [one["id"] for one in listed["data"]] == wanted
            assert listed["question"]["prompt"] == "asked"
        assert (await ask("GET", own)).json()["choices"] == HIGH
        body = {"model": "m", "messages": USER, "preferences": name}
        requests: list[Any] = [("GET", own), ("DELETE", own), ("POST", own, {"choices": HIGH}), ("POST", CHAT, body)]

        async def statuses(key: str) -> list[int]:
            return [(await ask(one[0], one[1], key=key, json=(*one, None)[2])).status_code for one in requests]

        assert await statuses("other") == [404] * 4
        assert any("90 10" in one.read_text() for one in tmp_path.rglob("*.json"))
        assert (await ask("DELETE", own)).json() == {"id": name, "object": "preferences", "deleted": True}
        assert not [one for one in tmp_path.rglob("*") if one.is_file() and one.stat().st_size]
        assert await statuses("one") == [404] * 4

    talk(tmp_path, conversation)


def test_they_survive_a_restart_and_newer_weights(tmp_path: Path) -> None:
    said: list[Any] = []

    async def make(ask: Ask) -> None:
        said.append(await tell(ask, HIGH))

    async def read(ask: Ask) -> None:
        found = (await ask("GET", f"{PATH}/{said[0]['id']}")).json()
        assert found.pop("choices") == HIGH
        assert found == said[0]
        assert (await chat(ask, preferences=said[0]["id"])).json()["configuration"]["applied"] == {"ornament": "high"}

    policy = KnownPolicy()
    talk(tmp_path, make, policy)
    asked = policy.asked
    talk(tmp_path, read, policy)
    assert policy.asked == asked > 0
    talk(tmp_path, read, policy, policy="newer")
    assert policy.asked == 2 * asked  # scored again, once


def test_choices_told_at_the_same_time_are_all_kept(tmp_path: Path) -> None:
    async def conversation(ask: Ask) -> None:
        name = (await tell(ask, HIGH[:1]))["id"]
        await asyncio.gather(*(tell(ask, [one], name) for one in [*HIGH, *LOW]))
        found = (await ask("GET", f"{PATH}/{name}")).json()
        key = json.dumps
        assert sorted(map(key, found["choices"])) == sorted(map(key, [*HIGH, *LOW]))

    talk(tmp_path, conversation)


def test_an_answer_to_the_question_asked_costs_nothing_and_contradictions_leave_it_unknown(tmp_path: Path) -> None:
    policy = KnownPolicy()

    async def conversation(ask: Ask) -> None:
        one = {"prompt": "asked", "chosen": "10 50", "rejected": "90 50"}
        found = await tell(ask, [one, one])
        assert (policy.asked, found["question"]) == (0, None)
        assert found["probabilities"]["ornament"]["low"] > found["probabilities"]["ornament"]["high"]
        assert (await tell(ask, [*HIGH, *LOW]))["configuration"] is None

    talk(tmp_path, conversation, policy)


BODIES: list[Any] = [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"choices": []}', b'{"choices": 1}', b'{"choices": [{}]}',
    json.dumps({"choices": [GOOD] * 65}).encode(),
    json.dumps({"choices": [GOOD], "more": 1}).encode(),
    json.dumps({"choices": [GOOD | {"chosen": GOOD["rejected"]}]}).encode(),
    json.dumps({"choices": [GOOD | {"chosen": "x" * 20_000, "prompt": str(at)} for at in range(11)]}).encode(),
    b'{"choices": [{"prompt": "\\ud800", "chosen": "a", "rejected": "b"}]}',
    b'{"choices": [{"prompt": 1e999, "chosen": "a", "rejected": NaN}]}',
    b"9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("body", BODIES)
def test_whatever_is_no_list_of_choices_is_a_bad_request_and_keeps_nothing(tmp_path: Path, body: bytes) -> None:
    async def conversation(ask: Ask) -> None:
        answer = await ask("POST", PATH, content=body)
        assert answer.status_code == 400
        assert len(answer.json()["error"]["message"]) < 300
        assert not list(tmp_path.rglob("*.json"))

    talk(tmp_path, conversation)


NAMES = ["x", "preferences-" + "0" * 24, "preferences-" + "0" * 23, "%2e%2e/keys", "a/b", "preferences-" * 9]


@pytest.mark.parametrize("name", NAMES)
def test_an_id_that_nobody_was_given_is_not_found(tmp_path: Path, name: str) -> None:
    async def conversation(ask: Ask) -> None:
        for method in ("GET", "POST", "DELETE"):
            answer = await ask(method, f"{PATH}/{name}", json={"choices": [GOOD]})
            assert answer.status_code in (400, 404)
            assert "error" in answer.json()
        assert (await chat(ask, preferences=name)).status_code == 404

    talk(tmp_path, conversation)


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"preferences": 1}, 400),
        (CHAT, {"preferences": ["a"]}, 400),
        (CHAT, {"preferences": None}, 200),
        ("/v1/completions", {"preferences": "preferences-" + "0" * 24}, 400),
        (CHAT, {"model": "cpt:preferences-x"}, 404),
    ],
)
def test_preferences_are_never_silently_ignored(tmp_path: Path, path: str, body: dict[str, Any], status: int) -> None:
    async def conversation(ask: Ask) -> None:
        answer = await ask("POST", path, json={"model": "m", "messages": USER} | body)
        assert answer.status_code == status

    talk(tmp_path, conversation)


def test_a_choice_sent_again_counts_once_and_its_opposite_speaks_against_it(tmp_path: Path) -> None:
    async def conversation(ask: Ask) -> None:
        once = await tell(ask, HIGH[:1])
        many = await tell(ask, HIGH[:1] * 64)
        again = await tell(ask, HIGH[:1] * 64, many["id"])
        for found in (many, again):
            assert found | {"id": once["id"]} == once
            assert found["num_choices"] == 1
        both = await tell(ask, LOW[:1], many["id"])
        assert both["num_choices"] == 2
        assert both["confidence"]["ornament"] < once["confidence"]["ornament"]
        assert (await ask("GET", f"{PATH}/{many['id']}")).json()["choices"] == [HIGH[0], LOW[0]]

    talk(tmp_path, conversation)


def test_every_request_about_preferences_counts_against_a_key(tmp_path: Path) -> None:
    store = PreferenceStore(tmp_path, candidates(), KnownPolicy(), (QUESTION,))
    nowhere = Path("/nonexistent")
    key = Key(name="one", hash=key_hash("one"), created=0.0, requests_per_minute=4)
    meter = Meter(nowhere / SPENT_FILE, lambda: 0.0)
    front = ConfiguredApp(echo, {"m": catalog()}, Keyring(nowhere / "keys.json", (key,)), meter, preferences=store)

    async def go() -> list[int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(front), base_url="http://front") as client:
            client.headers["Authorization"] = "Bearer one"
            name = (await client.post(PATH, json={"choices": HIGH[:1]})).json()["id"]
            asked = [
                ("GET", ""),
                ("GET", f"/{name}"),
                ("HEAD", f"/{name}"),
                ("GET", f"/{name}"),
                ("DELETE", f"/{name}"),
            ]
            return [(await client.request(method, PATH + rest)).status_code for method, rest in asked]

    assert asyncio.run(go()) == [200, 200, 200, 429, 429]


def test_number_and_size_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preferences, "MAX_STATES", 2)
    monkeypatch.setattr(preferences, "MAX_KEPT", 7)

    async def conversation(ask: Ask) -> None:
        names = [(await tell(ask, HIGH))["id"] for _ in range(2)]
        refused = await ask("POST", PATH, json={"choices": HIGH})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "preferences_full")
        assert (await ask("POST", PATH, key="other", json={"choices": HIGH})).status_code == 200
        refused = await ask("POST", f"{PATH}/{names[0]}", json={"choices": LOW[:2]})
        assert refused.status_code == 400
        assert "at most 7" in refused.text
        assert (await ask("POST", PATH, content=b" " * (MAX_BODY_BYTES + 1))).status_code == 413
        assert (await ask("PUT", f"{PATH}/{names[0]}", json={})).status_code == 405
        assert (await ask("DELETE", f"{PATH}/{names[0]}")).status_code == 200
        assert len((await tell(ask, HIGH))["id"]) == len(names[0])

    talk(tmp_path, conversation)


def test_a_state_that_was_damaged_and_an_answer_too_long_are_said(tmp_path: Path) -> None:
    class Short(KnownPolicy):
        def logprobs(self, asked: Sequence[tuple[str | None, str, str]]) -> list[float]:
            raise UserError("an answer and its prompt have 600 tokens, the model takes 511")

    async def long(ask: Ask) -> None:
        answer = await ask("POST", PATH, json={"choices": HIGH})
        assert answer.status_code == 400
        assert "600 tokens" in answer.text

    async def damaged(ask: Ask) -> None:
        name = (await tell(ask, HIGH))["id"]
        (file,) = tmp_path.rglob("*.json")
        file.write_text("{")
        for answer in (await ask("GET", f"{PATH}/{name}"), await chat(ask, preferences=name)):
            assert answer.status_code == 400
            assert "not a saved state" in answer.text
        assert (await ask("DELETE", f"{PATH}/{name}")).status_code == 200

    talk(tmp_path, long, Short())
    talk(tmp_path, damaged)


def test_a_full_disk_is_not_the_clients_fault_and_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    async def conversation(ask: Ask) -> None:
        monkeypatch.setattr("cpt_ray.tables.files.os.fsync", refuse)
        with pytest.raises(RuntimeError, match="cannot be written"):  # a server answers 500
            await ask("POST", PATH, json={"choices": HIGH})
        assert not [one for one in tmp_path.rglob("*") if one.is_file() and one.stat().st_size]

    talk(tmp_path, conversation)


class KnownConditioner:
    """Keeps which choices steered; there is no engine to take an adapter."""

    form = "gated_lora"

    def __init__(self) -> None:
        self.asked: list[list[Choice]] = []

    def adapter(self, choices: list[Choice]) -> None:
        self.asked.append(choices)


def test_beside_a_conditioner_nothing_is_scored_or_said_and_questions_come_in_the_priors_order(tmp_path: Path) -> None:
    policy, conditioner, said = KnownPolicy(), KnownConditioner(), list[Any]()
    empty = Question(prompt="dull", first="50 50", second="50 50 50", margins=(0,) * 6)
    unknown = {"configuration": None, "directive": None, "confidence": {}, "probabilities": {}}

    async def steered(ask: Ask) -> None:
        assert (await ask("GET", PATH)).json()["question"]["prompt"] == "asked"  # the later one, which says more
        first = await tell(ask, HIGH[:2])
        assert first == {"id": first["id"], "object": "preferences", "num_choices": 2} | unknown | {
            "question": {"prompt": "asked", "first": "90 50", "second": "10 50"}
        }
        said.append(await tell(ask, [{"prompt": "asked", "chosen": "90 50", "rejected": "10 50"}], first["id"]))
        assert said[0]["question"]["prompt"] == "dull"
        assert said[0]["num_choices"] == 3
        answer = (await chat(ask, preferences=first["id"])).json()
        assert answer["configuration"] == {"applied": {}, "directive": None, "from": "preferences, by gated_lora"}
        assert [one.prompt for one in conditioner.asked[0]] == [HIGH[0]["prompt"], HIGH[1]["prompt"], "asked"]
        assert policy.asked == 0

    async def inferred(ask: Ask) -> None:
        found = await tell(ask, HIGH[2:], said[0]["id"])
        assert found["configuration"] == {"ornament": "high"}
        assert found["num_choices"] == 7
        assert policy.asked > 0

    async def steered_again(ask: Ask) -> None:
        found = (await ask("GET", f"{PATH}/{said[0]['id']}")).json()
        assert {name: found[name] for name in unknown} == unknown
        assert found["num_choices"] == 7

    talk(tmp_path, steered, policy, questions=[empty, QUESTION], conditioner=conditioner)
    talk(tmp_path, inferred, policy)  # the server without one scores all that is known
    talk(tmp_path, steered_again, policy, policy="newer", conditioner=conditioner)
