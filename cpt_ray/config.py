"""The run file: one YAML of plain data, checked before anything expensive starts.

`key=value` on the command line overrides one entry (`train.beta=0.2`). Unknown keys are errors.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cpt_ray.errors import UserError
from cpt_ray.records import content_id
from cpt_ray.rubric import read_yaml, validation_lines

EMBEDDED = "embedded"
"""The model name that stands for the tiny model shipped with the package."""
EMBEDDED_PATH = Path(__file__).parent / "embedded" / "model"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptsConfig(_Section):
    """Where the prompts come from."""

    source: str
    """A .jsonl, .json, .parquet or .csv file, or the name of a Hugging Face data set."""
    column: str = "prompt"
    data_split: str = "train"
    """Which split of a Hugging Face data set is read."""
    held_out: Fraction = 0.15
    """Share of prompts kept for evaluation, chosen by the hash of their text."""
    limit: Positive | None = None
    """Read at most this many."""


class SamplingConfig(_Section):
    """How answers are sampled."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024


class ModelConfig(_Section):
    """A model role: which model, on which resources, in which engine."""

    model: str
    """"embedded", a folder, or a Hugging Face name."""
    num_actors: Positive | tuple[Positive, Positive] = 1
    """Engine actors; [min, max] lets the pool grow with the cluster."""
    num_cpus: Annotated[float, Field(gt=0)] = 1
    """Logical CPUs per engine actor."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs per engine actor; set engine.tensor_parallel_size to the same number if it is above 1."""
    engine: dict[str, Any] = {}
    """vLLM engine arguments (dtype, max_model_len, gpu_memory_utilization, ...), checked by vLLM's own names."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}."""
    sampling: SamplingConfig = SamplingConfig()

    @property
    def path(self) -> str:
        """What the engine and transformers load."""
        return str(EMBEDDED_PATH) if self.model == EMBEDDED else self.model

    @property
    def identity(self) -> str:
        """Changes when the model does: its name, or what is in its folder."""
        folder = Path(self.path)
        if not folder.is_dir():
            return self.model
        return content_id([[one.name, _fingerprint(one)] for one in sorted(folder.iterdir()) if one.is_file()])

    @property
    def answer_key(self) -> str:
        """Changes when this role's answers would: model, sampling or template arguments."""
        return content_id(self.identity, self.sampling.model_dump(), self.chat_template_kwargs)

    @property
    def engine_key(self) -> str:
        """Two roles with the same one can share an engine."""
        return content_id(self.model_dump(mode="json", exclude={"sampling", "chat_template_kwargs"}))


def _fingerprint(path: Path) -> str:
    """Hash of a file's size and its first and last MiB: weights are told apart without reading all of them."""
    size, part = path.stat().st_size, 1 << 20
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(part))
        file.seek(max(0, size - part))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:20]}"


class SynthesisConfig(_Section):
    """How much is written."""

    samples: Positive = 1
    """Answers per (prompt, rubric, level)."""
    paraphrases: Annotated[int, Field(ge=2)] = 6
    """Directives wanted per (rubric, level) where the rubric gives none."""
    held_out_directives: Fraction = 0.3
    """Share of them kept for evaluation."""
    shard_rows: Positive = 256
    """Rows per shard: what is lost at most when something dies, and the unit of parallelism."""


class LoraConfig(_Section):
    """The adapter."""

    r: Positive = 16
    alpha: Positive = 16
    target_modules: str | tuple[str, ...] = "all-linear"


class TrainConfig(_Section):
    """DPO."""

    num_workers: Positive = 2
    use_gpu: bool = False
    resources_per_worker: dict[str, float] | None = None
    beta: Annotated[float, Field(gt=0)] = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Positive = 32
    """Pairs per optimizer step over all workers."""
    micro_batch_size: Positive = 4
    """Pairs per worker and forward pass; the rest is gradient accumulation."""
    max_length: Positive = 2048
    """Tokens of prompt plus answer; a longer pair is rejected, never cut."""
    max_pairs: Positive | None = None
    """Train on at most this many pairs, twins kept together, chosen by hash."""
    lora: LoraConfig | None = LoraConfig()
    """None tunes all weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    save_steps: Positive = 50
    """Optimizer steps between checkpoints."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a died worker group is started again from the last checkpoint."""


class EvaluateConfig(_Section):
    """How much is evaluated."""

    prompts: Positive = 32
    """Held-out prompts, at most."""
    directives: Positive = 1
    """Held-out directives per (prompt, rubric, level)."""
    bootstrap: Positive = 1000
    """Resamples (of prompts) behind each 95% interval."""


class AnswersConfig(_Section):
    """Graded answers that come with the prompts' data, in the shape of UltraFeedback: a list of answers per row."""

    list: str
    """Column of the answers."""
    text: str
    """Field of an answer that holds its text."""
    scores: Annotated[dict[str, str], Field(min_length=1)]
    """Rubric id to the field of its grade, with dots between nested names; what is no number is ungraded."""
    scale: tuple[float, float] = (1, 5)
    """Lowest and highest grade; they become the rubric's lowest and highest anchor."""


