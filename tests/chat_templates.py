"""The toy model's tokenizer with a chat template of one's own, and rows of preference sets, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cpt_ray.config import PreferencesConfig
from cpt_ray.logprobs.rows import Tokeniser
from cpt_ray.training.pairs import TokenPairs, preference_pairs
from tests import toy

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


def pairs(path: Path, *rows: dict[str, Any], template: Any = PLAIN) -> TokenPairs:
    (path / "set.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return preference_pairs(PreferencesConfig(source=str(path / "set.jsonl")), Tokeniser(tokenizer(template), {}))


def answer(text: str, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text, **more}]
