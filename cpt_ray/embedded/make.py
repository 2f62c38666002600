"""Makes the embedded model: one tiny chat model that is writer, director, judge and student.

    python -m cpt_ray.embedded.make OUT_DIR [--steps N] [--seed S]

trains a byte-level BPE tokenizer and a Qwen3 of about a million parameters from nothing, on conversations
that `cpt_ray.prompting` renders and `world.py` answers, and saves a Hugging Face folder that vLLM loads.
One thread; about 15 minutes with the default number of steps. It writes, directs and judges on purpose well,
and follows directives on purpose badly, so that configurable preference tuning has something to do.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cpt_ray.embedded import world
from cpt_ray.grading import measured_criterion
from cpt_ray.prompting import (
    ChatMessage,
    compose_directives,
    director_messages,
    judge_messages,
    policy_messages,
    token_ids,
    writer_messages,
)
from cpt_ray.rubric import Rubric, load_rubrics

DATA = Path(__file__).parents[2] / "rubrics" / "embedded"
MODEL = Path(__file__).parent / "model"
"""The shipped model: what this script makes with its default arguments."""

STEPS = 600
FOLLOWED = 0.1
"""Share of training conversations whose answer does what the directive says; the rest has a random level."""
VOCABULARY = 1400
MAX_TOKENS = 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Conversation:
    """One training example."""

    messages: list[ChatMessage]
    answer: str


@dataclass(frozen=True)
class World:
    """What there is to talk about."""

    rubrics: tuple[Rubric, ...]
    prompts: tuple[str, ...]


def load_world(folder: Path = DATA) -> World:
    """The rubrics and prompts of `rubrics/embedded`."""
    lines = (folder / "prompts.jsonl").read_text("utf-8").splitlines()
    return World(load_rubrics([folder]), tuple(json.loads(line)["prompt"] for line in lines))


# ---------------------------------------------------------------- conversations


def write(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The writer: a text of the level asked for."""
    prompt, level = rng.choice(here.prompts), rng.choice(rubric.levels)
    number = rubric.levels.index(level) + 1
    answer = world.level_text(rng, here.rubrics, prompt, {rubric.id: number})
    return Conversation(writer_messages(rubric, level, prompt), answer)


