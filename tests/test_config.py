"""The run file: what loads, what is overridden, what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import BaseModel, TypeAdapter

from cpt_ray import config
from cpt_ray.config import ModelConfig, load_config
from cpt_ray.errors import UserError
from tests import toy
from tests.builders import overridden

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["quickstart.yaml", "qwen3-4b.yaml"])
def test_shipped_run_files_load(name: str) -> None:
    config = load_config(ROOT / "jobs" / name)
    assert config.director.engine_key == config.writer.engine_key
    assert config.judge.engine_key == config.writer.engine_key


def test_an_override_replaces_one_entry() -> None:
    config = load_config(toy.RUN_FILE, ["train.beta=0.3", "judge.model=other", "judge.num_gpus=1"])
    assert config.train.beta == 0.3
    assert config.judge.model == "other"
    assert config.writer.model == "tests/toy/model"


@pytest.mark.parametrize("is_reversed", [False, True])
def test_an_override_changes_one_entry_of_a_section_that_is_the_writers(is_reversed: bool) -> None:
    overrides = ["judge.engine.max_num_seqs=32", "judge.sampling.temperature=0", "writer.engine.dtype=float32"]
    config = load_config(ROOT / "jobs" / "qwen3-4b.yaml", overrides[::-1] if is_reversed else overrides)
    assert config.judge.engine == config.writer.engine | {"max_num_seqs": 32}
    assert config.judge.sampling == config.writer.sampling.model_copy(update={"temperature": 0})
    assert config.director == config.writer
    # a section that is given is whole, and so is a model of one's own
    judge = load_config(ROOT / "jobs" / "quickstart.yaml", ["judge.sampling.max_tokens=20"]).judge
    assert (judge.sampling.max_tokens, judge.sampling.stop) == (20, ())
    own = ["judge.engine.max_num_seqs=32", "judge.model=other"]
    config = load_config(ROOT / "jobs" / "qwen3-4b.yaml", own[::-1] if is_reversed else own)
    assert config.judge.engine == {"max_num_seqs": 32}
    nested = ["writer.engine.compilation_config={mode: 3}", "judge.engine.compilation_config.mode=0"]
    config = load_config(ROOT / "jobs" / "qwen3-4b.yaml", nested[::-1] if is_reversed else nested)
    modes = [role.engine["compilation_config"]["mode"] for role in (config.writer, config.director, config.judge)]
    assert modes == [3, 3, 0]
    for wrong in ("judge.num_gpus.least=1", "judge.model.x=1"):
        with pytest.raises(UserError, match=r"^.*judge\.(num_gpus|model): "):
            load_config(ROOT / "jobs" / "qwen3-4b.yaml", [wrong])


SECTIONS = [kind for kind in vars(config).values() if isinstance(kind, type) and issubclass(kind, BaseModel)]


@pytest.mark.parametrize("section", SECTIONS, ids=lambda kind: kind.__name__)
def test_a_default_that_is_given_is_the_same_setting(section: type[BaseModel]) -> None:
    for name, field in section.model_fields.items():
        if not field.is_required() and field.default_factory is None:
            adapter: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, "", *field.metadata])
            assert repr(adapter.validate_python(field.default)) == repr(field.default), name


@pytest.mark.parametrize(
    ("section", "names"),
    [
        (config.TrainConfig, config.TRAIN_PLACES),
        (config.SynthesisConfig, config.PAIR_SETTINGS),
        (config.SteerConfig, config.REWARD_SETTINGS | config.POLICY_SETTINGS),
    ],
)
def test_keys_that_change_a_result_exist(section: type[BaseModel], names: set[str]) -> None:
    assert names <= set(section.model_fields)  # of others, pydantic's model_dump says nothing


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("serve: {route_by: load}", "serve.route_by: was removed, since it made nothing faster; leave it out"),
        ("serve: {preferences: soft_prompt}", "serve.preferences: soft prompts are no longer served"),
    ],
)
def test_a_removed_setting_is_refused_with_what_to_do(tmp_path: Path, entry: str, said: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"{toy.RUN_FILE.read_text()}\n{entry}\n")
    with pytest.raises(UserError, match=re.escape(f"{path}: {said}")):
        load_config(path)
    key, value = re.findall(r"\w+", entry)[1:]
    with pytest.raises(UserError, match=re.escape(f"override: {said}")):
        load_config(toy.RUN_FILE, [f"serve.{key}={value}"])


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
            "found 'n'; expected one of max_completion",
        ),
        ('writer.sampling.stop=""', "sampling.stop: found an empty text"),
        ("writer.sampling.stop=[a, '']", "sampling.stop: found an empty text"),
        (r"writer.sampling.stop='\n'", r"found \n with a backslash in it, which no answer has; in double quotes YAML"),
        ("writer.sampling.stop=[1]", "writer.sampling.stop"),
        (f"writer.sampling.stop={list('abcdefghijklmnopq')}", "writer.sampling.stop: found"),
        ("writer.sampling.include_stop=true", "sampling: include_stop: there is no stop; give one, or leave it out"),
        (
            "judge={endpoint: {base_url: 'http://h'}, model: m, sampling: {stop: [a, b, c, d, e]}}",
            "judge: sampling.stop: found 5 texts; an endpoint takes 4 at most, leave some out",
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
        load_config(toy.RUN_FILE, [override])
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(min_size=1))
def test_a_text_is_taken_as_it_was_typed(text: str) -> None:
    assume(not (text[0] == text[-1] and text[0] in "'\""))
    found = overridden(f"prompts.column={text}", f"serve.host={text}")
    assert (found.prompts.column, found.serve.host) == (text, text)


@pytest.mark.parametrize(
    "text", ["out/experiment #1", "12:30", "0123", "1e5", "no", "- a", "a: b", "[a", "&x", "!t", " a "]
)
def test_a_folder_is_named_as_it_was_typed(text: str) -> None:
    assert overridden(f"run_dir={text}").run_dir == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("run_dir='out #1'", "out #1"),
        ("name=on", "on"),
        ("train.checkpoints=null", None),
        ("writer.sampling.stop=END", ("END",)),
        (r'writer.sampling.stop=[". ", "\n"]', (". ", "\n")),
        ("train.lora=null", None),
        ("train.lora.quantize=null", None),
        ("train.lora.target_modules=all-linear", "all-linear"),
        ("train.lora.target_modules=[q, v]", ("q", "v")),
        ("train.learning_rate=1e-3", 0.001),
        ("seed=010", 10),
        ("evaluate.prompts=1e3", 1000),
        ("train.gradient_checkpointing=off", False),
        ('rubrics=["a #1", 2024-01-01]', ("a #1", "2024-01-01")),
        ("policy.engine.max_num_seqs=1e1", 10.0),
        ("policy.engine.max_model_len=64", 64),
        ("policy.engine.dtype=float32", "float32"),
        ("serve.configurations.poet.ornament=on", "on"),
        ("serve.configurations.poet.ornament=88", 88.0),
    ],
)
def test_what_is_no_text_is_read_as_yaml(override: str, value: object) -> None:
    found: object = overridden(override)
    for part in override.partition("=")[0].split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("evaluate.judge_check=", "has no value; give one, or null for none, or leave it out"),
        ("run_dir=", "run_dir: has no value; give one, or leave it out (was it a variable that is not set?)"),
        ("run_dir=''", "run_dir: found nothing"),
        ("run_dir=\udcff", "run_dir: found '\\udcff'; it is not UTF-8"),
        ("train.beta=0.1 # half", "train.beta: found '0.1 # half'; what follows # would be a comment"),
        ("rubrics=[a] #b", "rubrics: found '[a] #b'; what follows # would be a comment"),
        ("rubrics=[a", "rubrics: found '[a'; not read as YAML"),
        ("rubrics=a", "rubrics: found 'a'; expected a list with at least one entry"),
        ("train.lora=8", "train.lora: found 8; expected a section of 'key: value' lines"),
        ("prompts={source: a, source: b}", "the key 'source' stands twice"),
        ("seed=0x10", "seed: found '0x10'"),
        ("seed=12:30", "seed: found '12:30'"),
        ("seed=true", "seed: found true (or on, yes), which is no number"),
        ("seed=-1", "seed: found -1"),
        ("seed=4294967296", "seed: found 4294967296"),
        (
            "serve.configurations.poet={ornament: on}",
            "serve.configurations: found true (or on, yes), which is no number",
        ),
        ("steer.answers={list: a, text: b, scores: {x: y}, scale: [5, 1]}", "steer.answers.scale: found [5.0, 1.0]"),
        ("steer.embedder={model: m, engine: {dtype: float32}}", "engine: the embedder is run by transformers"),
        ("steer.embedder={model: m, endpoint: {base_url: 'http://x/v1'}}", "endpoint: the embedder is run by"),
        ("serve.frontend.ssl_keyfile=k", "not vLLM; put a server with TLS in front of serve.port"),
        ("serve.frontend.port=9", "port: would do nothing, since Ray Serve listens here and not vLLM; give serve.host"),
        ("serve.frontend.allowed_origins=http://a", "allowed_origins: found 'http://a'; expected a list of texts"),
        ("serve.frontend.allowed_origins=[http://a/]", "found 'http://a/'; expected one like https://example.org"),
        ("judge.votes=3", "votes: counts rationales"),
    ],
)
def test_a_value_that_would_become_another_is_refused(override: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        overridden(override)
    assert said in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf", "nan", "inf", "1e400", "true"])
@pytest.mark.parametrize(
    "entry",
    [
        "train.beta", "train.learning_rate", "train.epochs", "train.warmup_ratio", "train.loss.sigmoid",
        "train.resources_per_worker.GPU", "prompts.held_out", "policy.sampling.temperature", "policy.price.prompt",
        "policy.num_gpus", "steer.learning_rate", "steer.policy_beta", "steer.prior.mood", "serve.idle_seconds",
        "serve.target_ongoing_requests", "synthesis.control", "synthesis.max_length_ratio",
    ],
)  # fmt: skip
def test_every_number_is_finite(entry: str, value: str) -> None:
    with pytest.raises(UserError, match=rf"{entry.rpartition('.')[0]}.*: found .*(finite|number|greater|less)"):
        overridden(f"{entry}={value}")


def test_an_engine_has_as_many_gpus_as_it_is_parted_over() -> None:
    overridden("policy.num_gpus=4", "policy.engine.tensor_parallel_size=2", "policy.engine.pipeline_parallel_size=2")
    overridden("policy.num_gpus=0.5", "policy.engine.tensor_parallel_size=1", "policy.engine.data_parallel_size=1")
    overridden("policy.engine.tensor_parallel_size=2")
    with pytest.raises(UserError, match=r"num_gpus: found 1; engine\.tensor_parallel_size 2 needs 2"):
        overridden("policy.num_gpus=1", "policy.engine.tensor_parallel_size=2")
    with pytest.raises(UserError, match=r"num_gpus: found 1\.5; above 1, give a whole number"):
        overridden("policy.num_gpus=1.5")


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        (
            ["num_gpus=4", "engine.tensor_parallel_size=2"],
            "num_gpus: found 4; engine.tensor_parallel_size 2 uses 2, so the others would idle: set "
            "engine.tensor_parallel_size, or num_gpus: 2 and more num_actors",
        ),
        (
            ["num_gpus=8", "engine.tensor_parallel_size=2", "engine.pipeline_parallel_size=2"],
            "num_gpus: found 8; engine.tensor_parallel_size 2 x pipeline_parallel_size 2 uses 4, so the others would "
            "idle: set engine.tensor_parallel_size, or num_gpus: 4 and more num_actors",
        ),
        (
            ["num_gpus=2"],
            "num_gpus: found 2; without engine.tensor_parallel_size it uses 1, so the others would idle: set "
            "engine.tensor_parallel_size, or num_gpus: 1 and more num_actors",
        ),
        (
            ["engine.data_parallel_size=2"],
            "engine.data_parallel_size: found 2; an actor has one engine: leave it out and set num_actors (of the "
            "server: serve.replicas)",
        ),
    ],
)
def test_gpus_that_would_idle_and_engines_within_an_engine_are_refused(entries: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        overridden(*(f"policy.{entry}" for entry in entries))
    assert str(caught.value) == f"{toy.RUN_FILE}, overrides: policy: {said}"


def test_an_engine_argument_is_finite_too() -> None:
    with pytest.raises(UserError, match=r"policy\.engine: found nan; give a finite number"):
        overridden("policy.engine.gpu_memory_utilization=.nan")


@pytest.mark.parametrize("weights", ["{sigmoid: 0}", "{sigmoid: 1, sft: -0.1}"])
def test_a_loss_that_counts_for_nothing_is_refused(weights: str) -> None:
    with pytest.raises(UserError, match=r"train\.loss\.s\w+: found .*; expected a number above 0"):
        overridden(f"train.loss={weights}")


def test_an_endpoints_name_for_a_model_is_its_own() -> None:
    endpoint = {"base_url": "https://host/v1"}
    assert ModelConfig.model_validate({"model": "~org/latest", "endpoint": endpoint}).model == "~org/latest"


def test_how_many_is_a_number_or_a_range() -> None:
    config = load_config(toy.RUN_FILE, ["writer.num_actors=[1, 4]", "serve.replicas=[0, 3]"])
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
