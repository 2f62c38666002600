"""The toy model and the world it is made of."""

from pathlib import Path
from random import Random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_ray.chat.conversations import level_labels, policy_messages, token_ids, writer_messages
from cpt_ray.rubrics.bins import confirms
from cpt_ray.rubrics.grading import measured_criterion
from cpt_ray.rubrics.rubric import directive_leak
from tests.toy import MODEL, make, world

HERE = make.load_world()
LEVELS = [(rubric, level) for rubric in HERE.rubrics for level in rubric.levels]
EVERY_LEVEL = pytest.mark.parametrize(
    ("rubric", "level"), LEVELS, ids=[f"{rubric.id}-{level.name}" for rubric, level in LEVELS]
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


def test_the_tokenizer_round_trips_every_prompt(tokenizer):
    for prompt in HERE.prompts:
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        assert tokenizer.decode(ids) == prompt


def test_the_tokenizer_round_trips_text_it_never_saw(tokenizer):
    text = "Ünïcode, tabs\tand 漢字 🎉  12345.\n"
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_level_labels_are_single_tokens(tokenizer):
    for label in level_labels(HERE.rubrics[0]):
        assert len(tokenizer.encode(label, add_special_tokens=False)) == 1


def test_prompt_ids_are_a_prefix_of_conversation_ids(tokenizer):
    user = {"role": "user", "content": HERE.prompts[0]}
    for messages in (policy_messages(None, [user]), policy_messages("Use only simple words.", [user])):
        prompt = token_ids(tokenizer, messages)
        answer = {"role": "assistant", "content": "At dawn the old harbor feels glad."}
        whole = tokenizer.apply_chat_template([*messages, answer], tokenize=True, return_dict=False)
        said = tokenizer.encode(answer["content"], add_special_tokens=False)
        assert whole[: len(prompt) + len(said) + 1] == [*prompt, *said, tokenizer.eos_token_id]


@EVERY_LEVEL
def test_a_texts_measured_level_is_the_one_it_was_made_for(rubric, level):
    rng = Random(0)
    number = rubric.levels.index(level) + 1
    for _ in range(20):
        text = world.level_text(rng, HERE.rubrics, rng.choice(HERE.prompts), {rubric.id: number})
        grade = measured_criterion(rubric, rubric.measured[0], text)
        assert grade.score == level.score
        assert confirms(rubric, level.name, grade.score)


@EVERY_LEVEL
def test_directives_are_many_and_leak_nothing(rubric, level):
    rng = Random(0)
    number = rubric.levels.index(level) + 1
    made = {world.directive(rng, rubric.id, number) for _ in range(50)}
    assert len(made) >= 45
    assert not [one for one in made if directive_leak(one, rubric)]


def test_no_two_levels_share_a_directive():
    rng = Random(0)
    for rubric in HERE.rubrics:
        sets = [{world.directive(rng, rubric.id, number) for _ in range(500)} for number in range(1, 6)]
        assert len(set().union(*sets)) == sum(map(len, sets))


def test_the_kept_model_is_small_and_knows_every_rubric_word(tokenizer):
    assert (MODEL / "model.safetensors").stat().st_size < 4_000_000
    for rubric, level in LEVELS:
        ids = token_ids(tokenizer, writer_messages(rubric, level, HERE.prompts[0]))
        assert len(ids) < 300


def test_a_step_of_every_phase_makes_a_model_that_loads_and_generates(tmp_path: Path):
    make.make(tmp_path, scale=0.001)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": HERE.prompts[0]}], add_generation_prompt=True, return_tensors="pt"
    )
    made = model.generate(**ids, max_new_tokens=3)
    assert made.shape[1] > ids["input_ids"].shape[1]
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
