"""What a chat template drops, adds or ends with no stop is said before anything is trained or asked."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from cpt_ray.chat.templates import ChatTemplate, control_tokens, find_control_token, own_stop_tokens, stop_tokens
from cpt_ray.cli import main
from cpt_ray.config import PreferencesConfig
from cpt_ray.errors import UserError
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.tables.records import Message, Pair
from cpt_ray.training.pairs import TokenPairs, own_pairs, preference_pairs
from tests import toy
from tests.tiny_model import SENTENCES
from tests.toy.make import train_tokenizer

HEAD = "{% for m in messages %}"
TURN = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
TAIL = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = HEAD + TURN + TAIL
ASK = {"role": "user", "content": "Greet me."}
ROW = {"prompt": [ASK], "chosen": [{"role": "assistant", "content": "Hello there"}],
       "rejected": [{"role": "assistant", "content": "Go away"}]}  # fmt: skip


def tokenizer(template: Any = PLAIN) -> Any:
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(toy.MODEL)
    made.chat_template = template
    return made


def notes(template: Any, **arguments: Any) -> list[str]:
    made = tokenizer(template)
    return ChatTemplate(made, arguments).check(own_stop_tokens(made))


def pairs(path: Path, *rows: dict[str, Any], template: Any = PLAIN) -> TokenPairs:
    (path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return preference_pairs(PreferencesConfig(source=str(path / "set.jsonl")), Tokeniser(tokenizer(template), {}))


def answer(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **more}]


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


# ---------------------------------------------------------------- rows of a preference set


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

        def __call__(self, text: str) -> dict[str, list[int]]:
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
