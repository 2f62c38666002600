"""What users and stored data see, held in files: conversations, ids, shard names, hashes, formats and API exchanges.

A mismatch shows a diff. `GOLDEN=write pytest tests/test_golden.py` writes the files under tests/golden/ anew; look at
what that changes before you commit it: with another name, what is stored under the old one is made again. Names hash
the toy model's files too, so another toy model changes them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from cpt_ray.chat.conversations import policy_messages, token_ids
from cpt_ray.chat.templates import ChatTemplate
from cpt_ray.engines.engine import Request
from cpt_ray.logprobs.rows import SCHEMA
from cpt_ray.rubrics.catalog import compose_directives
from cpt_ray.serving.app import ConfiguredApp
from cpt_ray.serving.keys import Key, Keyring, Meter, key_hash
from cpt_ray.serving.preferences import PreferenceStore
from cpt_ray.steering.choices import Question
from cpt_ray.steering.policy import SavedForm
from cpt_ray.steering.scoring import answer_tokens
from cpt_ray.tables.records import content_id, schema_of
from cpt_ray.tables.rundir import KEYS_FILE, MODEL_INFO_FILE, SPENT_FILE, TABLES, RunDir
from tests import toy
from tests.front import echo
from tests.golden_files import FOLDER, check, shape, shortened
from tests.golden_run import Made, make_runs
from tests.test_steering_inference import KnownPolicy, candidates, catalog, choose


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make_runs(tmp_path_factory.mktemp("golden"))


# ---------------------------------------------------------------- conversations

FORM = re.compile(r"thing \d+\.|\d+(?=[.!] B)")
"""In which conversations of one form differ: the prompt, and the number in a written answer."""


def some_of(rows: Sequence[Any]) -> list[Any]:
    """The first and the last of them."""
    return [*rows[:6], *rows[6:][-3:]]


def conversations(requests: Sequence[Request]) -> dict[str, Any]:
    """The first conversation of some forms, how often the form comes, and what of the request is not the default."""
    forms = defaultdict[str, list[Request]](list)
    for request in requests:
        seedless = dataclasses.replace(request, seed=None)  # seeds depend on ids, and are kept with them
        forms[FORM.sub("", repr(seedless))].append(seedless)
    default = dataclasses.asdict(Request(messages=[], max_tokens=0))
    shown = []
    for same in some_of(list(forms.values())):
        fields = {name: value for name, value in dataclasses.asdict(same[0]).items() if value != default[name]}
        shown.append({"times": len(same)} | fields)
    return {"requests": len(requests), "forms": len(forms), "some of them": shown}


def test_every_stage_asks_in_the_same_words(made: Made) -> None:
    asked = defaultdict[str, list[Request]](list)
    for run, stages in made.asked.items():
        for stage, requests in stages.items():
            for request in requests if run == "levels" or stage in ("write", "control") else ():
                name = f"{stage} by rationale" if request.json_schema else stage
                asked[name if run == "levels" else f"{name} {run}"].append(request)
    files = {f"{name.replace(' ', '-')}.yaml": conversations(requests) for name, requests in asked.items()}
    check({f"conversations/{name}": content for name, content in files.items()})
    known = {path.name for path in (FOLDER / "conversations").iterdir()}
    assert known <= {*files, "pairs.yaml", "policy.yaml"}, "a file of a stage that asks no more"


def test_pairs_are_the_same_conversations(made: Made) -> None:
    rows = rows_of(made.runs["levels"], "pairs")
    prompt_id = next(row["prompt_id"] for row in rows if row["level"] == "control")
    first = [row for row in rows if row["prompt_id"] == prompt_id]
    first.sort(key=lambda row: (row["level"] == "control", "+" not in row["rubric_id"]))
    kept = ("rubric_id", "level", "rejected_level", "prompt", "chosen", "rejected", "chosen_score", "rejected_score")
    check({"conversations/pairs.yaml": [{name: row[name] for name in kept} for row in some_of(first)]})


def test_the_policy_is_given_the_same_text_and_tokens() -> None:
    tokenizer, asked = AutoTokenizer.from_pretrained(toy.MODEL), "Tell me about the sea."
    user, system = {"role": "user", "content": asked}, {"role": "system", "content": "Be brief."}
    directive = "Write the high way."
    answer, template = {"role": "assistant", "content": "Blue."}, ChatTemplate(tokenizer, {})
    shown: dict[str, Any] = {}
    for name, messages in {
        "no directive": policy_messages(None, asked),
        "a directive": policy_messages(directive, asked),
        "two directives": policy_messages(compose_directives([directive, "Be glad."]), asked),
        "a directive, and a system message": policy_messages(directive, [system, user]),
        "a directive, and a conversation": policy_messages(directive, [user, answer, user]),
    }.items():
        ids = " ".join(map(str, token_ids(tokenizer, messages)))
        shown[name] = {"messages": messages, "rendered": template.render(messages), "ids": ids}
        shown[name]["answered"] = template.render([*messages, answer], is_finished=True)
    whole, start = answer_tokens(tokenizer, directive, asked, "Blue.", {})
    shown["scored"] = {"prompt": tokenizer.decode(whole[:start]), "answer": tokenizer.decode(whole[start:])}
    check({"conversations/policy.yaml": shown})


# ---------------------------------------------------------------- names

IDS = {
    "units": "unit_id",
    "directives": "directive_id",
    "pairs": "pair_id",
    "evaluation": "trial_id",
    "reference": "sequence_id",
    "steering_logprobs": "answer_id",
}
MAX_INPUTS, MAX_IDS = 300, 20
"""Characters of what is hashed, and ids of a column, that are shown."""


def rows_of(run: RunDir, table: str) -> list[dict[str, Any]]:
    return [row for path in sorted((run.path / table).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def ids_of(run: RunDir, table: str) -> list[str]:
    return sorted({row[IDS[table]] for row in rows_of(run, table)})


def inputs_of(made: Made, digest: str) -> str:
    """What an id, a key or the end of a shard's name is the hash of."""
    text = made.hashed.get(digest[:12], "?")
    return text if len(text) <= MAX_INPUTS else f"{text[:MAX_INPUTS]} ... ({len(text)} characters)"


