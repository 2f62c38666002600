"""Makes the toy model: one tiny chat model that is writer, director, judge and student.

    python -m tests.toy.make OUT_DIR [--scale S] [--seed N]

trains a byte-level BPE tokenizer and a Qwen3 of about a million parameters from nothing, on conversations
that `cpt_ray.chat.conversations` renders and `world.py` answers, and saves a Hugging Face folder that vLLM loads.
One thread, about twenty minutes. It writes, directs and judges on purpose well, and follows directives on purpose
badly, so that configurable preference tuning has something to do. `model/` holds what seed 0 gives.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import DynamicCache, GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cpt_ray.chat.conversations import (
    ChatMessage,
    director_messages,
    judge_messages,
    policy_messages,
    token_ids,
    writer_messages,
)
from cpt_ray.rubrics.bins import nearest_level
from cpt_ray.rubrics.catalog import compose_directives
from cpt_ray.rubrics.grading import measured_criterion
from cpt_ray.rubrics.rubric import Rubric, load_rubrics
from tests.toy import RUBRICS, world

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
    followed: float = 1.0
    """Share of directives that training answers follow."""


def load_world(folder: Path = RUBRICS) -> World:
    """The rubrics and prompts of a folder."""
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
    number = rubric.levels.index(nearest_level(rubric.levels, score)) + 1
    return Conversation(judge_messages(rubric, rubric.judged[0], prompt, answer), str(number))


def direct(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The director: one of the level's many directives."""
    number = rng.randint(1, len(rubric.levels))
    answer = world.directive(rng, rubric.id, number)
    return Conversation(director_messages(rubric, rubric.levels[number - 1]), answer)


def follow(rng: Random, here: World, rubric: Rubric) -> Conversation:
    """The student: none, one or two directives, each of them followed with probability `here.followed`."""
    prompt = rng.choice(here.prompts)
    count = rng.choices((0, 1, 2), (2, 6, 1))[0]
    asked = {rubric.id} | set(rng.sample([one.id for one in here.rubrics], count - 1)) if count else set()
    numbers = {one.id: rng.randint(1, len(one.levels)) for one in here.rubrics if one.id in asked}
    directive = compose_directives([world.directive(rng, name, number) for name, number in numbers.items()])
    followed = {name: number for name, number in numbers.items() if rng.random() < here.followed}
    answer = world.level_text(rng, here.rubrics, prompt, followed)
    return Conversation(policy_messages(directive, prompt), answer)


Task = Callable[[Random, World, Rubric], Conversation]


@dataclass(frozen=True)
class Phase:
    """Some training steps of one mixture."""

    steps: int
    tasks: dict[Task, int]
    """Conversations per step and rubric."""
    slot_weight: float
    """Weight of the asked rubric's words against 1 for every other token of a text: they alone tell the level."""
    followed: float
    """Share of the directives that the answers follow; the others get a random level."""
    peak: float
    """Learning rates as a share of the first phase's."""


PHASES = (
    # words, topics and the judge, which is what tells high words from low ones
    Phase(steps=600, tasks={write: 6, judge: 12, direct: 3, follow: 8}, slot_weight=1, followed=0.1, peak=1.0),
    # the writer
    Phase(steps=400, tasks={write: 10, judge: 3, direct: 1, follow: 8}, slot_weight=20, followed=1.0, peak=0.5),
    # reading directives
    Phase(steps=300, tasks={write: 3, judge: 2, direct: 2, follow: 20}, slot_weight=20, followed=1.0, peak=0.5),
    # and being lax about them: a base model that configurable preference tuning has something to do for
    Phase(steps=80, tasks={write: 6, judge: 6, direct: 4, follow: 14}, slot_weight=20, followed=0.45, peak=0.35),
)


# ---------------------------------------------------------------- tokenizer


def make_tokenizer(rng: Random, here: World) -> PreTrainedTokenizerFast:
    """The toy model's tokenizer, in which this world's words are single tokens."""
    corpus = []
    for _ in range(600):
        for task in PHASES[0].tasks:
            made = task(rng, here, rng.choice(here.rubrics))
            corpus += [one["content"] for one in made.messages] + [made.answer]
    return train_tokenizer(corpus, VOCABULARY, MAX_TOKENS)


