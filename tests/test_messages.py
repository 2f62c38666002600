"""What a wrong value in a YAML file is answered with: the field, what was found, what was expected, in plain words."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cpt_ray.config import PreferenceRunConfig, RunConfig, load_any_config
from cpt_ray.errors import UserError
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.yaml_file import PATTERNS, validation_lines
from tests import toy

WHOLE = "a whole number of 1 or more"
SECTION = "a section of 'key: value' lines"
MARKS = "letters, digits and . _ -"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.beta=-1", "train.beta: found -1; expected a number above 0"),
        ("train.beta=many", "train.beta: found 'many'; expected a number above 0"),
        ("train.warmup_ratio=1", "train.warmup_ratio: found 1; expected a number of 0 or more and below 1"),
        ("steer.conflicting=0.1", "steer.conflicting: found 0.1; expected a number from 0.75 to 1"),
        ("steer.prior={mood: .inf}", "steer.prior: found inf; give a finite number"),
        ("train.batch_size=1.5", f"train.batch_size: found 1.5; expected {WHOLE}"),
        ("train.batch_size=null", f"train.batch_size: found nothing; expected {WHOLE}"),
        ("train.max_pairs=0", f"train.max_pairs: found 0; expected {WHOLE}"),
        ("train.batch_size=2024-01-01", f"train.batch_size: found '2024-01-01'; expected {WHOLE}"),
        ("serve.port=70000", "serve.port: found 70000; expected a whole number from 0 to 65535"),
        ("steer.size=9", "steer.size: found 9; expected a whole number of 8 or more and a multiple of 8"),
        ("train.use_gpu=maybe", "train.use_gpu: found 'maybe'; expected true or false"),
        ("train=5", f"train: found 5; expected {SECTION}"),
        ("train.lora=[r]", f"train.lora: found a list of 1; expected {SECTION}"),
        ("serve.frontend=3", f"serve.frontend: found 3; expected {SECTION}"),
        ("policy=null", f"policy: found nothing; expected {SECTION}"),
        ("train.dtype=float16", "train.dtype: found 'float16'; expected one of float32, bfloat16"),
        ("train.lora.quantize=int8", "train.lora.quantize: found 'int8'; expected nf4"),
        ("train.loss={}", f"train.loss: found an empty section; expected {SECTION} with at least one entry"),
        ("train.loss={sft: many}", "train.loss.sft: found 'many'; expected a number above 0"),
        ("rubrics=[]", "rubrics: found an empty list; expected a list with at least one entry"),
        ("rubrics=x.yaml", "rubrics: found 'x.yaml'; expected a list with at least one entry"),
        ("rubrics=[5]", "rubrics.0: found 5; expected text (put it in quotes)"),
        (
            "steer.forms=[film, soft_prompt]",
            "steer.forms: soft prompts were removed, since they were the weakest form; give gated_lora",
        ),
        ("steer.variational=no", "steer.variational: was removed, since no gain was ever measured; leave it out"),
        ("steer.kinds=[hihg]", "steer.kinds.0: found 'hihg'; expected one of high, low, middle, mixture, noisy"),
        ("synthesis.combine=[[a, b, c]]", "synthesis.combine.0: found a list of 3; expected a list with 2 entries"),
        ("synthesis.combine=[[a]]", "synthesis.combine.0.1: missing; add it"),
        ("train.lora.target_modules=[[5]]", "train.lora.target_modules.0: found a list of 1; expected text"),
        ("train.lora.target_modules=[5]", "train.lora.target_modules.0: found 5; expected text (put it in quotes)"),
        (
            "serve.configurations={a: {mood: [1]}}",
            "serve.configurations.a.mood: found a list of 1; expected text or a number",
        ),
        ("serve.configurations={a: 5}", f"serve.configurations.a: found 5; expected {SECTION}"),
        (
            "serve.configurations={a b: {}}",
            f"serve.configurations.a b: found 'a b'; use {MARKS}, no spaces or line breaks",
        ),
        ('name="abc\\n"', f"name: found 'abc\\n'; use {MARKS}, a letter or digit first, no spaces or line breaks"),
        ("name=5 6", f"name: found '5 6'; use {MARKS}, a letter or digit first, no spaces or line breaks"),
        (
            "writer.endpoint={base_url: 'localhost:8000/v1'}",
            "writer.endpoint.base_url: found 'localhost:8000/v1'; begin it with http:// or https://",
        ),
        ("judges=[{model: a, vots: 3}]", 'judges.0.vots: unknown key (did you mean "votes"?)'),
    ],
)
def test_each_kind_of_wrong_value_has_one_plain_line(override: str, line: str) -> None:
    with pytest.raises(UserError) as caught:
        load_any_config(toy.RUN_FILE, [override])
    (said,) = str(caught.value).splitlines()
    assert said.partition(": ")[2] == line


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    kind: Literal["a", "b"]


class Outer(BaseModel):
    either: Inner | list[int] | None = None
    table: dict[str, str | list[Inner]] = {}
    short: str = Field(default="abc", max_length=3)


@pytest.mark.parametrize(
    ("data", "lines"),
    [
        ({"either": {"kind": "c"}}, ["either.kind: found 'c'; expected one of a, b"]),
        ({"either": {"kind": "a", "knid": 1}}, ['either.knid: unknown key (did you mean "kind"?)']),
        ({"either": "x"}, [f"either: found 'x'; expected {SECTION} or a list"]),
        ({"either": [1, "x"]}, ["either.1: found 'x'; expected a whole number"]),
        ({"table": {"x": 1}}, ["table.x: found 1; expected text or a list"]),
        ({"table": {"x": [{"kind": "a"}, {}]}}, ["table.x.1.kind: missing; add it"]),
        ({"short": "abcd"}, ["short: found 'abcd'; expected text of at most 3 characters"]),
        ({"short": "\ud83d"}, ["short: found half a character; write the whole character, or remove it"]),
    ],
)
def test_a_value_of_several_kinds_is_named_by_what_the_user_wrote(data: Any, lines: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate(data)
    assert validation_lines(caught.value, Outer) == lines


@pytest.mark.parametrize("model", [Rubric, RunConfig, PreferenceRunConfig])
def test_every_pattern_is_said_in_words(model: type[BaseModel]) -> None:
    schema = str(model.model_json_schema())
    patterns = re.findall(r"'pattern': '([^']*)'|'patternProperties': \{'([^']*)'", schema)
    assert patterns
    assert {left or right for left, right in patterns} <= set(PATTERNS)
