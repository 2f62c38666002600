"""What is evaluated: prompts and directives in turn, and the likelihood of the answers under the base policy."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.chat.conversations import token_ids
from cpt_ray.config import EvaluateConfig, RunConfig
from cpt_ray.engines.pool import LocalRunner
from cpt_ray.evaluation.perplexity import bare_rows, base_log_probs, trials_for_perplexity
from cpt_ray.evaluation.stage import rotated, trials_of
from cpt_ray.synthesis.pair_steps import no_engine
from cpt_ray.tables.records import Prompt, Trial
from cpt_ray.tables.rundir import RunDir
from tests.builders import LEVELS, make_directives, make_rubric
from tests.tiny_model import make_tiny_model

PROMPTS = [Prompt(prompt_id=f"p{at}", text=f"Write {at}.", split="held_out") for at in range(8)]


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 40))
def test_every_directive_is_used_equally_often_over_the_prompts(num_directives: int, count: int, prompts: int) -> None:
    directives = [directive for directive in make_directives() if directive.level == "low"][:num_directives]
    turns = [rotated(directives[::-1], count, turn) for turn in range(prompts)]
    names_of_turns = [[directive.directive_id for directive in chosen] for chosen in turns]
    uses = Counter(name for names in names_of_turns for name in names)
    assert all(len(set(names)) == len(names) == min(count, num_directives) for names in names_of_turns)
    assert max(uses.values()) - min(uses[directive.directive_id] for directive in directives) <= 1


def test_a_prompt_is_asked_under_held_out_and_trained_directives_and_none_at_every_level() -> None:
    directives = [*make_directives("held_out"), *make_directives("train")]
    for trained in (0, 2):
        settings = EvaluateConfig(directives=1, trained_directives=trained)
        rows = [
            row
            for turn, prompt in enumerate(PROMPTS)
            for row in trials_of(make_rubric(), prompt, directives, settings, turn)
        ]
        counts = Counter((row.level, row.directive is None, row.is_trained) for row in rows)
        expected = {(level, is_bare, False): len(PROMPTS) for level in LEVELS for is_bare in (False, True)}
        expected |= {(level, False, True): trained * len(PROMPTS) for level in LEVELS if trained}
        assert counts == expected
        assert all((row.directive_id == "") == (row.directive is None) for row in rows)


def answered(model: str, prompt: int, text: str) -> Trial:
    names = {"trial_id": f"t{prompt}", "prompt_id": f"p{prompt}", "rubric_id": "ornament", "level": "low"}
    return Trial(**names, model=model, prompt=f"Write {prompt}.", target=10.0, directive="Be grave.", text=text)


TEXTS = {("base", 0): "One day, in a town.", ("tuned", 0): "Rain.", ("base", 1): "Rain.", ("tuned", 1): "Rain."}


def test_the_base_policys_likelihood_of_an_answer_is_that_after_its_bare_prompt_without_an_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy, run, runner = make_tiny_model(tmp_path / "tiny"), RunDir(tmp_path / "run"), LocalRunner(no_engine)
    role: dict[str, Any] = {"model": str(policy)}
    train = {"micro_batch_size": 1, "dtype": "float32", "num_workers": 1}
    content = {
        "name": "t",
        "rubrics": ["r"],
        "prompts": {"source": "p"},
        "writer": role,
        "policy": role,
        "train": train,
    }
    config = RunConfig.model_validate(content)
    trials = [answered(model, prompt, text) for (model, prompt), text in TEXTS.items()]
    control = str(AutoTokenizer.from_pretrained(policy).eos_token)
    log_probs = base_log_probs(config, run, [*trials, answered("tuned", 2, f"Rain.{control}")], runner)
    assert "1 of 5 answers hold a control token" in capsys.readouterr().out
    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    for trial in trials:
        prompt = token_ids(tokenizer, [{"role": "user", "content": trial.prompt}])
        answer = tokenizer.encode(trial.text, add_special_tokens=False)
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        expected = logps[-len(answer) :].sum().item()
        assert log_probs[trial.model, trial.trial_id] == (pytest.approx(expected, abs=1e-4), len(answer))
    assert len(log_probs) == len(trials)
    assert run.read_json("ledger.json")["perplexity"]["rows_out"] == 3  # distinct (prompt, answer)
    shards = run.names("reference")
    assert base_log_probs(config, run, trials, runner) == log_probs
    assert run.names("reference") == shards


def test_likelihoods_are_of_the_same_requests_in_both_models_and_of_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cpt_ray.evaluation.perplexity.MAX_PERPLEXITY_ANSWERS", 2)
    trials = [answered(model, prompt, "Rain.") for model in ("base", "tuned") for prompt in (3, 2, 1)]
    others = [answered("base", 0, ""), dataclasses.replace(trials[0], trial_id="t00", is_trained=True)]
    others.append(dataclasses.replace(trials[0], trial_id="t01", directive=None))
    likely = trials_for_perplexity([*others, *trials])
    assert [(trial.model, trial.trial_id) for trial in likely] == [
        ("base", "t2"), ("base", "t1"), ("tuned", "t2"), ("tuned", "t1")
    ]  # fmt: skip


@given(st.lists(st.tuples(st.sampled_from([(1,), (2, 3)]), st.sampled_from([(4,), (5, 6), (7,)]))), st.integers(1, 3))
def test_each_distinct_answer_is_in_one_row_of_its_prompt(
    pairs: list[tuple[tuple[int, ...], tuple[int, ...]]], size: int
) -> None:
    rows = bare_rows(pairs, size)
    answers = [(tuple(row["prompt"]), tuple(answer)) for row in rows for answer in row["answers"]]
    assert sorted(answers) == sorted(set(pairs))
    assert all(1 <= len(row["answers"]) <= size for row in rows)
