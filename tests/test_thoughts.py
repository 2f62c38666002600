"""Where thoughts end: what stands before it is never an answer, and an answer loses nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpt_ray.chat.thoughts import NOT_ENDED, UNCLEAR, without_thoughts
from cpt_ray.engines.engine import Completion, completion_with

HARMONY = "<|channel|>analysis<|message|>The user wants rain.<|end|><|start|>assistant<|channel|>final<|message|>Rain."


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe user wants rain.\n</think>\n\nRain.",
        "<think>\n\n</think>\n\nRain.",
        "<think>one</think><think>two</think>Rain.",
        "<think>Shall I write `</think>`? No.</think>Rain.",
        "<think>The user wants rain.</think>\n<answer>\nRain.\n</answer>",
        "The user wants rain.\n</think>\n\nRain.",  # the chat template has opened the thoughts
        "The user wants rain.</think>Rain.",
        "</think>\n\nRain.",
        "<thinking>The user wants rain.</thinking> Rain.",
        "<seed:think>The user wants rain.</seed:think>Rain.",
        "<think:opensource>The user wants rain.</think:opensource>Rain.",
        "[THINK]The user wants rain.[/THINK]Rain.",
        "\u25c1think\u25b7The user wants rain.\u25c1/think\u25b7Rain.",
        "<|START_THINKING|>The user wants rain.<|END_THINKING|>Rain.",
        "<|channel>thought\nThe user wants rain.<channel|>Rain.",
        HARMONY,
        HARMONY + "<|return|>",
        "<|channel|>final<|message|>Rain.",
        "analysisThe user wants rain.assistantfinalRain.",
        "finalRain.",
    ],
)
def test_thoughts_are_cut_whatever_marks_a_model_puts_around_them(text: str) -> None:
    assert without_thoughts(text) == ("Rain.", True, "")


@pytest.mark.parametrize(
    "text",
    [
        "<think>\nThe user wants rain.",
        "<think>Shall I write `</think>`?",
        "[THINK]The user wants rain.",
        "analysisThe user wants rain.",
        "<|channel|>analysis<|message|>The user wants rain.<|end|>",
        "<think>one</think><think>two",
    ],
)
def test_thoughts_without_an_end_are_no_answer(text: str) -> None:
    assert without_thoughts(text) == ("", True, NOT_ENDED)


@pytest.mark.parametrize(
    "text",
    [
        "A real answer.\n\n<thought>\nHe wondered.\n</thought>\n\nHe opened the door.",
        "The first half. <think>Hm.</think>\nThe second half.",
        "Use this:\n<reasoning>\nwhy\n</reasoning>\n42",
    ],
)
def test_thoughts_behind_a_part_of_the_answer_are_rejected_not_cut(text: str) -> None:
    assert without_thoughts(text) == ("", True, UNCLEAR)


@pytest.mark.parametrize(
    "text",
    [
        "Write `</think>` behind them.",
        'It ends with "</think>".',
        "analysis of rain",
        "finally, rain",
        "I think: rain.",
    ],
)
def test_a_mark_that_is_only_mentioned_cuts_nothing(text: str) -> None:
    assert without_thoughts(text) == (text, False, "")


@pytest.mark.parametrize(
    "text",
    [
        "The </think> tag closes them.",
        "Rain <think>or snow?</think> falls.",
        "<think>one</think>two\n</think>\nRain.",
        HARMONY + "<|end|><|start|>assistant<|channel|>analysis<|message|>More?",
    ],
)
def test_where_thoughts_and_answer_cannot_be_told_apart_there_is_no_answer(text: str) -> None:
    answer, _, problem = without_thoughts(text)
    assert (answer, problem) == ("", UNCLEAR)


def test_a_prompt_that_opens_the_thoughts_leaves_no_answer_without_an_end_mark() -> None:
    assert without_thoughts("The user wants rain.", starts_in_thoughts=True) == ("", True, NOT_ENDED)
    assert without_thoughts("Is it </think> here? Rain.", starts_in_thoughts=True) == ("here? Rain.", True, "")


WORDS = st.text(
    st.characters(codec="utf-8", exclude_characters="<>[]|`'\"\u25c1\u25b7\u201c\u201d\u2018\u2019\u00ab\u00bb")
)


@given(WORDS, WORDS)
def test_any_answer_behind_any_thoughts_is_kept_whole(thoughts: str, words: str) -> None:
    answer = f"Rain {words}.".strip()
    assert without_thoughts(f"<think>{thoughts}</think>\n\n{answer}") == (answer, True, "")
    assert without_thoughts(f"{thoughts}</think>{answer}", starts_in_thoughts=True) == (answer, True, "")
    assert without_thoughts(answer) == (answer, False, "")


def test_thoughts_count_as_tokens_but_not_as_the_answers() -> None:
    counts = Completion(num_tokens=100)
    done = completion_with(counts, "<think>" + "x" * 67 + "</think>\n\nRain falls.   ", "stop", 200)
    assert (done.text, done.error, done.had_thoughts, done.num_tokens) == ("Rain falls.", "", True, 100)
    assert done.thought_tokens == round(100 * (1 - 11 / 98))
    known = Completion(num_tokens=100, thought_tokens=40)
    assert completion_with(known, "Rain falls.", "stop", 200).thought_tokens == 40
    plain = completion_with(counts, "Rain falls.", "stop", 200)
    assert (plain.had_thoughts, plain.thought_tokens) == (False, 0)


@pytest.mark.parametrize(
    ("text", "reason", "thoughts", "expected"),
    [
        ("Rain.", "stop", "", ("Rain.", "")),
        ("Rain.", "eos", "", ("Rain.", "")),
        ("Rain.", None, "", ("Rain.", "")),
        ("Rain fal", "length", "", ("Rain fal", "cut off")),
        ("<think>Rain fal", "length", "", ("", "cut off")),
        ("<think>a</think>Rain fal", "length", "", ("Rain fal", "cut off")),
        ("", "length", "Rain fal", ("", "cut off")),
        ("<think>Rain.", "stop", "", ("", NOT_ENDED)),
        ("", "stop", "Rain.", ("", NOT_ENDED)),
        ("<think>a</think>", "stop", "", ("", "empty answer")),
        (" \u200b\n", "stop", "", ("", "empty answer")),
        ("I can", "content_filter", "", ("", "filtered")),
        ("Rain.", "tool_calls", "", ("", "tool call")),
        ("Rain.", "function_call", "", ("", "tool call")),
        ("Rain.", "abort", "", ("", "ended by abort")),
        ("Rain.", "repetition", "", ("", "ended by repetition")),
        ("Rain.", "in\nsane", "", ("", "ended by in sane")),
    ],
)
def test_only_a_finished_answer_is_one(text: str, reason: str | None, thoughts: str, expected: tuple[str, str]) -> None:
    done = completion_with(Completion(), text, reason, 9, thoughts)
    assert (done.text, done.error) == expected
    assert bool(done.detail) == bool(done.error)
