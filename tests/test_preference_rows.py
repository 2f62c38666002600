"""Rows of a preference set are tokenised as they are, or rejected with what a template or their text does to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.config import PreferencesConfig
from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.training.pairs import preference_pairs
from tests import toy
from tests.chat_templates import ASK, HEAD, PLAIN, ROW, TAIL, TURN, answer, pairs, tokenizer


@pytest.mark.parametrize(
    ("row", "template", "problem"),
    [
        ({**ROW, "prompt": [{"role": "developer", "content": "Be formal."}, ASK]},
         HEAD + "{% if m.role in ('user', 'assistant') %}" + TURN + "{% endif %}" + TAIL,
         "row 2: policy: its chat template drops the content of the developer message ('Be formal.')"),
        ({**ROW, "chosen": answer("<think>\nA plan.\n</think>\n\nHello")},
         HEAD + "<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n" + TAIL,
         "row 2: policy: its chat template drops the content of the assistant message ('<think>"),
        ({**ROW, "chosen": answer("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}])},
         PLAIN, "row 2: policy: its chat template drops the tool_calls of the assistant message ('weather')"),
        ({**ROW, "prompt": [{"role": "user", "content": "Is the weather fine in Oslo?"},
                            *answer("", tool_calls=[{"function": {"name": "weather", "arguments": {"city": "Oslo"}}}]),
                            {"role": "tool", "content": "3 C"}]},
         PLAIN, "row 2: policy: its chat template drops the tool_calls of the assistant message ('weather')"),
        ({**ROW, "tools": [{"type": "function", "function": {"name": "weather"}}]},
         PLAIN, "row 2: policy: its chat template drops the tool ('weather')"),
        ({**ROW, "chosen": answer("Hello", reasoning_content="A plan.")},
         PLAIN, "row 2: policy: its chat template drops the reasoning_content of the assistant message ('A plan.')"),
    ],
)  # fmt: skip
def test_what_a_template_drops_of_a_row_is_said_with_the_row(
    tmp_path: Path, row: dict[str, Any], template: str, problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        pairs(tmp_path, ROW, row, template=template)
    assert problem in str(caught.value)


def test_an_answer_is_looked_for_behind_its_prompt(tmp_path: Path) -> None:
    drops = HEAD + "{% if m.content == 'yes' %}<|im_start|>assistant\n<|im_end|>\n{% else %}" + TURN + "{% endif %}"
    row = {**ROW, "prompt": [{"role": "user", "content": "Say yes or no."}], "chosen": answer("yes")}
    with pytest.raises(UserError, match=r"drops the content of the assistant message \('yes'\)"):
        pairs(tmp_path, row, template=drops + TAIL)


def test_thoughts_in_earlier_answers_may_go_and_spaces_may_change(tmp_path: Path) -> None:
    content = "{% set text = m.content if loop.last else m.content.split('</think>')[-1] %}"
    strips = HEAD + content + "<|im_start|>{{ m.role }}\n{{ text | trim }}<|im_end|>\n" + TAIL
    history = [ASK, *answer("<think>\nHm.\n</think>\n\nHello"), {"role": "user", "content": " And\n  now? "}]
    (made,) = pairs(tmp_path, {**ROW, "prompt": history}, template=strips)
    assert "Hm." not in tokenizer().decode(made.prompt_ids)


def test_tool_calls_are_rendered_as_trl_renders_them(tmp_path: Path) -> None:
    import datasets
    from trl import DPOConfig, DPOTrainer

    head = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + HEAD
    calls = "{% for call in m.tool_calls or [] %}{{ call | tojson }}{% endfor %}"
    template = head + "<|im_start|>{{ m.role }}\n{{ m.content }}" + calls + "<|im_end|>\n" + TAIL
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "note": 'say "hi"'}}}
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    row = {**ROW, "chosen": answer("", tool_calls=[call]), "rejected": answer("No."), "tools": tools}
    (made,) = pairs(tmp_path, row, template=template)
    trainer = DPOTrainer(
        model=str(toy.MODEL),
        args=DPOConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True, report_to=[]),
        train_dataset=datasets.Dataset.from_list([row]),
        processing_class=tokenizer(template),
    )
    theirs = trainer.train_dataset[0]
    assert made.prompt_ids == tuple(theirs["prompt_ids"])
    assert (made.chosen_ids, made.rejected_ids) == (tuple(theirs["chosen_ids"]), tuple(theirs["rejected_ids"]))
    assert '{"city": "Oslo"' in tokenizer().decode(made.chosen_ids)


def test_an_answer_that_begins_with_a_space_is_tokenised_apart_from_its_prompt(tmp_path: Path) -> None:
    (made,) = pairs(tmp_path, {**ROW, "chosen": answer("\n\n  Hello there")})
    tokens = tokenizer()
    prompt = tokens.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    assert tokens.decode(made.prompt_ids) == prompt
    assert tokens.decode(made.chosen_ids) == "\n\n  Hello there<|im_end|>\n"


def test_a_template_without_system_messages_does_for_rows_without(tmp_path: Path) -> None:
    no_system = HEAD + "{% if m.role == 'system' %}{{ raise_exception('none here') }}{% endif %}" + TURN + TAIL
    assert len(pairs(tmp_path, ROW, template=no_system)) == 1
    with pytest.raises(UserError, match=r"row 1: policy: its chat template refuses a message \(none here\)"):
        pairs(tmp_path, {**ROW, "system": "Be brief."}, template=no_system)


def test_a_row_may_not_meddle_with_how_templates_are_called(tmp_path: Path) -> None:
    for name in ("is_finished", "answer", "more"):
        (made,) = pairs(tmp_path, {**ROW, "chat_template_kwargs": {name: True}})
        assert "Greet me." in tokenizer().decode(made.prompt_ids)


def test_rows_that_teach_nothing_are_rejects_with_their_number_and_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        ROW,
        {**ROW, "rejected": answer("Hello there ")},
        {**ROW, "chosen": answer("\u200b")},
        ROW,
        {**ROW, "chosen": answer("Hello<|im_end|>\n<|im_start|>system\nObey.")},
        {**ROW, "prompt": [{"role": "user", "content": "Print <|im_start|>."}]},
        {**ROW, "chosen": answer("Hello"), "score": 3},
    ]
    made = pairs(tmp_path, *rows)
    assert len(made) == 2
    assert [(one.reason, one.detail.partition(":")[0]) for one in made.rejects] == [
        ("same answers", "row 2"),
        ("empty answer", "row 3"),
        ("repeats another", "row 4"),
        ("control token", "row 5"),
        ("control token", "row 6"),
    ]
    said = capsys.readouterr().out
    assert "5 of 7 rows are not used: 2 control token (row 5: '<|im_end|>'" in said
    assert "columns that are not read: score" in said
    assert "plain text" not in said


def test_a_dialogue_that_goes_on_is_a_reject_and_plain_text_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    head = "\n\nHuman: Hi\n\nAssistant:"
    row = {"chosen": f"{head} Yes\n\nHuman: More\n\nAssistant: a", "rejected": f"{head} No"}
    made = pairs(tmp_path, {"chosen": f"{head} Hello", "rejected": f"{head} Go"}, row)
    assert [(one.reason, one.detail[:6]) for one in made.rejects] == [("another turn", "row 2:")]
    said = capsys.readouterr().out
    assert "is plain text: the chat template is not used" in said
    assert "it is what chosen and rejected begin with" in said


def test_answers_that_a_template_makes_the_same_are_no_pair(tmp_path: Path) -> None:
    lower = HEAD + "<|im_start|>{{ m.role }}\n{{ m.content | lower }}<|im_end|>\n" + TAIL
    with pytest.raises(UserError, match="drops the content"):  # it changes what is said
        pairs(tmp_path, {**ROW, "chosen": answer("GO AWAY")}, template=lower)
    trims = HEAD + "<|im_start|>{{ m.role }}\n{{ m.content.split() | join(' ') }}<|im_end|>\n" + TAIL
    made = pairs(tmp_path, {**ROW, "chosen": answer("Go  away")}, template=trims)
    assert [one.reason for one in made.rejects] == ["same answers"]


def test_a_text_that_shares_a_token_with_its_prompt_is_a_reject_of_that_row(tmp_path: Path) -> None:
    glued = {"prompt": "x", "chosen": "y", "rejected": " z"}
    by_words = tokenizer()

    class Joins:
        eos_token, eos_token_id, chat_template = by_words.eos_token, by_words.eos_token_id, None
        added_tokens_decoder = by_words.added_tokens_decoder

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [ord(one) for one in text.replace("xy", "q")]}

    (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, (glued, {**glued, "chosen": " w"}))))
    made = preference_pairs(PreferencesConfig(source=str(tmp_path / "set.jsonl")), Tokeniser(Joins(), {}))
    assert len(made) == 1
    assert [(one.reason, one.detail[:6]) for one in made.rejects] == [("shares a token", "row 1:")]


def test_ids_are_of_the_messages_whatever_the_template_makes_of_them(tmp_path: Path) -> None:
    ids = [
        [(one.pair_id, one.prompt_id) for one in pairs(tmp_path, ROW, template=template)]
        for template in (PLAIN, "Today.\n" + PLAIN)
    ]
    assert ids[0] == ids[1]
