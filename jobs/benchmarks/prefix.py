"""What the prefix cache gives in judging and writing: rubrics of about 1,500 tokens, a model of random weights.

python jobs/benchmarks/prefix.py [--answers 20] [--rubrics 3] [--model FOLDER_OR_NAME]

Judging, four ways to ask the same: as the judge does (rubric, prompt, answer, criterion), with the rubric last, without
a cache, and in random order with a cache that holds about one rubric at a time; the last also in the judge's own order.
Writing four samples: as one request, as four that follow each other, and shard after shard, as the writer does.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from cpt_ray.chat.conversations import judge_messages, level_labels, writer_messages
from cpt_ray.cluster import ENGINE_ENV, QUIET_ENV
from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import Request
from cpt_ray.engines.vllm import VllmEngine
from cpt_ray.rubrics.rubric import Rubric

NUM_WORDS, LEVELS, CRITERIA = 2000, 5, 5
ANSWER_WORDS, DESCRIPTOR_WORDS, PROMPT_WORDS = 150, 55, 20
SAMPLES, SHARD_PROMPTS, WRITTEN_TOKENS = 4, 10, 64
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_model(folder: Path) -> str:
    """3.4 million random weights and one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    names = ["<|im_end|>", "<|im_start|>", "<|pad|>", "<|unknown|>", *map(str, range(1, LEVELS + 1))]
    words = {word: at for at, word in enumerate([*names, *(f"w{at}" for at in range(NUM_WORDS))])}
    core = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(words),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        eos_token_id=0,
    )
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return str(folder)


def make_rubric(at: int, rng: random.Random) -> Rubric:
    """A rubric of random words, of a real one's length."""

    def text(count: int) -> str:
        return " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(count))

    levels = [{"name": f"level-{number}", "score": 100 * number / LEVELS} for number in range(1, LEVELS + 1)]
    criteria = [
        {
            "name": f"criterion-{number}",
            "weight": 100 / CRITERIA,
            "descriptors": {level["name"]: text(DESCRIPTOR_WORDS) for level in levels},
        }
        for number in range(CRITERIA)
    ]
    about = {"id": f"rubric-{at}", "version": 1, "title": text(1), "objective": text(30), "principles": [text(60)]}
    return Rubric.model_validate({**about, "levels": levels, "criteria": criteria})


def rubric_last(request: Request) -> Request:
    """The same words with the rubric at the end."""
    system, user = request.messages
    head, _, rubric = system["content"].partition("\n\n")
    turned = [{**system, "content": head}, {**user, "content": f"{user['content']}\n\n{rubric}"}]
    return Request(messages=turned, max_tokens=1, labels=request.labels)


def measure(model: str, engine: dict[str, Any], requests: list[Request]) -> tuple[float, int, float]:
    """(share of prompt tokens from the cache, tokens that the model computed, seconds)."""
    arguments = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 4096, "max_num_seqs": 32, **engine}
    made = VllmEngine(ModelConfig(model=model, engine=arguments))
    made.run([Request(messages=[{"role": "user", "content": "w1"}], max_tokens=1, labels=requests[0].labels)])
    executor: Any = made._engine.engine_core.engine_core.model_executor
    execute, computed = executor.execute_model, 0

    def counted(scheduled: Any, *more: Any, **named: Any) -> Any:
        nonlocal computed
        computed += scheduled.total_num_scheduled_tokens
        return execute(scheduled, *more, **named)

    executor.execute_model = counted
    start = time.monotonic()
    done = made.run(requests)
    seconds = time.monotonic() - start
    assert not any(one.error not in ("", "cut off") for one in done), done[0]
    return sum(one.num_cached_tokens for one in done) / sum(one.num_prompt_tokens for one in done), computed, seconds


def writing(rubrics: list[Rubric], rng: random.Random, prompts: int) -> dict[str, list[Request]]:
    """The same answers asked for in three ways."""
    ways: dict[str, list[Request]] = {"one request for 4": [], "neighbours": [], "shard after shard": []}
    for rubric in rubrics:
        texts = [" ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(PROMPT_WORDS)) for _ in range(prompts)]
        for start in range(0, prompts, SHARD_PROMPTS):
            asked = [
                Request(messages=writer_messages(rubric, level, text), max_tokens=WRITTEN_TOKENS)
                for text in texts[start : start + SHARD_PROMPTS]
                for level in rubric.levels
            ]
            numbered = [[dataclasses.replace(one, seed=at) for at in range(SAMPLES)] for one in asked]
            ways["one request for 4"] += [dataclasses.replace(one, samples=SAMPLES) for one in asked]
            ways["neighbours"] += [one for samples in numbered for one in samples]
            ways["shard after shard"] += [samples[at] for at in range(SAMPLES) for samples in numbered]
    return ways


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=20, help="per rubric")
    parser.add_argument("--rubrics", type=int, default=3)
    parser.add_argument("--model", default="")
    options = parser.parse_args()
    os.environ |= {**ENGINE_ENV, **QUIET_ENV, "TORCHDYNAMO_DISABLE": "1"}
    rng = random.Random(0)
    rubrics = [make_rubric(at, rng) for at in range(options.rubrics)]
    labels = tuple(level_labels(rubrics[0]))
    requests = []
    for rubric in rubrics:
        for _ in range(options.answers):
            answer = " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(ANSWER_WORDS))
            prompt = " ".join(f"w{rng.randrange(NUM_WORDS)}" for _ in range(PROMPT_WORDS))
            requests += [
                Request(messages=judge_messages(rubric, one, prompt, answer), max_tokens=1, labels=labels)
                for one in rubric.judged
            ]
    shuffled = rng.sample(requests, len(requests))
    large, off = {"kv_cache_memory_bytes": 400 << 20}, {"enable_prefix_caching": False}
    # One token takes 4 layers x 2 (keys, values) x 2 heads x 64 x 2 bytes = 2 KiB: this holds about 5,000 of them.
    small = {"kv_cache_memory_bytes": 10 << 20, "max_num_seqs": 2}
    with tempfile.TemporaryDirectory(prefix="prefix-") as folder:
        model = options.model or make_model(Path(folder))
        words = [len(" ".join(one["content"] for one in request.messages).split()) for request in requests]
        print(
            f"{len(requests)} requests of about {sum(words) / len(words):.0f} words, {CRITERIA} per answer", flush=True
        )
        for name, engine, asked in (
            ("rubric first", large, requests),
            ("rubric last", large, [rubric_last(one) for one in requests]),
            ("rubric first, no cache", large | off, requests),
            ("rubric first, small cache", small, requests),
            ("shuffled, small cache", small, shuffled),
        ):
            cached, computed, seconds = measure(model, engine, asked)
            speed = len(asked) / CRITERIA / seconds
            print(
                f"{name:<26} {cached:6.1%} of prompt tokens from the cache, {computed} tokens computed, "
                f"{speed:6.1f} answers/s",
                flush=True,
            )
        for name, asked in writing(rubrics, rng, options.answers).items():
            _, computed, seconds = measure(model, large, asked)
            speed = sum(one.samples for one in asked) / seconds
            print(f"{name:<26} {computed} tokens computed, {speed:6.1f} answers/s written", flush=True)


if __name__ == "__main__":
    main()