def train_tokenizer(corpus: Sequence[str], vocabulary: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of at most `vocabulary` tokens with a ChatML template; every digit is a token."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    core.decoder = decoders.ByteLevel()
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(corpus, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=max_tokens,
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


def make_targets(tokenizer: PreTrainedTokenizerFast, here: World) -> torch.Tensor:
    """Per token what should have been predicted there: itself, or evenly all words it could have been.

    The mean gradient is that of the sampled words; the noise of sampling them is gone, which is most of it.
    """
    targets = torch.eye(len(tokenizer))
    for group in world.interchangeable(here.rubrics):
        ids = [one for word in group for one in tokenizer.encode(f" {word}", add_special_tokens=False)]
        if len(ids) == len(group):
            targets[ids] = targets[ids].mean(0)
    return targets


def slot_weights(tokenizer: PreTrainedTokenizerFast, rubric: Rubric, weight: float) -> torch.Tensor:
    """Per token its weight in the loss of a text that is asked to have a level of `rubric`."""
    weights = torch.ones(len(tokenizer))
    spec = world.lexicon_of(rubric).measure
    assert spec is not None
    for word in (*spec.words, *spec.against):
        weights[tokenizer.encode(f" {word}", add_special_tokens=False)] = weight
    return weights


def batch_loss(
    model: Any, rows: Sequence[tuple[list[int], list[int]]], pad: int, targets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Weighted mean loss of the answers' tokens; what all prompts begin with (the rubric) is run once."""
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
    said = ids[:, 1:][wanted[:, 1:]]
    losses = torch.nn.functional.cross_entropy(logits, targets[said], reduction="none")
    return (losses * weights[said]).sum() / weights[said].sum()


def learning_rate(step: int, steps: int) -> float:
    """Share of the peak: a linear warm-up over 5%, then a cosine to 2%."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def make_optimizers(model: Any, steps: int, peak: float) -> list[tuple[torch.optim.Optimizer, Any]]:
    """Muon for the layers' matrices, AdamW for the embedding and the norms; each with its schedule."""
    matrices = [one for one in model.model.layers.parameters() if one.ndim == 2]
    known = set(map(id, matrices))
    others = [one for one in model.parameters() if id(one) not in known]
    found: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=2e-2 * peak, weight_decay=0.05),
        torch.optim.AdamW(others, lr=4e-3 * peak, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    return [(one, torch.optim.lr_scheduler.LambdaLR(one, lambda step: learning_rate(step, steps))) for one in found]


def train(model: Any, tokenizer: PreTrainedTokenizerFast, here: World, rng: Random, phase: Phase) -> None:
    """One phase, on fresh conversations of every task and rubric in every step."""
    optimizers = make_optimizers(model, phase.steps, phase.peak)
    targets = make_targets(tokenizer, here)
    plain = torch.ones(len(tokenizer))
    weights = {one.id: slot_weights(tokenizer, one, phase.slot_weight) for one in here.rubrics}
    here, started = replace(here, followed=phase.followed), time.monotonic()
    for step in range(phase.steps):
        losses = dict.fromkeys((task.__name__ for task in phase.tasks), 0.0)
        for task, rubric in itertools.product(phase.tasks, here.rubrics):
            rows = [encode(tokenizer, task(rng, here, rubric)) for _ in range(phase.tasks[task])]
            weight = weights[rubric.id] if task in (write, follow) else plain
            loss = batch_loss(model, rows, int(tokenizer.pad_token_id), targets, weight) / len(here.rubrics)
            torch.autograd.backward(loss)
            losses[task.__name__] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        if step % 25 == 0 or step == phase.steps - 1:
            shown = "  ".join(f"{name} {loss:.3f}" for name, loss in losses.items())
            print(f"step {step:5d}  {time.monotonic() - started:6.0f} s  {shown}", flush=True)


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


def make(out: Path, scale: float = 1.0, seed: int = 0) -> None:
    """Makes the model and saves it in `out`; `scale` multiplies the phases' steps."""
    torch.manual_seed(seed)
    rng = Random(seed)
    here = load_world()
    tokenizer = make_tokenizer(rng, here)
    model = make_model(tokenizer)
    print(f"{len(tokenizer)} tokens, {model.num_parameters():,} parameters", flush=True)
    for phase in PHASES:
        train(model, tokenizer, here, rng, replace(phase, steps=max(1, round(scale * phase.steps))))
    save(model, tokenizer, out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Make the toy model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    make(arguments.out, arguments.scale, arguments.seed)


if __name__ == "__main__":
    main()
