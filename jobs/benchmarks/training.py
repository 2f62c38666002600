"""TRL's DPOTrainer against GridTrainer on the same pairs, alternating in one process.

nice -n 15 python jobs/benchmarks/training.py --answers 3 5 --rounds 3
python jobs/benchmarks/training.py --shape 4b --device cuda --dtype bfloat16 --cells 64 --peak-tflops 989

Random weights and random words: only the time and the memory mean anything. Timed are one epoch and, for the grid
trainer, its reference pass (TRL's is inside its steps); not timed are loading and tokenising, the same for both.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import math
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, PrinterCallback, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging
from trl import DPOConfig, DPOTrainer

from cpt_ray.logprobs.model import answer_logps, prepare_model
from cpt_ray.logprobs.rows import Row, Tokeniser
from cpt_ray.training.pairs import TokenPair
from cpt_ray.training.row_making import make_rows
from cpt_ray.training.trl_trainer import GridTrainer

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
             "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
    "0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    "1.2b": {"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
    "4b": {"vocab_size": 151936, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""3.4 million parameters, and the shapes of SmolLM2-135M, Qwen3-0.6B, Llama-3.2-1B and Qwen3-4B."""
NUM_WORDS = 4000
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word."""
    special = ["<|im_end|>", "<|im_start|>", "<|pad|>", "<|unknown|>", "system", "user", "assistant"]
    words = {word: at for at, word in enumerate(special + [f"w{at}" for at in range(NUM_WORDS)])}
    core = Tokenizer(models.WordLevel(words, unk_token="<|unknown|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|pad|>", unk_token="<|unknown|>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_grid(pairs: Sequence[dict[str, Any]]) -> list[Row]:
    """The pairs' rows, as `cpt train` makes them."""
    tokeniser = Tokeniser(make_tokenizer(), {})
    made = [
        TokenPair(
            pair_id="",
            twin_id="",
            prompt_id="",
            cell_id=str(one["cell_id"]),
            prompt_ids=tokeniser.prompt(one["prompt"]),
            chosen_ids=tokeniser.answer(one["prompt"], one["chosen"]),
            rejected_ids=tokeniser.answer(one["prompt"], one["rejected"]),
        )
        for one in pairs
    ]
    return make_rows(made, len(made))


