"""Preference data of others: each layout becomes the same three things, and what could be misread is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.config import PreferencesConfig
from cpt_ray.errors import UserError
from cpt_ray.prompts import read_rows
from cpt_ray.texts import is_blank, lone_surrogate
from cpt_ray.training.comparisons import read_comparisons, unread_fields
from cpt_ray.training.messages import is_empty_answer, same_answers

Row = dict[str, Any]
ASK = {"role": "user", "content": "What is 2+2?"}
BE_BRIEF = {"role": "system", "content": "Be brief."}
FOUR, FIVE = ({"role": "assistant", "content": text} for text in ("4", "5"))
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def read(*rows: Row) -> list[Any]:
    return [(one.prompt, one.chosen, one.rejected) for one in read_comparisons(rows, "set")]


def problem(*rows: Row) -> str:
    with pytest.raises(UserError) as caught:
        read_comparisons(rows, "set")
    return str(caught.value)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]},  # TRL, conversational
        {"chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},  # TRL, implicit prompt
        {"prompt": "What is 2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "messages": [ASK, FOUR]},
        {"id": "a", "source": "mix", "prompt": "What is 2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},  # Tulu
        {"source": "s", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE], "conversation": [{"input": "What is 2+2?"}]},
        {"system": "", "question": "What is 2+2?", "chosen": "4", "rejected": "5"},  # Orca
        {"system": None, "input": "What is 2+2?", "chosen": "4", "rejected": "5", "order": ["a", "b"], "model": "m"},
        {"prompt": "What is 2+2?", "chosen": [FOUR], "rejected": [FIVE]},
        {"prompt": [ASK], "chosen": "4", "rejected": "5"},
        {"prompt": json.dumps([ASK]), "chosen": json.dumps([FOUR]), "rejected": json.dumps([FIVE])},  # as in a CSV file
        {"prompt": [{**ASK, "tool_calls": None}], "chosen": [{**FOUR, "name": None}], "rejected": [FIVE]},  # parquet
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "What is 2+2?"}]}], "chosen": [FOUR],
         "rejected": [FIVE]},
    ],
)  # fmt: skip
def test_every_layout_of_messages_is_read_as_the_same_comparison(row: Row) -> None:
    assert read(row) == [([ASK], [FOUR], [FIVE])]


@pytest.mark.parametrize(
    "row",
    [
        {"system": "Be brief.", "question": "What is 2+2?", "chosen": "4", "rejected": "5"},
        {"system": "Be brief.", "prompt": "What is 2+2?", "chosen": "4", "rejected": "5"},
        {"system_prompt": "Be brief.", "prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]},
        {"system": "Be brief.", "prompt": [BE_BRIEF, ASK], "chosen": [FOUR], "rejected": [FIVE]},
        {"system": "Be brief.", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        {"chosen": [BE_BRIEF, ASK, FOUR], "rejected": [BE_BRIEF, ASK, FIVE]},
    ],
)
def test_a_system_column_is_the_system_message(row: Row) -> None:
    assert read(row) == [([BE_BRIEF, ASK], [FOUR], [FIVE])]


def test_a_set_with_a_system_column_is_read_as_messages_in_every_row() -> None:
    rows = [
        {"prompt": "What is 2+2?", "chosen": "4", "rejected": "5"},
        {"system": "Be brief.", "prompt": "What is 2+2?", "chosen": "4", "rejected": "5"},
    ]
    assert [prompt for prompt, _, _ in read(*rows)] == [[ASK], [BE_BRIEF, ASK]]


def test_plain_text_stays_plain_text() -> None:
    assert read({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}) == [
        ("The sky is", " blue.", " green.")
    ]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is green.", "The sky is"),
        ("The sky is blue.", "The sky is black.", "The sky is"),  # not in the middle of a word
        ("The sky", "The sky is blue", "The sky"),
        ("The sky is blue", "The sky", "The sky"),
        ("The sky", "The skyline", "The"),
        ("\n\nHuman: Hi\n\nAssistant: Hello", "\n\nHuman: Hi\n\nAssistant: Go", "\n\nHuman: Hi\n\nAssistant:"),
        ("今天天气很好", "今天天气不好", "今天天气"),  # no spaces to go back to
    ],
)
def test_texts_without_a_prompt_have_one_in_their_common_beginning(chosen: str, rejected: str, prompt: str) -> None:
    ((found, one, other),) = read({"chosen": chosen, "rejected": rejected})
    assert (found, found + one, found + other) == (prompt, chosen, rejected)


@given(st.text(alphabet="ab \n"), st.text(alphabet="ab \n"), st.text(alphabet="ab \n"))
def test_a_common_beginning_loses_no_character_of_either_text(common: str, one: str, other: str) -> None:
    try:
        ((prompt, chosen, rejected),) = read({"chosen": common + one, "rejected": common + other})
    except UserError as error:
        assert "an empty prompt" in str(error)
    else:
        assert (prompt + chosen, prompt + rejected) == (common + one, common + other)


def test_rows_of_one_dialogue_have_one_name_wherever_their_answers_part() -> None:
    head = "\n\nHuman: Hi\n\nAssistant:"
    rows = [
        {"chosen": head + chosen, "rejected": head + rejected}
        for chosen, rejected in ((" Hello there", " Hello you"), (" Good day", " Go"))
    ]
    assert [one.dialogue for one in read_comparisons(rows, "set")] == [head, head]


def test_tools_and_tool_calls_are_kept_whole() -> None:
    calling = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    as_text = {**CALL, "function": {**CALL["function"], "arguments": '{"city": "Bergen"}'}}
    row = {
        "prompt": [ASK, {**calling, "content": ""}, {"role": "tool", "name": "weather", "content": "3 C"}, ASK],
        "chosen": [calling],
        "rejected": [{**calling, "tool_calls": [as_text]}],
        "tools": json.dumps([TOOL]),
        "chat_template_kwargs": {"enable_thinking": False, "date_string": None},
    }
    (comparison,) = read_comparisons([row], "set")
    assert comparison.chosen == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert comparison.rejected[0]["tool_calls"][0]["function"]["arguments"] == {"city": "Bergen"}
    assert comparison.prompt[2]["name"] == "weather"
    assert comparison.template == {"tools": [TOOL], "enable_thinking": False}
    assert not is_empty_answer(comparison.chosen)
    assert not same_answers(comparison.chosen, comparison.rejected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "a", "answer": "b"}, "no column 'chosen' among 'question', 'answer'; expected TRL's"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "rejected: nothing is there (null)"),
        ({"prompt": "a", "chosen": 4, "rejected": "5"}, "chosen: found a number; expected"),
        ({"prompt": "a", "chosen": "b", "rejected": [FIVE]}, "one is text, the other is messages"),
        ({"prompt": [{"role": "user"}], "chosen": [FOUR], "rejected": [FIVE]}, "prompt[0]: found role; expected a"),
        ({"prompt": [], "chosen": [FOUR], "rejected": [FIVE]}, "an empty prompt"),
        ({"prompt": " \u200b", "chosen": "a", "rejected": "b"}, "prompt is empty"),
        ({"prompt": None, "chosen": "The gate was red.", "rejected": "The gate was big."}, "prompt is empty"),
        ({"system": "Be brief.", "question": "", "chosen": "a", "rejected": "b"}, "question is empty"),
        ({"prompt": "What is two and two?", "chosen": "What is two and two? 4", "rejected": "What is two and two?\n5"},
         "chosen and rejected repeat the prompt"),
        ({" chosen": "a", "rejected": "b"}, "no column 'chosen' (is it ' chosen'? rename that column)"),
        ({"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE], "chat_template_kwargs": {"tokenize": True}},
         "chat_template_kwargs: tokenize is not for a row to set"),
        ({"prompt": [{"role": "user", "content": ""}], "chosen": [FOUR], "rejected": [FIVE]}, "an empty prompt"),
        ({"chosen": "Paris is it ", "rejected": "London calling"}, "an empty prompt: there is no column `prompt`"),
        ({"chosen": [FOUR], "rejected": [FIVE]}, "an empty prompt"),
        ({"instruction": "Add.", "chosen": "4", "rejected": "5"}, "no prompt, and 'instruction' beside"),
        ({"context": "Sums.", "prompt": "2+2?", "chosen": "4", "rejected": "5"}, "column 'context' stands beside"),
        ({"images": ["x"], "prompt": "2+2?", "chosen": "4", "rejected": "5"}, "column 'images': only text"),
        ({"system": "Be long.", "prompt": [BE_BRIEF, ASK], "chosen": [FOUR], "rejected": [FIVE]}, "message differ"),
        ({"prompt": "Hi", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}, "prompt is 'Hi', but chosen and reject"),
        ({"prompt": [ASK], "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]}, "chosen repeats the prompt"),
        ({"prompt": [ASK], "chosen": [FOUR], "rejected": [ASK]}, "rejected repeats the prompt"),
        ({"prompt": [BE_BRIEF], "chosen": [FOUR], "rejected": [ASK]}, "rejected begins with a user message"),
        ({"prompt": [ASK], "chosen": [FOUR, ASK, FIVE], "rejected": [FIVE]}, "chosen has a user message"),
        ({"prompt": [ASK, FOUR], "chosen": [FOUR], "rejected": [FIVE]}, "prompt ends with an assistant message"),
        ({"prompt": [{"role": "human", "content": "a"}], "chosen": [FOUR], "rejected": [FIVE]}, "role: found 'human'"),
        ({"prompt": [{"from": "human", "value": "a"}], "chosen": [FOUR], "rejected": [FIVE]}, "found from, value"),
        ({"prompt": [ASK], "chosen": [FOUR], "rejected": [{**FOUR, "content": None}]}, "rejected[0].content: nothing"),
        ({"prompt": [ASK], "chosen": [{**FOUR, "content": [{"type": "image_url"}]}], "rejected": [FIVE]},
         "chosen[0].content: found a list; expected a text"),
        ({"prompt": [ASK], "chosen": "[{'role': 'assistant', 'content': '4'}]", "rejected": "5"}, "as Python prints"),
        ({"prompt": [ASK], "chosen": "[{'role': 'assistant',\n  'content'", "rejected": "5"}, "begins like messages"),
        ({"prompt": "Hi \ud83d", "chosen": "a", "rejected": "b"}, "prompt: half a character (\\ud83d)"),
        ({"prompt": "Hi", "chosen": json.dumps([{**FOUR, "content": "\ud83d"}]), "rejected": "[]"}, "one is text"),
        ({"prompt": [ASK], "chosen": json.dumps([{**FOUR, "content": "\ud83d"}]), "rejected": [FIVE]},
         "chosen: half a character"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}, "tools: only messages are rendered with it"),
        ({"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE], "tools": "weather"}, "tools: a text that is not JSON"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_read_is_refused_by_number_and_column(row: Row, expected: str) -> None:
    good = {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}
    assert problem(good, row).startswith("set: row 2: ")
    assert expected in problem(good, row)


def test_text_and_messages_are_not_mixed_in_one_set() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}]
    assert "row 2: messages, but row 1 has plain text" in problem(*rows)
    assert "row 2: plain text, but row 1 has messages" in problem(*rows[::-1])


@pytest.mark.parametrize("text", ["", " \n", "\u200b\ufeff", "\u00ad", "\u2800\u3164", "\ufe0f", "\u2066\u2069"])
def test_what_nobody_can_see_is_an_empty_answer(text: str) -> None:
    assert is_blank(text)
    assert is_empty_answer(text)
    assert is_empty_answer([{"role": "assistant", "content": text}])


@given(st.text(min_size=1))
def test_only_half_characters_are_found_and_what_utf8_takes_is_not(text: str) -> None:
    escape = lone_surrogate({"a": [text]})
    assert bool(escape) == any("\ud800" <= character <= "\udfff" for character in text)
    assert lone_surrogate({text + "\udfff": 1}) != ""


def test_answers_that_look_the_same_are_the_same() -> None:
    assert same_answers("caf\u00e9 ", "cafe\u0301")
    assert same_answers([FOUR], [{**FOUR, "content": " 4"}])
    assert not same_answers([FOUR], [FIVE])


def test_a_file_without_rows_is_said() -> None:
    assert problem() == "set: there are no rows in it"


def test_fields_of_messages_that_templates_do_not_read_are_named() -> None:
    row = {"prompt": [ASK], "chosen": [{**FOUR, "weight": 0, "name": "Bob"}], "rejected": [FIVE]}
    assert unread_fields(read_comparisons([row], "set")) == ["weight"]


# ---------------------------------------------------------------- files


def rows_of(path: Path, content: str | bytes) -> list[Row]:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(read_rows(PreferencesConfig(source=str(path))))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "prompt\nrain, wind\n", r"a.csv:2: 2 fields, but the header has 1"),
        ("a.csv", "prompt,chosen\na,b\nc\n", r"a.csv:3: 1 fields, but the header has 2"),
        ("a.csv", 'prompt,chosen\na,"b\nc,d\n', r"a.csv:2: a quote is not closed"),
        ("a.csv", 'prompt\n"Hold" fast\n', r"a.csv:2: a quote is not closed, or not in its place"),
        ("a.csv", "prompt,prompt\na,b\n", r"a.csv:1: two columns are called 'prompt'"),
        ("a.csv", "prompt;chosen;rejected\n", r"a.csv:1: fields seem to be divided by ';'"),
        ("a.CSV", "prompt\na,b\n", r"a.CSV:2: 2 fields, but the header has 1"),
        ("a.csv", b"prompt\n\xff\n", r"a.csv: byte 7 is not UTF-8"),
        (
            "a.jsonl",
            '{"prompt": "a", "prompt": "b"}\n',
            r"a.jsonl:1: prompt: appears twice in one object",
        ),
        ("a.jsonl", b"\xff", r"a.jsonl: byte 0 is not UTF-8"),
        ("a.parquet", "PAR1 not really", r"a.parquet: cannot be read as a parquet file"),
        ("a.parquet", b"PAR1" + b"\x00" * 40 + b"PAR1", r"a.parquet: cannot be read as a parquet file"),
    ],
)
def test_a_file_whose_rows_would_be_cut_or_swallowed_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, expected: str
) -> None:
    with pytest.raises(UserError, match=expected):
        rows_of(tmp_path / name, content)


def test_long_fields_lines_in_quotes_and_byte_order_marks_are_read(tmp_path: Path) -> None:
    long = "word " * 50_000
    assert rows_of(tmp_path / "a.csv", f'\ufeffprompt,chosen\n"a\nb, ""c""",{long}\n\n') == [
        {"prompt": 'a\nb, "c"', "chosen": long}
    ]
    assert rows_of(tmp_path / "a.jsonl", '\ufeff{"prompt": "a"}\n') == [{"prompt": "a"}]