def keys_of(made: Made) -> dict[str, str]:
    """The end of each shard's name and each key in a file, by where it is."""
    keys = {}
    for name, run in made.runs.items():
        for path in sorted(run.path.rglob("*.parquet")):
            keys[f"{name}/{path.parent.name}/{path.stem}"] = path.stem.rpartition("-")[2]
        for file in (MODEL_INFO_FILE, "spread.json", "steering/questions.json"):
            if content := run.read_json(file):
                keys[f"{name}/{file} {content['key']}"] = content["key"]
    return keys | {f"reward models in {one.folder.name}": one.folder.name for one in made.fits}


def test_shards_have_the_same_names_made_of_the_same(made: Made) -> None:
    keys = keys_of(made)
    lines = [name if digest in [*keys.values()][:at] else f"{name}: {inputs_of(made, digest)}"
             for at, (name, digest) in enumerate(keys.items())]  # fmt: skip
    known, left = dict[str, str](), lines.copy()
    others = {*keys.values(), *(one for run in made.runs.values() for table in IDS for one in ids_of(run, table))}
    while left:
        for digest in re.findall(r"\b[0-9a-f]{12}(?:[0-9a-f]{8})?\b", left.pop()):
            if digest[:12] in made.hashed and digest not in known and digest not in others:
                known[digest] = inputs_of(made, digest)
                left.append(known[digest])
    check({"names.txt": [*lines, "", *(f"{digest}: {text}" for digest, text in sorted(known.items()))]})


def test_rows_have_the_same_ids_made_of_the_same(made: Made) -> None:
    lines = []
    for name, run in made.runs.items():
        for table, column in IDS.items():
            ids = ids_of(run, table)
            lines.append(f"{name}/{table}.{column}: {len(ids)}, of the hash {content_id(ids)}; the first of them:")
            lines += [f"  {digest} {inputs_of(made, digest)}" for digest in ids[:MAX_IDS]]
        for stage, requests in made.asked[name].items():
            seeds = [request.seed for request in requests]
            lines.append(f"{name}/{stage}: {len(seeds)} seeds, of the hash {content_id(seeds)}: {seeds[:4]} ...")
    check({"ids.txt": lines})


# ---------------------------------------------------------------- formats


def test_stored_files_have_the_same_shape(made: Made) -> None:
    run, bare = made.runs["levels"], made.runs["bare"]
    names = ("ledger.json", "judges.json", "spread.json", "catalog.json", "report/results.json", "report/steering.json")
    files = {name: shape(run.read_json(name)) for name in (*names, MODEL_INFO_FILE, "steering/questions.json")}
    dials = {name: bare.read_json("report/results.json")[name] for name in ("check", "crosstalk", "levels")}
    files |= {"run.yaml": shape(run.read_yaml("run.yaml")), "report/results.json, of measures alone": shape(dials)}
    for name, record in ((SavedForm.file("FORM"), SavedForm), (KEYS_FILE, Key)):
        files[name] = {field.name: str(field.type) for field in dataclasses.fields(record)}
    check({"files.yaml": {name: shortened(one) for name, one in files.items()}}, flow=None)


def test_tables_have_the_same_columns_and_counts(made: Made) -> None:
    tables, run = {}, made.runs["levels"]
    for table, record in TABLES.items():
        counts = {name for stem in run.names(table) for name in run.counts(table, stem)}
        tables[table] = {"columns": columns(schema_of(record)), "counts": sorted(counts)}
    check({"tables.yaml": tables | {"train_rows": {"columns": columns(SCHEMA)}}}, flow=None)


def columns(schema: Iterable[Any]) -> dict[str, str]:
    return {field.name: f"{field.type}{'' if field.nullable else ' not null'}" for field in schema}


# ---------------------------------------------------------------- the API

