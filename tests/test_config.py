"""The run file: what loads, what is overridden, what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cpt_ray.config import ModelConfig, PromptsConfig, load_config
from cpt_ray.errors import UserError
from cpt_ray.prompts import read_prompts

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["embedded.yaml", "qwen3-4b.yaml"])
def test_shipped_run_files_load(name: str) -> None:
    config = load_config(ROOT / "jobs" / name)
    assert config.director.engine_key == config.writer.engine_key
    assert config.judge.engine_key == config.writer.engine_key


def test_an_override_replaces_one_entry() -> None:
    config = load_config(ROOT / "jobs" / "embedded.yaml", ["train.beta=0.3", "judge.model=other", "judge.num_gpus=1"])
    assert config.train.beta == 0.3
    assert config.judge.model == "other"
    assert config.writer.model == "embedded"


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lerning_rate=1", 'override: train.lerning_rate: unknown key (did you mean "learning_rate"?)'),
        ("trian.beta=1", 'trian: unknown key (did you mean "train"?)'),
        ("train.lora.rank=8", "train.lora.rank: unknown key (known: r, alpha, target_modules, quantize)"),
        ("train.beta=-1", "train.beta: found -1"),
        ("train.beta", "is not key=value"),
        (
            "judge.endpoint.base_url=localhost:8000/v1",
            "judge.endpoint.base_url: found 'localhost:8000/v1'; begin it with http:// or https://",
        ),
        ("judge.endpoint.base_url=http://", "judge.endpoint.base_url: found 'http://'; expected http://HOST:PORT/PATH"),
        ("judge.endpoint={base_url: 'http://h/v1 '}", "found 'http://h/v1 '; expected http://HOST:PORT/PATH"),
        (
            "judge.endpoint={base_url: 'http://h', max_tokens_field: n}",
            "found 'n'; input should be 'max_completion",
        ),
        ("seed.x=1", "holds a value, not a section"),
        ("name=../up", "name: found '../up'"),
        ("writer.num_actors=0", "writer.num_actors: found 0; expected 1 or more"),
        ("train.num_workers=[4, 1]", "train.num_workers: found [4, 1]; expected 1 or more as the fewest"),
        ("train.num_workers=two", "train.num_workers: found 'two'; expected a number, or [fewest, most]"),
        (
            "serve.replicas=[0, 0]",
            "serve.replicas: found [0, 0]; expected 0 or more as the fewest, and as many or more, not 0, as the most",
        ),
    ],
)
def test_a_bad_entry_is_refused_by_name(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(ROOT / "jobs" / "embedded.yaml", [override])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_how_many_is_a_number_or_a_range() -> None:
    config = load_config(ROOT / "jobs" / "embedded.yaml", ["writer.num_actors=[1, 4]", "serve.replicas=[0, 3]"])
    assert config.writer.num_actors == (1, 4)
    assert config.serve.replicas == (0, 3)
    assert config.train.num_workers == (2, 2)
    assert (str(config.writer.num_actors), str(config.train.num_workers)) == ("1-4", "2")
    again = type(config).model_validate(config.model_dump(mode="json"))
    assert again.writer.num_actors == (1, 4)
    assert config.train.model_dump(mode="json")["num_workers"] == 2


def test_answers_depend_on_what_the_engine_is_told_but_not_on_its_speed() -> None:
    before = ModelConfig(model="org/name")
    assert ModelConfig(model="org/name", engine={"max_num_seqs": 8}).answer_key == before.answer_key
    for changed in ({"engine": {"quantization": "fp8"}}, {"sampling": {"temperature": 0.5}}):
        assert ModelConfig.model_validate({"model": "org/name", **changed}).answer_key != before.answer_key
    assert ModelConfig(model="org/name", chat_template_kwargs={"x": 1}).policy_key != before.policy_key


def test_a_model_folders_identity_follows_its_content(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a")
    before = ModelConfig(model=str(tmp_path)).identity
    assert ModelConfig(model=str(tmp_path)).identity == before
    (tmp_path / "weights").write_bytes(b"b")
    assert ModelConfig(model=str(tmp_path)).identity != before
    assert ModelConfig(model="org/name").identity == "org/name"


def prompts(tmp_path: Path, name: str, text: str, column: str = "prompt") -> list[str]:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return [one.text for one in read_prompts(PromptsConfig(source=str(path), column=column, held_out=0.5))]


def test_prompts_are_read_from_every_kind_of_file(tmp_path: Path) -> None:
    wanted = [f"Write about {thing}." for thing in ("tea", "rain", "iron", "moss", "salt", "dusk")]
    rows = [{"prompt": text} for text in wanted]
    csv_rows = "\n".join(f'{at},"{text}"' for at, text in enumerate(wanted))
    assert prompts(tmp_path, "a.jsonl", "\n".join(map(json.dumps, rows))) == wanted
    assert prompts(tmp_path, "a.csv", f"id,prompt\n{csv_rows}") == wanted
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = read_prompts(PromptsConfig(source=str(tmp_path / "a.parquet"), held_out=0.5))
    assert [one.text for one in found] == wanted


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", "{", "a.jsonl:1: not JSON"),
        ("a.jsonl", '{"promt": "x"}', "no column 'prompt' (did you mean \"promt\"?)"),
        ("a.jsonl", '{"prompt": 3}', "expected a non-empty text"),
        ("a.jsonl", '{"prompt": "x"}', "none of them"),
        ("a.json", "[]", "a.json: rows are read from .jsonl, .parquet, .csv files or a data set's name"),
    ],
)
def test_bad_prompts_are_refused(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        prompts(tmp_path, name, text)
    assert said in str(caught.value)


def test_a_missing_source_is_refused() -> None:
    with pytest.raises(UserError, match="no such file"):
        read_prompts(PromptsConfig(source="nowhere.jsonl"))
    with pytest.raises(UserError, match="neither a file here nor a data set"):
        read_prompts(PromptsConfig(source="nobody/nothing"))


def test_shipped_prompts_are_many_and_split_by_content(tmp_path: Path) -> None:
    config = PromptsConfig(source=str(ROOT / "rubrics" / "prompts.jsonl"), held_out=0.15)
    found = read_prompts(config)
    assert len(found) >= 160
    held_out = {one.text for one in found if one.split == "held_out"}
    assert 0.05 < len(held_out) / len(found) < 0.25
    lines = (ROOT / "rubrics" / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "half.jsonl").write_text("\n".join(lines[::-2]), encoding="utf-8")
    half = read_prompts(PromptsConfig(source=str(tmp_path / "half.jsonl"), held_out=0.15))
    assert all((one.text in held_out) == (one.split == "held_out") for one in half)