def make_pairs(num_cells: int, num_answers: int, seed: int = 0) -> list[dict[str, Any]]:
    """All ordered pairs of `num_cells` cells: prompts of 100-200 tokens with the directive, answers of 100-260."""
    random_words = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(f"w{random_words.randrange(NUM_WORDS)}" for _ in range(random_words.randint(least, most)))

    pairs = []
    for cell in range(num_cells):
        user, directives = text(55, 125), [text(35, 65) for _ in range(num_answers)]
        answers = [text(99, 259) for _ in range(num_answers)]
        for i, directive in enumerate(directives):
            prompt = [{"role": "system", "content": directive}, {"role": "user", "content": user}]
            for j, other in enumerate(answers):
                if i != j:
                    chosen, rejected = ([{"role": "assistant", "content": one}] for one in (answers[i], other))
                    pairs.append({"cell_id": cell, "prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs


@dataclass(frozen=True)
class Contender:
    """One way to train the pairs."""

    name: str
    trainer: type[DPOTrainer]


TRL, GRID = Contender("TRL", DPOTrainer), Contender("GridTrainer", GridTrainer)


# ---------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Clock:
    """What time it is, in seconds."""

    wall: float
    process: float
    """CPU time of this process: steadier on a machine that others use as well."""

    def __sub__(self, other: Clock) -> Clock:
        return Clock(self.wall - other.wall, self.process - other.process)

    def __add__(self, other: Clock) -> Clock:
        return Clock(self.wall + other.wall, self.process + other.process)


@dataclass(frozen=True)
class Result:
    """One epoch."""

    reference: Clock
    """0 for TRL, whose reference pass is in `train`."""
    train: Clock
    peak_bytes: int
    """CUDA: allocated at most; CPU: growth of the resident set."""

    @property
    def total(self) -> Clock:
        return self.reference + self.train


def run(contender: Contender, options: argparse.Namespace, num_answers: int, pairs: Sequence[dict[str, Any]]) -> Result:
    """One epoch from the same random weights."""
    torch.manual_seed(0)
    pairs_per_cell = num_answers * (num_answers - 1)
    is_grid = issubclass(contender.trainer, GridTrainer)
    step_pairs = max(1, options.step_pairs // pairs_per_cell) * pairs_per_cell
    with torch.device(options.device):
        config = Qwen3Config(**SHAPES[options.shape], tie_word_embeddings=True, max_position_embeddings=1024)
        model = Qwen3ForCausalLM(config).to(getattr(torch, options.dtype))
    args = DPOConfig(
        output_dir=tempfile.gettempdir(),
        per_device_train_batch_size=options.grid_pairs if is_grid else options.trl_pairs,
        gradient_accumulation_steps=max(1, step_pairs // options.trl_pairs),  # the grid trainer finds its own
        num_train_epochs=1,
        learning_rate=1e-4,
        bf16=options.dtype == "bfloat16" and options.device == "cuda",
        use_cpu=options.device == "cpu",
        gradient_checkpointing=options.gradient_checkpointing,
        dataloader_pin_memory=options.device == "cuda",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_steps=10,
        log_level="error",
    )
    data: list[Any] = list(pairs)
    reference, extra = Clock(0, 0), dict[str, int]()
    if is_grid:
        extra = {"step_pairs": step_pairs}
        data, reference = with_reference(model, make_grid(pairs), options)
    before = reset_peak(options.device)
    trainer = contender.trainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(data),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    start = now(options.device)
    trainer.train()
    seconds = now(options.device) - start
    return Result(reference, seconds, peak(options.device) - before)


def with_reference(model: Any, rows: list[Row], options: argparse.Namespace) -> tuple[list[Row], Clock]:
    """The rows with what a copy of the model gives to them, and the time that took."""
    reference = copy.deepcopy(model).eval().requires_grad_(False)
    prepare_model(reference)
    start = now(options.device)
    for row, logps in zip(rows, answer_logps(reference, rows, 2 * options.grid_pairs), strict=True):
        row["ref_logps"] = logps
    return rows, now(options.device) - start


def now(device: str) -> Clock:
    if device == "cuda":
        torch.cuda.synchronize()
    return Clock(time.perf_counter(), time.process_time())


def reset_peak(device: str) -> int:
    """Starts a new peak and returns what is held already, in bytes."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return 0
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
    return _status("VmRSS")


def peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


# ---------------------------------------------------------------- reporting


def compare(contenders: Sequence[Contender], options: argparse.Namespace, num_answers: int) -> None:
    """Runs the contenders in turn, `rounds` times, and prints medians."""
    pairs = make_pairs(options.cells, num_answers)
    results: dict[str, list[Result]] = {one.name: [] for one in contenders}
    if options.warm_up:
        for one in contenders:
            run(one, options, num_answers, pairs[: 2 * num_answers * (num_answers - 1)])
    start = time.monotonic()
    for at in range(options.rounds):
        if at and time.monotonic() - start > options.seconds / len(options.answers):
            break
        for one in contenders:
            result = run(one, options, num_answers, pairs)
            results[one.name].append(result)
            print(
                f"  round {at + 1}  {one.name:31} reference {result.reference.wall:6.2f} s, training "
                f"{result.train.wall:6.2f} s, {len(pairs) / result.total.wall:7.2f} pairs/s; "
                f"CPU time {result.total.process:6.2f} s",
                flush=True,
            )
    base = results[contenders[0].name]
    print(f"K = {num_answers}: {options.cells} cells, {len(pairs)} pairs, medians of {len(base)} rounds")
    print(
        f"  {'':31} {'pairs/s':>8} {'ratio':>6} {'(rounds)':>11} {'CPU time':>9} {'no reference':>13} {'peak MiB':>9}"
    )
    for name, found in results.items():
        rate = len(pairs) / statistics.median(one.total.wall for one in found)
        both = list(zip(base, found, strict=True))
        ratios = [first.total.wall / one.total.wall for first, one in both]
        process = statistics.median(first.total.process / one.total.process for first, one in both)
        bare = statistics.median(first.train.wall / one.train.wall for first, one in both)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        memory = statistics.median(one.peak_bytes for one in found) / 2**20
        line = f"  {name:31} {rate:8.2f} {statistics.median(ratios):6.2f} {spread:>11} {process:9.2f} {bare:13.2f}"
        print(f"{line} {memory:9.0f}{_utilisation(name, rate, options, num_answers)}", flush=True)


def _utilisation(name: str, rate: float, options: argparse.Namespace, num_answers: int) -> str:
    """Share of peak, counting the linear layers' work (2 FLOP per weight) for each token that has to be run.

    Three passes: policy, gradient of its activations (LoRA: none of the weights), reference; four with gradient
    checkpointing. Means: 150 prompt tokens, 180 of an answer. Padding and attention count as no work.
    """
    if not options.peak_tflops:
        return ""
    shape, k = SHAPES[options.shape], num_answers
    hidden, heads = shape["hidden_size"], shape["head_dim"] * shape["num_attention_heads"]
    attention = hidden * (2 * heads + 2 * shape["head_dim"] * shape["num_key_value_heads"])
    layers = shape["num_hidden_layers"] * (attention + 3 * hidden * shape["intermediate_size"])
    if name == "TRL":
        tokens, answers = 2.0 * 330, 2.0 * 180
    else:
        tokens, answers = (k * 150 + k * k * 180) / (k * (k - 1)), k * 180 / (k - 1)
    passes = 4 if options.gradient_checkpointing else 3
    flops = 2 * passes * (tokens * layers + answers * hidden * shape["vocab_size"]) * rate
    return f"   {flops / 1e12:.1f} TFLOP/s, {flops / 1e10 / options.peak_tflops:.1f}% of peak"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--answers", type=int, nargs="+", default=[3, 5], help="answers per cell, K")
    parser.add_argument("--cells", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further round is begun")
    parser.add_argument("--step-pairs", type=int, default=24, help="pairs per optimizer step, at most")
    parser.add_argument("--trl-pairs", type=int, default=4, help="pairs per forward pass of TRL")
    parser.add_argument("--grid-pairs", type=int, default=12, help="pairs per forward pass of GridTrainer")
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--peak-tflops", type=float, help="of the device, to print the share of it that is reached")
    parser.add_argument("--warm-up", action="store_true", help="a short run of each first")
    options = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for num_answers in options.answers:
        compare((TRL, GRID), options, num_answers)


if __name__ == "__main__":
    main()
