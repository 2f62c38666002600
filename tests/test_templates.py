"""What a chat template drops, adds or ends with no stop is said before anything is trained or asked."""

from __future__ import annotations

import itertools
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.chat.conversations import token_ids
from cpt_ray.chat.templates import ChatTemplate, control_tokens, find_control_token, own_stop_tokens, stop_tokens
from cpt_ray.cli import main
from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.tables.records import Message, Pair
from cpt_ray.training.pairs import TokenPairs, own_pairs
from tests import toy
from tests.chat_templates import ASK, HEAD, PLAIN, TAIL, TURN, tokenizer
from tests.tiny_model import SENTENCES
from tests.toy.make import train_tokenizer


def notes(template: Any, **arguments: Any) -> list[str]:
    made = tokenizer(template)
    return ChatTemplate(made, arguments).check(own_stop_tokens(made))


@pytest.mark.parametrize("tokenise", ["answer", "begun", "text", "text_ids", "prompt", "token_ids"])
def test_a_text_that_is_too_long_brings_no_warning_of_indexing_errors(
    tokenise: str, caplog: pytest.LogCaptureFixture
) -> None:
    made, long = tokenizer(), "sea " * 2000  # it is rejected and counted, which is enough
    messages, answer = [{"role": "user", "content": long}], {"role": "assistant", "content": long}
    ids = {
        "answer": lambda: Tokeniser(made, {}).answer(messages, [answer]),
        "begun": lambda: Tokeniser(made, {}).begun(messages, answer),
        "text": lambda: Tokeniser(made, {}).text("Say it.\n", long)[1],
        "text_ids": lambda: Tokeniser(made, {}).text_ids(long),
        "prompt": lambda: Tokeniser(made, {}).prompt(messages),
        "token_ids": lambda: token_ids(made, messages),
    }
    caplog.set_level(logging.WARNING, "transformers")  # other tests in this process may have made it quiet
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(ids[tokenise]()) > made.model_max_length
        assert "indexing errors" not in caplog.text
        made(long)
        assert "indexing errors" in caplog.text  # as it is without our arguments
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)


# ---------------------------------------------------------------- the check


