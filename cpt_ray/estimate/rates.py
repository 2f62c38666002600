"""How fast models answer and how much they write: from the ledger of an earlier run, else assumed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpt_ray.chat.conversations import ChatMessage, policy_messages, token_ids
from cpt_ray.config import ModelConfig
from cpt_ray.engines.roles import is_here, roles_of
from cpt_ray.errors import UserError
from cpt_ray.plan import Plan, run_info
from cpt_ray.tables.rundir import LEDGER_FILE, RUN_INFO_FILE, RunDir

ANSWER_SHARE = 0.5
"""Of max_tokens that an answer is taken to have."""
PAIR_SHARE = 2 / 3
"""Of the pairs that there would be if each prompt had all its grids."""
CHARACTERS_PER_TOKEN = 4
"""Where the model's tokenizer is not on this machine."""
CPU_FLOPS, GPU_FLOPS = 0.12e12, 100e12
"""Of one CPU that computes bfloat16, and of one GPU like the H100, at 2 per parameter and token of prompt or answer."""
TRAINING_PASSES = 4
"""Forward passes that one step of training takes as long as, with the reference's pass."""
PARAMETERS = 7e9
"""Of a model whose name and files do not say."""
ENDPOINT_TOKENS = 50
"""Written tokens a second of each of an endpoint's concurrent requests."""
ROW_RATE = 2000
"""Answers a second of one CPU that are measured or paired."""
START_SECONDS, GPU_START_SECONDS = 15.0, 120.0
"""Until a pool of engines is ready."""
ASSUMED = (
    f"answers of {ANSWER_SHARE:.0%} of max_tokens, as many as at most; {PAIR_SHARE:.0%} of the pairs; "
    f"{CPU_FLOPS / 1e12:g} TFLOP/s of a CPU, {GPU_FLOPS / 1e12:g} of a GPU, 2 per parameter and token, "
    f"{2 * TRAINING_PASSES} in training; {START_SECONDS:.0f} s to start engines on CPUs, {GPU_START_SECONDS:.0f} s on "
    f"GPUs; {ENDPOINT_TOKENS} tokens/s for each concurrent request of an endpoint; {CHARACTERS_PER_TOKEN} characters a "
    "token where no tokenizer is at hand; no prefix cache"
)


@dataclass(kw_only=True)
class Stage:
    """What one stage of a run will ask for. Rows are as the ledger counts them: units, grades, trials, pairs ..."""

    name: str
    role: str
    """In the run file; "" where no model is called."""
    model: ModelConfig
    """For its resources, where no model is called."""
    rows: int
    most: int
    """Rows, at most."""
    requests: int = 0
    prompt_tokens: int = 0
    written: int = 0
    """Tokens."""
    most_written: int = 0
    """Of `most` rows, each with all the tokens that sampling allows."""
    files: int = 0
    """Shards of tables."""
    there: int = 0
    """Those of them that are complete already."""
    is_done: bool = False
    """Of what has no shards of its own."""
    seconds: float = 0.0
    """On the clock, for what is not there yet."""
    cost: float | None = None
    """Of what is not there yet; None without a price."""

    @property
    def engines(self) -> int:
        """As many as the run file allows and there are shards for."""
        most = self.model.num_actors.most
        return min(most, self.files) if self.files else most

    @property
    def left(self) -> float:
        """Share of the stage that is not done yet."""
        return 1 - self.there / self.files if self.files else 1.0 - self.is_done

    @property
    def place(self) -> str:
        """Where it runs, in words."""
        if self.model.endpoint:
            return "endpoint"
        each = f"{self.model.num_gpus:g} GPU" if self.model.num_gpus else f"{self.model.num_cpus:g} CPU"
        return f"{self.engines} x {each}"