CHAT, PREFERENCES = "/v1/chat/completions", "/v1/preferences"
USER, SYSTEM = {"role": "user", "content": "Tell me about the sea."}, {"role": "system", "content": "Be brief."}
CHOICES = [dataclasses.asdict(choice) for choice in choose(6)]


def chat(*messages: dict[str, str], **fields: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [*(messages or (USER,))], **fields}


EXCHANGES: list[tuple[str, str, str, str, Any]] = [
    ("the configurations", "open", "GET", "/v1/configurations", None),
    ("chat with levels", "open", "POST", CHAT, chat(SYSTEM, USER, configuration={"ornament": "high", "mood": "low"})),
    ("chat with a score", "open", "POST", CHAT, chat(configuration={"ornament": 72}, temperature=0.5)),
    ("chat with a model's name", "open", "POST", CHAT, chat() | {"model": "cpt:ornament=high,mood=30"}),
    ("chat with a saved configuration", "open", "POST", CHAT, chat(configuration="poet")),
    ("chat without a configuration", "open", "POST", CHAT, chat()),
    ("an unknown level", "open", "POST", CHAT, chat(configuration={"ornament": "hgih"})),
    ("a misspelt field", "open", "POST", CHAT, chat(configuraton={"ornament": "high"})),
    ("a control token", "open", "POST", CHAT, chat({"role": "user", "content": "Hi<|im_end|>"})),
    ("no key", "", "POST", CHAT, chat()),
    ("a revoked key", "revoked", "POST", CHAT, chat()),
    ("a slow key", "slow", "POST", CHAT, chat()),
    ("a slow key, too fast", "slow", "POST", CHAT, chat()),
    ("preferences, made", "open", "POST", PREFERENCES, {"choices": CHOICES}),
    ("preferences, read", "open", "GET", f"{PREFERENCES}/ID", None),
    ("preferences of another key", "other", "GET", f"{PREFERENCES}/ID", None),
    ("preferences, listed", "open", "GET", PREFERENCES, None),
    ("chat with preferences", "open", "POST", CHAT, chat(preferences="ID")),
    ("preferences, deleted", "open", "DELETE", f"{PREFERENCES}/ID", None),
    ("the playground", "", "GET", "/playground", None),
    ("health", "", "GET", "/health", None),
    ("nothing there", "open", "GET", "/nowhere", None),
]


def make_frontend(folder: Path) -> ConfiguredApp:
    """Around an app that answers with what it was sent."""
    limits: dict[str, dict[str, Any]] = {
        "open": {},
        "revoked": {"revoked": True},
        "slow": {"requests_per_minute": 1},
        "other": {},
    }
    keys = tuple(Key(name=name, hash=key_hash(name), created=0.0, **limit) for name, limit in limits.items())
    question = Question(prompt="asked", first="90 50", second="10 50", margins=(-8, 0, 8, 0, 0, 0))
    return ConfiguredApp(
        echo,
        {"m": catalog().with_saved({"poet": {"ornament": 88}})},
        Keyring(folder / KEYS_FILE, keys),
        Meter(folder / SPENT_FILE, lambda: 0.0),
        listing_extras={"model": "m", "base": None},
        preferences=PreferenceStore(folder, candidates(), KnownPolicy(), (question,)),
        control_token_pattern=re.compile(r"<\|im_end\|>"),
    )


def readable(value: Any) -> Any:
    """Plain data without what is of the client (headers) or too exact; the body that reached the app as JSON."""
    if isinstance(value, dict):
        kept = {name: readable(inner) for name, inner in value.items() if name != "headers"}
        return kept | ({"body": readable(json.loads(value["body"]))} if value.get("body") else {})
    if isinstance(value, list):
        return [readable(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


async def exchange_all(folder: Path) -> dict[str, Any]:
    shown: dict[str, Any] = {}
    made = ""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_frontend(folder)), base_url="http://front"
    ) as client:
        for name, key, method, path, body in EXCHANGES:
            sent = None if body is None else json.dumps(body).replace('"ID"', f'"{made}"')
            headers = {"Authorization": f"Bearer {key}"} if key else {}
            answer = await client.request(method, path.replace("ID", made), headers=headers, content=sent)
            said = readable(answer.json()) if "html" not in answer.headers.get("content-type", "") else "a page"
            made = said["id"] if name == "preferences, made" else made
            asked = {"key": key, "method": method, "path": path} | ({"body": body} if body else {})
            given = {one: value for one, value in sorted(answer.headers.items()) if one != "content-length"}
            answered = {"status": answer.status_code, "headers": given, "body": said}
            masked = json.loads(json.dumps(answered).replace(made or "ID", "ID"))
            shown[name] = {"request": asked, "response": masked}
            if name == "preferences, made":
                (kept,) = (folder / key_hash(key)[:32]).glob("*.json")
                shown[name]["kept"] = shape(json.loads(kept.read_text(encoding="utf-8")))
    return shown


def test_requests_are_answered_as_before(tmp_path: Path) -> None:
    check({"api.yaml": asyncio.run(exchange_all(tmp_path))})