def test_a_template_that_keeps_and_ends_everything_has_nothing_to_note() -> None:
    assert notes(PLAIN) == []


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (None, "no chat template"),
        ({"tool_use": PLAIN}, "refuses a message .*multiple chat templates"),
        (HEAD + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + TAIL, "drops the content of the system message"),
        (HEAD + "{% if m.role != 'user' %}" + TURN + "{% endif %}" + TAIL, "drops the content of the user message"),
        (HEAD + "{% if m.role != 'assistant' %}" + TURN + "{% endif %}" + TAIL, "drops the content of the assistant"),
        (HEAD + "{{ raise_exception('no system role') }}" + TAIL, r"refuses a message \(no system role\)"),
        (HEAD + "{{ m.content + 1 }}" + TAIL, "refuses a message"),
        ("\n{{ m['role' }}", r"its chat template is broken \(line 2: .*mend chat_template.jinja"),
        ("{{ m.content | nofilter }}", "its chat template is broken"),
        (HEAD + "#{{ m.role }}:\n{{ m.content }}\n\n{% endfor %}{% if add_generation_prompt %}#assistant:\n{% endif %}",
         r"ends an answer with '.*', but the model stops at '<\|im_end\|>'"),
        (HEAD + TURN + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}",
         "renders a prompt differently once it is answered"),
    ],
)  # fmt: skip
def test_a_template_that_loses_something_is_refused(template: Any, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        notes(template)


def test_what_a_template_adds_is_said() -> None:
    default = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are Bob.<|im_end|>\n{% endif %}" + PLAIN
    assert notes(default) == [
        "policy: its chat template adds text of its own where there is no system message: 'You are Bob.'"
    ]
    assert notes("Knowledge cutoff: 2023.\n" + PLAIN) == [
        "policy: its chat template adds text of its own: 'Knowledge cutoff: 2023.'"
    ]


def test_a_template_without_a_generation_prompt_is_said() -> None:
    (note,) = notes(HEAD + TURN + "{% endfor %}")
    assert "puts '<|im_start|>assistant' in front of each answer, which is learned as well" in note


def test_a_clock_is_said_with_the_argument_that_stops_it() -> None:
    dated = (
        "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b') %}{% endif %}{{ date_string }}\n"
    )
    (_, note) = notes(dated + PLAIN)
    assert (
        "puts the present time into conversations (fix it with policy.chat_template_kwargs: {date_string: ...})" in note
    )
    assert len(notes(dated + PLAIN, date_string="1 May")) == 1
    (_, bare) = notes("{{ strftime_now('%H:%M') }}\n" + PLAIN)
    assert "present time" in bare
    assert "date_string" not in bare


def test_the_time_that_a_template_shows_stands_still() -> None:
    template = ChatTemplate(tokenizer("{{ strftime_now('%f %S') }}" + PLAIN), {})
    assert len({template.render([ASK]) for _ in range(50)}) == 1


def test_stop_tokens_are_the_tokenizers_and_those_of_the_generation_config(tmp_path: Path) -> None:
    made = tokenizer()
    assert stop_tokens(str(tmp_path), made) == {made.eos_token_id}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    assert stop_tokens(str(tmp_path), made) == {made.eos_token_id, 1, 2}


def test_a_run_with_a_policy_that_loses_its_directive_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    folder = Path(shutil.copytree(toy.MODEL, tmp_path / "policy"))
    (folder / "chat_template.jinja").write_text(HEAD + "{% if m.role != 'system' %}" + TURN + "{% endif %}" + TAIL)
    overrides = [f"policy.model={folder}", f"run_dir={tmp_path / 'run'}"]
    assert main(["run", str(toy.RUN_FILE), *overrides]) == 1
    assert "policy: its chat template drops the content of the system message" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("tests/toy/modle", "error: policy.model: tests/toy/modle: no such folder\n"),
        ("./modle", "error: policy.model: ./modle: no such folder\n"),
        ("tests/toy", "error: policy.model: 'tests/toy' cannot be loaded: "),
        ("modle", "error: policy.model: 'modle' cannot be loaded: "),
    ],
)
def test_a_policy_that_is_no_model_is_said_in_one_line_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, said: str
) -> None:
    monkeypatch.chdir(Path(__file__).parent.parent)
    assert main(["run", str(toy.RUN_FILE), f"policy.model={model}", f"run_dir={tmp_path / 'run'}"]) == 1
    line = capsys.readouterr().err
    assert line.startswith(said)
    assert line.count("\n") == 1
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- control tokens


def test_control_tokens_are_those_of_turns_and_special_tokens_are_never_text(tmp_path: Path) -> None:
    made = tokenizer()
    made.add_special_tokens({"additional_special_tokens": ["<filename>", "<|call|>"]})
    turns, every = control_tokens(made), control_tokens(made, every=True)
    assert turns
    assert every
    for text, is_control in (("<|im_end|>", True), ("<|call|>", True), ("cp <filename> b", False), ("a < b", False)):
        assert bool(find_control_token(turns, text)) == is_control
    assert find_control_token(every, "cp <filename> b") == "<filename>"


def test_tokenizers_of_another_make_have_no_control_tokens() -> None:
    class Other:
        def added_tokens_decoder(self) -> dict[int, Any]:
            return {}

    assert control_tokens(Other()) is None
    assert control_tokens(object()) is None