@dataclass
class Rates:
    """What an earlier run's ledger says, of the roles whose model and resources are the same."""

    source: str = ""
    """The run's directory; "" without one."""
    ledger: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    epochs: float = 1.0
    """Of that run's training."""
    same: frozenset[str] = frozenset()
    """Roles."""
    has_same_rubrics: bool = False
    assumed: list[str] = field(default_factory=list)
    """Stages that nothing was known of."""

    @classmethod
    def read(cls, plan: Plan, run: RunDir, is_named: bool) -> Rates:
        """The rates of a run; without a ledger there none, or UserError if the user has named it."""
        info, ledger = run.read_yaml(RUN_INFO_FILE), run.read_json(LEDGER_FILE)
        if not ledger or not isinstance(info, dict) or "config" not in info:
            if is_named:
                raise UserError(f"--rates: {run.path}: no ledger of a run is there; give a run's directory (runs/NAME)")
            return cls()
        config, hashes, own = info["config"], info.get("hashes", {}), run_info(plan)["hashes"]
        given = config | {f"judges[{at}]": judge for at, judge in enumerate(config.get("judges", []))}

        def is_same(name: str, role: ModelConfig) -> bool:
            other = given.get(name)
            if not isinstance(other, Mapping):
                return False
            is_model = other.get("model") == role.model
            if name in own["models"]:  # by what is in its files, where that is known
                is_model = hashes.get("models", {}).get(name) == own["models"][name]
            resources = role.model_dump(mode="json", include={"endpoint", "num_cpus", "num_gpus"})
            return is_model and all(other.get(key) == value for key, value in resources.items())

        same = frozenset(name for name, role in roles_of(plan.config).items() if is_same(name, role))
        epochs = config.get("train", {}).get("epochs", 1.0)
        return cls(str(run.path), ledger, epochs, same, hashes.get("rubrics") == own["rubrics"])

    def line(self) -> str:
        """Where they come from, in words."""
        if not self.source:
            return "none (no ledger yet); all are assumed"
        stages = ", ".join(dict.fromkeys(self.assumed))
        return f"{self.source}" + (f"; nothing there of the same model and resources for: {stages}" if stages else "")

    def _entry(self, stage: str, role: str) -> Mapping[str, Any]:
        return self.ledger.get(stage, {}) if not role or role in self.same else {}

    def _of_rubrics(self, stage: str, role: str) -> Mapping[str, Any]:
        """An entry that is worth nothing for other rubrics."""
        return self._entry(stage, role) if self.has_same_rubrics else {}

    @property
    def growth(self) -> float | None:
        """Answers of all passes for each of the first pass; None if no such run was finished."""
        if "pair" not in self.ledger or not (entry := self._of_rubrics("write", "writer")):
            return None
        controls = self.ledger.get("control", {}).get("rows_in", 0)
        return float(entry["rows_in"] / (self.ledger["plan"]["rows_out"] - controls))

    @property
    def pairs_per_answer(self) -> float | None:
        """Pairs to train on for each answer asked for."""
        train, write = self._of_rubrics("train", "policy"), self._of_rubrics("write", "writer")
        return float((train["rows_out"] + train.get("held_out", 0)) / write["rows_in"]) if train and write else None

    @property
    def tokens_per_pair(self) -> float | None:
        """Tokens that an epoch of training runs for each pair."""
        train = self._of_rubrics("train", "policy")
        return float(train["trained_tokens"] / train["rows_out"] / self.epochs) if train.get("rows_out") else None

    def tokens_per_row(self, stage: str, role: str) -> float | None:
        """Tokens written for each row."""
        entry = self._entry(stage, role)
        return entry["generated_tokens"] / entry["rows_in"] if entry.get("generated_tokens") else None

    def answer_tokens(self, stage: str, role: str, model: ModelConfig) -> float:
        """Tokens of an answer."""
        known, most = self.tokens_per_row(stage, role), model.sampling.max_tokens
        return min(known, most) if known else ANSWER_SHARE * most

    def cached_share(self, stage: Stage) -> float:
        """Of the prompts' tokens, those that the prefix cache has."""
        entry = self._entry(stage.name, stage.role)
        return entry.get("cached_tokens", 0) / entry["prompt_tokens"] if entry.get("prompt_tokens") else 0.0

    def engine_seconds(self, stage: Stage) -> float:
        """Seconds of one engine, or of one worker of a training."""
        entry = self._entry(stage.name, stage.role)
        if stage.name == "train" and entry.get("trained_tokens"):
            workers = int(str(entry.get("num_workers", 1)).rpartition("-")[2])
            return float(entry["wall_seconds"] * workers / entry["trained_tokens"] * stage.prompt_tokens)
        if seconds := entry.get("engine_seconds"):
            for counted, amount in (("generated_tokens", stage.written), ("prompt_tokens", stage.prompt_tokens)):
                if amount and entry.get(counted):
                    return float(seconds / entry[counted] * amount)
            return float(seconds / entry["rows_in"] * stage.rows) if entry.get("rows_in") else 0.0
        if not stage.prompt_tokens:  # measured, or paired
            return stage.rows / ROW_RATE
        self.assumed.append(stage.name)
        return _assumed_seconds(stage)


def start_seconds(model: ModelConfig) -> float:
    """Until a pool of a role's engines is ready, as assumed."""
    if model.endpoint:
        return 0.0
    return GPU_START_SECONDS if model.num_gpus else START_SECONDS


def _assumed_seconds(stage: Stage) -> float:
    model, tokens = stage.model, stage.prompt_tokens + stage.written
    if endpoint := model.endpoint:
        seconds = stage.written / (ENDPOINT_TOKENS * endpoint.concurrency)
        limit = endpoint.tokens_per_minute
        return max(seconds, 60 * tokens / limit) if limit else seconds
    flops = model.num_gpus * GPU_FLOPS if model.num_gpus else model.num_cpus * CPU_FLOPS
    passes = TRAINING_PASSES if stage.name == "train" else 1
    return 2 * passes * parameters(model) * tokens / flops


def parameters(model: ModelConfig) -> float:
    """By the model's name (Qwen3-32B), else by the size of its weights in 16 bits, else PARAMETERS."""
    name = Path(model.model).name
    if match := re.search(r"(\d+(?:\.\d+)?)([bm])(?![a-z])", name, re.IGNORECASE):
        return float(match[1]) * (1e9 if match[2] in "bB" else 1e6)
    sizes = [path.stat().st_size for path in Path(model.model).glob("*.safetensors")]
    return sum(sizes) / 2 if sizes else PARAMETERS


class TokenCounter:
    """Counts the tokens of prompts by the role's own tokenizer, if it is on this machine."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, Any] = {}

    def mean(self, role: ModelConfig, conversations: Sequence[list[ChatMessage]]) -> float:
        """Tokens of a conversation that waits for its answer; 0 for none."""
        if not conversations:
            return 0.0
        if role.model not in self._tokenizers:
            self._tokenizers[role.model] = _tokenizer(role)
        if tokenizer := self._tokenizers[role.model]:
            total = float(sum(len(token_ids(tokenizer, each, role.chat_template_kwargs)) for each in conversations))
        else:
            total = sum(len(message["content"]) for each in conversations for message in each) / CHARACTERS_PER_TOKEN
        return total / len(conversations)


def _tokenizer(role: ModelConfig) -> Any:
    """None where it would have to be loaded from a hub or a store, or its GGUF to be converted, or has no chat
    template."""
    if role.endpoint or not is_here(role):
        return None
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(role.path, local_files_only=True)
        token_ids(tokenizer, policy_messages("Be brief.", "Say it."), role.chat_template_kwargs)
    except (OSError, ValueError, TemplateError):
        return None
    return tokenizer