class SteerConfig(_Section):
    """Few-shot steering: what is learned from simulated users, and how it is tried on held-out ones."""

    kinds: Annotated[tuple[Literal["high", "low", "middle", "mixture", "noisy"], ...], Field(min_length=1)] = (
        "high",
        "low",
        "middle",
        "mixture",
        "noisy",
    )
    """Tastes of the users: an end of one rubric, a score in its middle, a blend of two, an end with wrong choices."""
    answers: AnswersConfig | None = None
    """Where users' answers come from; the run's own generations and evaluation unless given."""
    users: Positive = 600
    """Users to learn from; each has a twin who chooses the other way."""
    test_users: Positive = 100
    """Held-out users, their twins included: new tastes, on prompts that nothing was learned from."""
    held_out_rubrics: tuple[str, ...] = ()
    """Rubric ids that only held-out users care about."""
    choices: Positive = 10
    targets: Positive = 20
    """Pairs that a user's model is trained or tried on, beside the choices."""
    conflicting: Annotated[float, Field(ge=0.75, le=1)] = 0.8
    """Least share of pairs on which users disagree."""
    embedder: ModelConfig | None = None
    """Makes the embeddings of answers; the tuned policy unless given."""
    size: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    """Width of the models that read choices."""
    variational: bool = False
    steps: Positive = 600
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    batch_users: Positive = 32
    """Users per step over all workers, without their twins."""
    seeds: Positive = 5
    """Models that are trained; results are over all of them."""
    forms: tuple[Literal["film", "gated_lora", "soft_prompt"], ...] = ("gated_lora",)
    """Conditional policies (NP-DPO) that are trained; only gated_lora's answers are tried, by folded adapters."""
    policy_beta: Annotated[float, Field(gt=0)] = 0.05
    policy_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    policy_steps: Positive = 250
    policy_users: Positive = 4
    """Users per step over all workers, without their twins."""
    policy_pairs: Positive = 4
    """Target pairs of each of them in a step."""
    num_workers: Positive = 1
    use_gpu: bool = False
    samples: Positive = 4
    """Answers per held-out prompt and configuration that satisfaction is measured on."""
    best_of: Positive = 16
    """Answers among which re-ranking chooses."""
    certainty: Fraction = 0.6
    """Probability from which on an inferred level is acted upon."""
    lapse: Fraction = 0.1
    """Share of choices that say nothing, as directive inference takes it."""


class ServeConfig(_Section):
    """Where the tuned model listens."""

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: Positive = 1


class RunConfig(_Section):
    """One run of the whole loop."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: str = ""
    """Where all of it is written; "runs/<name>" unless given. On a cluster: a folder every node sees."""
    seed: int = 0
    rubrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rubric files, or folders of them."""
    prompts: PromptsConfig
    writer: ModelConfig
    director: ModelConfig
    """The writer unless given."""
    judge: ModelConfig
    """The writer unless given."""
    policy: ModelConfig
    """The model that is tuned, evaluated and served; its untuned form is the reference."""
    synthesis: SynthesisConfig = SynthesisConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    steer: SteerConfig = SteerConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_roles(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            for role in ("director", "judge"):
                if data.get(role) is None and "writer" in data:
                    data[role] = data["writer"]
            if not data.get("run_dir") and isinstance(data.get("name"), str):
                data["run_dir"] = f"runs/{data['name']}"
        return data

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        step = self.train.num_workers * self.train.micro_batch_size
        if self.train.batch_size % step:
            raise ValueError(
                f"train.batch_size: {self.train.batch_size}; num_workers x micro_batch_size = {step} must divide it"
            )
        return self

    @property
    def rubric_paths(self) -> list[Path]:
        """`rubrics` as paths."""
        return [Path(one) for one in self.rubrics]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with its overrides; UserError with a line per problem."""
    data = read_yaml(path)
    for override in overrides:
        _apply(data, override)
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        lines = validation_lines(error, RunConfig)
        copies = ("director", "judge") if any(line.startswith("writer") for line in lines) else ()
        raise UserError("\n".join(f"{path}: {line}" for line in lines if not line.startswith(copies))) from None
    if os.environ.get("RAY_JOB_ID") and not os.path.isabs(config.run_dir):
        raise UserError(
            f"{path}: run_dir: {config.run_dir!r} is relative, and inside a Ray job that is a folder that goes away "
            "with the job; give an absolute path that every node sees (run_dir=/shared/runs/NAME)"
        )
    return config


def _apply(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override!r} is not key=value (for example train.beta=0.2)")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    for part in parts[:-1]:
        inner = data.get(part)
        if inner is None:
            inner = data[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {part!r} holds a value, not a section")
        data = inner
    data[parts[-1]] = value