def judge(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The judge: the number of the level nearest to a text's measured share."""
    prompt = rng.choice(here.prompts)
    if rng.random() < 0.5:
        answer = world.level_text(rng, here.rubrics, prompt, {})
    else:
        answer = world.noisy_text(rng, here.rubrics, prompt)
    score = measured_criterion(rubric, rubric.measured[0], answer).score
    assert score is not None
    number = rubric.levels.index(rubric.nearest_level(score)) + 1
    return Conversation(judge_messages(rubric, rubric.judged[0], prompt, answer), str(number))


def direct(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The director: one of the level's many directives."""
    number = rng.randint(1, len(rubric.levels))
    answer = world.directive(rng, rubric.id, number)
    return Conversation(director_messages(rubric, rubric.levels[number - 1]), answer)


def follow(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The student before tuning: one or two directives, or none, mostly ignored."""
    prompt = rng.choice(here.prompts)
    count = rng.choices((0, 1, 2), (1, 6, 1))[0]
    asked = {rubric.id} | set(rng.sample([one.id for one in here.rubrics], count - 1)) if count else set()
    numbers = {one.id: rng.randint(1, len(one.levels)) for one in here.rubrics if one.id in asked}
    directive = compose_directives([world.directive(rng, name, number) for name, number in numbers.items()])
    followed = {name: number for name, number in numbers.items() if rng.random() < FOLLOWED}
    answer = world.level_text(rng, here.rubrics, prompt, followed)
    return Conversation(policy_messages(directive, [{"role": "user", "content": prompt}]), answer)


Task = Callable[[Random, World, Rubric], Conversation]
TASKS: dict[Task, int] = {write: 6, judge: 12, direct: 3, follow: 8}
"""Each role's task, and how many conversations per rubric one training step has of it."""


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(rng: Random, here: World) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which this world's words are single tokens and so is every digit."""
    corpus = []
    for _ in range(600):
        for task in TASKS:
            made = task(rng, here, rng.choice(here.rubrics))
            corpus += [one["content"] for one in made.messages] + [made.answer]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerFast, made: Conversation) -> tuple[list[int], list[int]]:
    """(prompt ids, answer ids with the end mark)."""
    answer = tokenizer.encode(made.answer, add_special_tokens=False)
    return token_ids(tokenizer, made.messages), [*answer, tokenizer.eos_token_id]


# ---------------------------------------------------------------- model


def make_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained Qwen3 of about a million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return Qwen3ForCausalLM(config)


def batch_loss(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad: int) -> torch.Tensor:
    """Mean loss of the answers' tokens; what all prompts begin with (the rubric) is run once."""
    prompts = [prompt for prompt, _ in rows]
    same = sum(1 for _ in takewhile(lambda ids: len(set(ids)) == 1, zip(*prompts, strict=False)))
    same = min(same, min(map(len, prompts)) - 1)
    tails = [prompt[same:] + answer for prompt, answer in rows]
    width = max(map(len, tails))
    ids = torch.tensor([tail + [pad] * (width - len(tail)) for tail in tails])
    wanted = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        wanted[row, len(prompt) - same : len(prompt) - same + len(answer)] = True
    cache = DynamicCache(config=model.config)
    if same:
        model.model(torch.tensor([prompts[0][:same]]), past_key_values=cache, use_cache=True)
        cache.batch_repeat_interleave(len(rows))
    hidden = model.model(ids[:, :-1], past_key_values=cache, use_cache=True).last_hidden_state
    logits = model.lm_head(hidden[wanted[:, 1:]])
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][wanted[:, 1:]])


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: a linear warm-up over 5%, then a cosine to 2%."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimizers(model: Any, steps: int) -> list[tuple[torch.optim.Optimizer, Any]]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; each with its schedule."""
    matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
    known = set(map(id, matrices))
    others = [one for one in model.parameters() if id(one) not in known]
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2e-2, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    return [(one, torch.optim.lr_scheduler.LambdaLR(one, lambda step: learning_rate(step, steps))) for one in found]


def train(model: Any, tokenizer: PreTrainedTokenizerFast, here: World, rng: Random, steps: int) -> None:
    """Pre-trains the model on fresh conversations of every task and rubric in every step."""
    optimizers = make_optimizers(model, steps)
    started = time.monotonic()
    for step in range(steps):
        losses = {task.__name__: _train_task(model, tokenizer, here, rng, task) for task in TASKS}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if step % 25 == 0 or step == steps - 1:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"step {step:5d}  {time.monotonic() - started:6.0f} s  {shown}", flush=True)


def _train_task(model: Any, tokenizer: PreTrainedTokenizerFast, here: World, rng: Random, task: Task) -> float:
    """Adds one task's gradients, a batch per rubric; returns its mean loss."""
    total = 0.0
    for rubric in here.rubrics:
        rows = [encode(tokenizer, task(rng, here, rubric)) for _ in range(TASKS[task])]
        loss = batch_loss(model, rows, int(tokenizer.pad_token_id))
        torch.autograd.backward(loss / len(here.rubrics))
        total += loss.item() / len(here.rubrics)
    return total


def save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """The Hugging Face folder, weights in bfloat16."""
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=1.0,
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


def make(out: Path, steps: int = STEPS, seed: int = 0) -> None:
    """Makes the model and saves it in `out`."""
    torch.manual_seed(seed)
    rng = Random(seed)
    here = load_world()
    tokenizer = make_tokenizer(rng, here)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    train(model, tokenizer, here, rng, steps)
    save(model, tokenizer, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the embedded model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.out, arguments.steps, arguments.seed)


if __name__ == "__main__":
    main()
