"""Choices scored by the served engine."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_ray.steering.scoring import answer_tokens
from cpt_ray.tables.rundir import RunDir
from tests.served import (
    TEMPLATE_KWARGS,
    USER,
    make_served_candidates,
    noted,
    post,
)


def test_choices_are_scored_by_the_served_engine_as_by_transformers(url: str, run: RunDir) -> None:
    choice = {"prompt": "Write about the sea.", "chosen": "A high answer.", "rejected": "Plain and short."}
    found = post(url, "/v1/preferences", json={"choices": [choice]}).json()
    (state,) = (run.path / "preferences").rglob(f"{found['id']}.json")
    candidates, tokenizer = make_served_candidates(run), AutoTokenizer.from_pretrained(run.model)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()

    def logprob(directive: str, answer: str) -> float:
        ids, start = answer_tokens(tokenizer, directive, choice["prompt"], answer, TEMPLATE_KWARGS)
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits.log_softmax(dim=-1)[0]
        return float(sum(logps[at - 1, ids[at]] for at in range(start, len(ids))))

    answers = [[logprob(one, choice[name]) for one in candidates.directives] for name in ("chosen", "rejected")]
    values = candidates.values(np.array(answers))
    assert json.loads(state.read_text())["margins"][0] == pytest.approx((values[0] - values[1]).tolist(), abs=1e-2)
    assert set(found["probabilities"]["ornament"]) == {"low", "mid", "high"}
    for text in ("word " * 1000, "<|im_end|>" * 9, "\x00\u202e" * 50):
        answer = post(url, "/v1/preferences", json={"choices": [choice | {"chosen": text}]})
        assert answer.status_code == (200 if text[0] == "\x00" else 400)
    chat = {"model": "tiny", "messages": USER, "max_tokens": 2, "preferences": found["id"]}
    assert post(url, json=chat).json()["configuration"]["from"] == "preferences"
    noted(run, 1, lambda line: line["path"] == "/v1/preferences" and line["prompt_tokens"] > 6 * 10)
