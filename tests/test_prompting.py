"""Prompts to token ids: what is put together from parts is what the whole gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from cpt_ray.chat.conversations import PromptTokens, token_ids
from tests import toy

MARKS = ["<s>", "</s>", "[INST]", "[/INST]"]
TEMPLATE = (
    "<s>{% for one in messages %}{% if one['role'] == 'assistant' %}{{ one['content'] }}</s>"
    "{% else %}[INST] {{ one['content'] }} [/INST]{% endif %}{% endfor %}"
)
PARTS = [*"ab \n.é☃", "word ", "<s>", "</s>", "[INST]", "<|im_end|>", "<|im_start|>"]
TEXTS = st.lists(st.sampled_from(PARTS), max_size=20).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant"])
CONVERSATIONS = st.lists(
    st.builds(lambda role, text: {"role": role, "content": text}, ROLES, TEXTS), min_size=1, max_size=4
)


def make_tokenizer(kind: str) -> Any:
    """The toy model's, and others like Llama's and Mistral's, whose spaces depend on where a text begins."""
    if kind == "toy":
        return AutoTokenizer.from_pretrained(toy.MODEL)
    made = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="</s>"))
    if kind == "prepended":
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
    else:
        made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=kind)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=MARKS)
    made.train_from_iterator(["word a b ab é ☃ . word word", "a word. b word."], trainer)
    wrapped = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
    wrapped.add_special_tokens({"additional_special_tokens": MARKS[2:]})
    wrapped.chat_template = TEMPLATE
    return wrapped


TOKENIZERS = {kind: make_tokenizer(kind) for kind in ("toy", "prepended", "first", "always", "never")}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=60)
@given(conversations=st.lists(CONVERSATIONS, min_size=1, max_size=3))
def test_parts_make_the_ids_of_the_whole(kind: str, conversations: list[Any]) -> None:
    tokenizer = TOKENIZERS[kind]
    parts = PromptTokens(tokenizer, {})
    parts._compared = parts._COMPARED  # nothing is compared, so nothing is set right
    assert parts(conversations[:1]) + parts(conversations) == [
        token_ids(tokenizer, one) for one in conversations[:1]
    ] + [token_ids(tokenizer, one) for one in conversations]


def test_a_tokenizer_whose_parts_depend_on_each_other_gets_whole_texts() -> None:
    def encode(text: str) -> list[int]:
        """The first token counts those that follow."""
        return [len(text), *map(ord, text)]

    class Odd:
        is_fast, backend_tokenizer = True, MagicMock()
        added_tokens_decoder = TOKENIZERS["first"].added_tokens_decoder
        backend_tokenizer.encode_batch_fast = lambda texts, **_: [SimpleNamespace(ids=encode(one)) for one in texts]

        def apply_chat_template(self, asked: Any, tokenize: bool = True, **_: Any) -> Any:
            text = "".join(f"<s>{one['content']}" for one in asked)
            return encode(text) if tokenize else text

    parts, asked = PromptTokens(Odd(), {}), [{"role": "user", "content": "a"}] * 2
    assert parts([asked] * 2) + parts([asked]) == [token_ids(Odd(), asked)] * 3


def test_a_part_that_conversations_share_is_encoded_once(tmp_path: Path) -> None:
    seen: list[str] = []

    class Noting(PromptTokens):
        def _encode(self, texts: list[str]) -> list[list[int]]:
            seen.extend(texts)
            return super()._encode(texts)

    parts = Noting(TOKENIZERS["toy"], {})
    for texts in (("one", "two"), ("three",)):
        parts([[{"role": "system", "content": "a rubric"}, {"role": "user", "content": text}] for text in texts])
    assert [sum(what in one for one in seen) for what in ("a rubric", "one", "two", "three")] == [1, 1, 1, 1]