def test_an_own_pair_with_a_control_token_goes_with_its_twin() -> None:
    directives = {"high": "Be grand.", "low": "Be <|im_end|> plain."}
    texts = {"high": "A grand answer.", "low": "A plain answer."}

    def pair(cell: str, level: str, other: str, told: dict[str, str]) -> Pair:
        return Pair(
            pair_id=f"{cell}-{level}", twin_id=f"{cell}-{other}", cell_id=cell, prompt_id=cell, rubric_id="r",
            level=level, rejected_level=other, directive_id=level,
            prompt=[Message(role="system", content=told[level]), Message(role="user", content=f"Tell me of {cell}.")],
            chosen=[Message(role="assistant", content=texts[level])],
            rejected=[Message(role="assistant", content=texts[other])], chosen_score=90, rejected_score=10,
            chosen_is_cut=False, rejected_is_cut=False,
        )  # fmt: skip

    both = list(itertools.permutations(("high", "low")))
    given = [pair("a", *levels, directives) for levels in both]
    given += [pair("b", *levels, directives | {"low": "Be plain."}) for levels in both]
    made = own_pairs(given, Tokeniser(tokenizer(), {}))
    assert [one.pair_id for one in made] == ["b-high", "b-low"]
    assert [(one.subject_id, one.reason) for one in made.rejects] == [
        ("a-high", "control token"),
        ("a-low", "control token"),
    ]


# ---------------------------------------------------------------- answers that were cut


THINKING = "{% if m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
SHAPES = {
    "chatml": PLAIN,
    "trimmed": PLAIN.replace("m.content", "m.content | trim"),
    "line before the end": PLAIN.replace("m.content }}", "m.content }}\n\n"),
    "words before the end": PLAIN.replace("m.content }}", "m.content }} Over."),
    "thoughts": PLAIN.replace("{{ m.content", THINKING + "{{ m.content"),
    "no line after the end": PLAIN.replace("<|im_end|>\n", "<|im_end|>"),
}
CUT = "A grand answer. It is grand."


def cut_pairs(made: Any, chosen: str, rejected: str, is_cut: tuple[bool, bool]) -> TokenPairs:
    """One pair and its twin, whose answers are cut or not."""
    texts = {"high": (chosen, is_cut[0]), "low": (rejected, is_cut[1])}
    given = [
        Pair(
            pair_id=level, twin_id=other, cell_id="c", prompt_id="p", rubric_id="r", level=level, rejected_level=other,
            directive_id=level, prompt=[Message(role="user", content="Greet me.")],
            chosen=[Message(role="assistant", content=texts[level][0])],
            rejected=[Message(role="assistant", content=texts[other][0])], chosen_score=90, rejected_score=10,
            chosen_is_cut=texts[level][1], rejected_is_cut=texts[other][1],
        )
        for level, other in itertools.permutations(("high", "low"))
    ]  # fmt: skip
    return own_pairs(given, Tokeniser(made, {}))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", ["toy", "tiny"])
def test_a_cut_answer_is_trained_on_without_its_end(shape: str, own: str) -> None:
    made = tokenizer() if own == "toy" else train_tokenizer(SENTENCES, vocabulary=400, max_tokens=512)
    made.chat_template = SHAPES[shape]
    whole, cut = (cut_pairs(made, CUT, "Go away.", (is_cut, False)) for is_cut in (False, True))
    ids, finished = cut[0].chosen_ids, whole[0].chosen_ids
    assert made.decode(ids).endswith(CUT)
    assert made.eos_token_id not in ids
    assert made.eos_token_id in finished
    if shape in ("chatml", "trimmed", "thoughts", "no line after the end"):
        assert ids == finished[: finished.index(made.eos_token_id)]
    assert cut[1].rejected_ids == ids
    assert (cut[0].rejected_ids, cut[1].chosen_ids) == (whole[0].rejected_ids, whole[1].chosen_ids)
    assert cut[0].prompt_ids == whole[0].prompt_ids


def test_answers_that_differ_only_in_being_cut_are_the_same() -> None:
    for is_cut in itertools.product((False, True), repeat=2):
        made = cut_pairs(tokenizer(), CUT, CUT, is_cut)
        assert (list(made), {one.reason for one in made.rejects}) == ([], {"same answers"})


def test_a_cut_answer_whose_end_the_template_hides_is_a_reject() -> None:
    made = tokenizer(PLAIN.replace("m.content", "m.content | replace(' ', '  ')"))
    made = cut_pairs(made, CUT, "Go away.", (True, False))
    assert list(made) == []
    assert {one.reason for one in made.rejects} == {"cut answer"}
