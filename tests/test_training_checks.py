"""What a training is checked for before it starts and at each step, and which pairs it takes; none of it needs Ray."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.training.pairs import own_pairs, select_pairs
from cpt_ray.training.stage import train, training_notes
from cpt_ray.training.steps import rate_share
from cpt_ray.training.worker import check_finite, check_first_loss
from tests.builders import make_rubric
from tests.tiny_model import make_tiny_model
from tests.trainings import make_config, make_run, make_tokens, make_twins


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("policy") / "tiny")


@contextmanager
def no_ray() -> Iterator[None]:
    raise RuntimeError("no Ray here")
    yield


@pytest.mark.parametrize(
    ("logs", "problem"),
    [
        ({"loss": math.nan, "grad_norm": 1.0}, r"step 1: the loss is not a finite number \(nan\): the policy itself"),
        (
            {"loss": 0.6, "grad_norm": math.inf},
            r"step 1: the gradient is not a finite number \(inf\): training",
        ),
        ({"eval_kl": math.nan, "eval_loss": 0.6}, r"step 1: kl held out is not a finite number"),
        ({"loss": 0.6, "grad_norm": 1e9, "epoch": 1.0}, None),
    ],
)
def test_the_first_number_that_is_not_finite_ends_a_training(logs: dict[str, float], problem: str | None) -> None:
    with pytest.raises(UserError, match=problem) if problem else nullcontext():
        check_finite(1, logs)


def test_what_went_far_or_was_rounded_away_is_noted() -> None:
    fine = {"held_out": [{"kl": 0.4, "drift": -0.1}], "first_loss": 0.693, "last_loss": 0.4, "kept_share": 0.97}
    fine |= {"dtype": "bfloat16", "unchanged": 0, "trained": 14}
    assert training_notes(fine) == []
    (far,) = training_notes(fine | {"held_out": [{"kl": 10.2, "drift": 0.1}]})
    assert "kl 10.2 nats per token" in far
    assert "lower train.learning_rate" in far
    unmeasured, risen = training_notes(fine | {"last_loss": 2.0, "held_out": []})
    assert "no pair is held out" in unmeasured
    assert "the loss rose from 0.693 to 2.000" in risen
    (rounded,) = training_notes(fine | {"kept_share": 0.5, "unchanged": 3})
    assert "bfloat16 keeps 50% of what was learned (3 of 14 tensors are the policy's own)" in rounded


def test_a_token_without_an_embedding_is_named(policy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(policy, tmp_path / "policy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 100}))
    with pytest.raises(UserError, match=r"its tokenizer gives token \d+, but the model has embeddings for 100 tokens"):
        train(make_config(folder), make_run(tmp_path / "run"), ["a-0"], "key")


def test_the_first_step_has_a_rate_and_so_has_the_last() -> None:
    for num_steps in range(1, 40):
        for num_warmup in range(num_steps):
            shares = [rate_share(step, num_steps, num_warmup) for step in range(num_steps)]
            assert min(shares) > 0
            assert max(shares) == 1
            assert shares[:num_warmup] == [(step + 1) / num_warmup for step in range(num_warmup)]


@pytest.mark.parametrize("template_kwargs", [{}, {"shout": True}])
def test_trl_would_train_on_the_same_token_ids(policy: Path, tmp_path: Path, template_kwargs: dict[str, Any]) -> None:
    import datasets
    from transformers import AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    pairs, tokenizer = make_twins("the town"), AutoTokenizer.from_pretrained(policy)
    names = ("prompt", "chosen", "rejected")
    rows = [
        {name: [{"role": m.role, "content": m.content} for m in getattr(one, name)] for name in names} for one in pairs
    ]
    trainer = DPOTrainer(
        model=str(policy),
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[]),
        train_dataset=datasets.Dataset.from_list([one | {"chat_template_kwargs": template_kwargs} for one in rows])
        if template_kwargs
        else datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    for pair, row in zip(own_pairs(pairs, Tokeniser(tokenizer, template_kwargs)), trainer.train_dataset, strict=True):
        assert pair.prompt_ids == tuple(row["prompt_ids"])
        assert (pair.chosen_ids, pair.rejected_ids) == (tuple(row["chosen_ids"]), tuple(row["rejected_ids"]))


HEAD = "{% for m in messages %}"
TAIL = "{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "no chat template"),
        (
            HEAD + "{% if m.role != 'system' %}<{{ m.role[0] }}>{{ m.content }}{% endif %}" + TAIL,
            "drops the content of the system",
        ),
        (
            HEAD + "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TAIL,
            "refuses a message",
        ),
        (HEAD + "<{{ m.role[0] }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}", "once"),
    ],
)
def test_a_template_that_would_lose_the_directive_is_refused(
    tmp_path: Path, policy: Path, template: str | None, problem: str
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = template
    (tmp_path / "policy").mkdir()
    (tmp_path / "policy" / "config.json").write_text((policy / "config.json").read_text())
    tokenizer.save_pretrained(tmp_path / "policy")
    with pytest.raises(UserError, match=problem):
        train(make_config(tmp_path / "policy"), make_run(tmp_path / "run"), ["a-0"], "key")


def test_a_pairs_table_of_another_schema_is_named_with_its_columns(policy: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = make_run(tmp_path)
    pq.write_table(pa.table({"question": ["?"]}), run.shard("pairs", "a-0"))
    with pytest.raises(UserError, match=r"a-0.parquet: columns question are not those of Pair \(pair_id, "):
        train(make_config(policy), run, ["a-0"], "key")


def test_twins_stay_together_whichever_of_them_is_too_long() -> None:
    long = make_tokens("a", (7, 5, 4))[0]
    pairs = [long, make_tokens("a")[1], *make_tokens("b")]
    kept, _, rejects = select_pairs(pairs, max_length=11, max_pairs=None, held_out=0, seed=0)
    assert kept == pairs[2:]
    assert [one.detail for one in rejects] == [
        "7 prompt + 5 answer tokens, 11 fit",
        "5 prompt + 5 answer tokens, 11 fit; its twin has 12",
    ]


def test_max_pairs_takes_whole_twins_by_hash_whatever_the_order() -> None:
    pairs = [pair for at in range(20) for pair in make_tokens(str(at))]
    kept, _, rejects = select_pairs(pairs, max_length=10, max_pairs=11, held_out=0, seed=0)
    again, _, _ = select_pairs(pairs[::-1], max_length=10, max_pairs=11, held_out=0, seed=0)
    other, _, _ = select_pairs(pairs, max_length=10, max_pairs=11, held_out=0, seed=1)
    assert len(kept) == 10
    assert {one.pair_id for one in kept} == {one.twin_id for one in kept} == {one.pair_id for one in again}
    assert {one.pair_id for one in kept} != {one.pair_id for one in other}
    assert {one.reason for one in rejects} == {"over max_pairs"}
    assert len(rejects) == 30


def test_held_out_are_whole_prompts_a_tenth_at_most_and_every_pair_is_somewhere() -> None:
    pairs = [pair for at in range(50) for pair in make_tokens(str(at))]
    kept, held, rejects = select_pairs(pairs, max_length=10, max_pairs=80, held_out=200, seed=0)
    assert (len(kept), len(held), len(rejects)) == (80, 10, 10)
    assert not {one.prompt_id for one in kept} & {one.prompt_id for one in held}


def test_what_of_the_pairs_is_trained_on_is_said_before_the_training(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    run.write("pairs", "c-0", [replace(pair, rejected_level="mid") for pair in make_twins("a lake")])
    config = make_config(policy, contrast="ends", held_out=60)
    with pytest.raises(RuntimeError, match="no Ray here"):
        train(config, run, ["a-0", "b-0", "c-0"], "key", no_ray(), [make_rubric()])
    said = "train        84 pairs, 8 held out (train.held_out is 60; at most a tenth, of whole prompts)"
    printed = capsys.readouterr().out
    assert f"{said}; 2 with a middle level are left out (train.contrast: ends)\n" in printed
    assert "2 too long" in printed


def test_a_reference_that_is_not_the_policy_is_an_error_in_float32() -> None:
    check_first_loss(math.log(2) + 1e-6, make_config(Path("x")).train)
    with pytest.raises(RuntimeError, match="not ln 2"):
        check_first_loss(0.7, make_config(Path("x")).train)
