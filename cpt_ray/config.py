"""The run file: one YAML of plain data, checked before anything expensive starts.

`key=value` on the command line overrides one entry (`train.beta=0.2`). Unknown keys are errors.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    StringConstraints,
    ValidationError,
    model_validator,
)

from cpt_ray.errors import UserError
from cpt_ray.records import content_id
from cpt_ray.rubric import read_yaml, validation_lines

EMBEDDED = "embedded"
"""The model name that stands for the tiny model shipped with the package."""
EMBEDDED_PATH = Path(__file__).parent / "embedded" / "model"

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]


class Range(NamedTuple):
    """How many there may be; in the run file a number, or [fewest, most]."""

    least: int
    most: int

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least}-{self.most}"


def _read_range(value: Any, least: int = 1) -> Range:
    pair = [value, value] if isinstance(value, int) else value
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(one) is int for one in pair)):
        raise ValueError(f"found {value!r}; expected a number, or [fewest, most]")
    if not least <= pair[0] <= pair[1] or pair[1] < 1:
        raise ValueError(
            f"found {value!r}; expected {least} or more as the fewest, and as many or more, not 0, as the most"
        )
    return Range(*pair)


_AS_READ = PlainSerializer(lambda one: one.least if one.least == one.most else list(one))
OneOrMore = Annotated[Range, BeforeValidator(_read_range), _AS_READ]
NoneOrMore = Annotated[Range, BeforeValidator(functools.partial(_read_range, least=0)), _AS_READ]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PromptsConfig(_Section):
    """Where the prompts come from."""

    source: str
    """A .jsonl, .parquet or .csv file, or the name of a Hugging Face data set."""
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


def _read_url(value: str) -> str:
    if not re.match(r"https?://", value, re.IGNORECASE):
        raise ValueError(f"found {value[:60]!r}; begin it with http:// or https://")
    if not re.fullmatch(r"\w+://[^\s/?#]+(?:[/][^\s?#]*)?", value):
        raise ValueError(f"found {value[:60]!r}; expected http://HOST:PORT/PATH, without spaces")
    return value


class EndpointConfig(_Section):
    """An OpenAI-compatible server that answers instead of an engine here. Limits hold for the role as a whole."""

    base_url: Annotated[str, AfterValidator(_read_url)]
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the key; the key itself is written nowhere."""
    concurrency: Positive = 32
    """Requests under way at a time."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Prompt (estimated) plus the most that the answer may take."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300
    """For one try."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """After 408, 409, 429, 5xx, no connection or a broken answer; waits as Retry-After says, else longer each time."""
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """What the server calls the most tokens of an answer: OpenAI the first, many older servers only the second."""
    extra_body: dict[str, Any] = {}
    """More fields of every request."""


class PriceConfig(_Section):
    """What a role costs, in one currency of your own; enters the ledger, changes nothing else."""

    prompt: Annotated[float, Field(ge=0)] = 0
    """Per million prompt tokens that were not in the prefix cache."""
    cached: Annotated[float, Field(ge=0)] = 0
    """Per million prompt tokens from the cache."""
    generated: Annotated[float, Field(ge=0)] = 0
    """Per million generated tokens."""
    engine_hour: Annotated[float, Field(ge=0)] = 0
    """Per engine and hour at work."""


JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Is in the environment of what `ray job submit` runs."""
SPEED_ARGUMENTS = {
    "block_size",
    "disable_log_stats",
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "pipeline_parallel_size",
    "tensor_parallel_size",
}
"""Engine arguments that say how fast a model answers, not what."""


class ModelConfig(_Section):
    """A model role: which model, on which resources, in which engine."""

    model: str
    """"embedded", a folder, a Hugging Face name, or the endpoint's name for it."""
    endpoint: EndpointConfig | None = None
    """Ask this server; `engine` and `num_gpus` are then not used."""
    price: PriceConfig = PriceConfig()
    num_actors: OneOrMore = Range(1, 1)
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
        if self.endpoint:
            return content_id(self.model, self.endpoint.base_url, self.endpoint.extra_body)
        if not folder.is_dir():
            return self.model
        return content_id([[one.name, file_fingerprint(one)] for one in sorted(folder.iterdir()) if one.is_file()])

    @property
    def policy_key(self) -> str:
        """Changes when the model or the rendering of its conversations does."""
        return content_id(self.identity, self.chat_template_kwargs)

    @property
    def answer_key(self) -> str:
        """Changes when this role's answers would: with sampling and with engine arguments that are not about speed."""
        told = {name: value for name, value in self.engine.items() if name not in SPEED_ARGUMENTS}
        return content_id(self.policy_key, self.sampling.model_dump(), told)

    @property
    def engine_key(self) -> str:
        """Two roles with the same one can share an engine."""
        fields = {"model", "endpoint", "num_actors", "num_cpus", "num_gpus", "engine"}
        return content_id(self.model_dump(mode="json", include=fields), self.chat_template_kwargs)


class JudgeConfig(ModelConfig):
    """A model role that grades."""

    mode: Literal["logprobs", "rationale"] = "logprobs"
    """"logprobs": one token per criterion, graded by the probabilities of the level numbers. "rationale": a reason,
    then a level, for every criterion, in JSON that the engine is made to write; for models that need to think."""
    votes: Positive = 1
    """Rationales per answer; their mean counts."""

    @property
    def answer_key(self) -> str:
        """Changes when the verdicts would."""
        if self.mode == "logprobs":  # nothing is sampled
            return super().answer_key
        return content_id(super().answer_key, self.mode, self.votes)


def file_fingerprint(path: Path) -> str:
    """Hash of a file's size and its first and last MiB: weights are told apart without reading all of them."""
    return _fingerprint(path, path.stat().st_mtime_ns)


@functools.cache
def _fingerprint(path: Path, _modified_ns: int) -> str:
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
    shard_rows: Positive = 1024
    """Rows that an engine has under way, in two files of half as many (while one runs out, the other keeps it full):
    what is lost at most when something dies. Four times the engine's max_num_seqs keep it full all the time. Shards of
    another size are other shards: a changed number does all of a run anew, unless it fits in one shard either way."""
    combine: tuple[tuple[str, str], ...] = ()
    """Pairs of rubric ids that are also asked for at once, in one directive."""
    control: Annotated[float, Field(ge=0, lt=1)] = 0
    """Share of cells in which the policy's own answer to the bare prompt, or under a neutral directive, takes part as
    one more level: chosen where no rubric's directive is given, rejected where one is."""
    neutral_directives: tuple[str, ...] = ("You are a helpful assistant.",)
    """Half of the control rows have one of these, half have none."""
    aggregate: Literal["mean", "median", "majority", "min"] = "mean"
    """How the grades of several judges (`judges`) become one."""
    near_duplicates: Fraction | None = None
    """Drop an answer whose words resemble an earlier one's at the same level this much (Jaccard, by MinHash)."""
    max_length_ratio: Annotated[float, Field(gt=1)] | None = None
    """Drop a pair (and its twin) whose longer answer has over this many times the tokens of the shorter."""


class LoraConfig(_Section):
    """The adapter."""

    r: Positive = 16
    alpha: Positive = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    quantize: Literal["nf4"] | None = None
    """"nf4" keeps the frozen weights in 4 bits while it trains (QLoRA; needs bitsandbytes); the export is not."""


Loss = Literal["sigmoid", "ipo", "hinge", "apo_zero", "apo_down", "sigmoid_norm", "sft"]


class TrainConfig(_Section):
    """DPO."""

    num_workers: OneOrMore = Range(2, 2)
    """[min, max] goes on with fewer workers when nodes are lost and with more when they come."""
    use_gpu: bool = False
    resources_per_worker: dict[str, float] | None = None
    loss: Annotated[dict[Loss, float], Field(min_length=1)] = {"sigmoid": 1.0}
    """Weights of TRL's losses of these names."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    epochs: Annotated[float, Field(gt=0)] = 1
    batch_size: Positive = 32
    """Pairs per optimizer step over all workers, on average."""
    micro_batch_size: Positive = 4
    """Pairs per worker and forward pass, at most; the rest is gradient accumulation."""
    max_length: Positive = 2048
    """Tokens of prompt plus answer; a longer pair is rejected, never cut."""
    max_pairs: Positive | None = None
    """Train on at most this many pairs, twins kept together, chosen by hash."""
    held_out: Annotated[int, Field(ge=0)] = 200
    """Pairs (of whole prompts, a tenth at most) that are not trained on: metrics are measured on them."""
    lora: LoraConfig | None = LoraConfig()
    """None tunes all weights."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    gradient_checkpointing: bool = True
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """"fsdp" splits the frozen weights among the workers (FSDP2); "ddp" gives each worker all of them."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    save_steps: Positive = 50
    """Optimizer steps between checkpoints; what is held out is measured as often."""
    checkpoints: str | None = None
    """Where checkpoints are kept, a folder or a URI (s3://, gs://, hdfs://); in the run directory unless given."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a died worker group is started again from the last checkpoint."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where loss and metrics go; TensorBoard's files are in the run directory."""

    @property
    def worker_resources(self) -> dict[str, float]:
        """Of one worker, by Ray's names."""
        return self.resources_per_worker or {"GPU" if self.use_gpu else "CPU": 1}


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


Form = Literal["film", "gated_lora", "soft_prompt"]
"""How z gets into a conditional policy."""
Kind = Literal["high", "low", "middle", "mixture", "noisy"]
"""Taste of a user: an end of one rubric, a score in its middle, a blend of two, an end with wrong choices."""


class SteerConfig(_Section):
    """Few-shot steering: what is learned from simulated users, and how it is tried on held-out ones."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = get_args(Kind)
    """Tastes of the users, who have them in turn."""
    answers: AnswersConfig | None = None
    """Where users' answers come from; the run's own generations and evaluation unless given."""
    users: Positive = 2000
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
    forms: tuple[Form, ...] = ("gated_lora",)
    """Conditional policies (NP-DPO) that are trained; only gated_lora's answers are tried, by folded adapters."""
    policy_beta: Annotated[float, Field(gt=0)] = 0.05
    policy_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    policy_steps: Positive = 1000
    policy_users: Positive = 4
    """Users per step over all workers, without their twins."""
    policy_answers: Annotated[int, Field(ge=2)] = 8
    """Answers of each of them in a step, of one prompt if it has as many; all pairs of a prompt count."""
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
    prior: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Rubric id to how likely a user cares about it before any choice, against 1 of those not named."""


class ServeConfig(_Section):
    """Where the tuned model listens, and how much of it there is."""

    host: str = "127.0.0.1"
    """Anything but loopback needs keys (`cpt keys add`), or --insecure."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: NoneOrMore = Range(1, 1)
    """[min, max] follows the load; with min 0 an idle server holds no engine, and the next request waits for one."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 64
    """Requests in flight per replica that [min, max] aims at."""
    idle_seconds: Annotated[float, Field(ge=0)] = 600
    """How long a replica too many is kept."""
    route_by: Literal["load", "configuration"] = "load"
    """Which replica gets a request: the one with the fewest, or the one that had the same configuration (HAProxy's)."""
    configurations: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")], dict[str, str | float]] = {}
    """Saved configurations: name to {rubric: level or score}; asked for by name, or as the model `cpt:NAME`."""
    frontend: dict[str, Any] = {}
    """Arguments of vLLM's OpenAI server (enable_auto_tool_choice, tool_call_parser, ...), by vLLM's own names."""
    base: bool = False
    """Serves the untuned model too, at /base: as many replicas again."""
    preferences: Literal["directive", "gated_lora", "soft_prompt"] = "directive"
    """What steers a chat that names a user's choices: the inferred directive, or what `cpt steer fit` trained."""
    adapters: dict[str, str] = {}
    """Tuned models over policy.model, in place of the merged one: name to adapter folder or URI, the default first."""


class TuneConfig(_Section):
    """What tuning a policy needs, on whichever pairs."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    run_dir: str = ""
    """Where all of it is written; "runs/<name>" unless given. On a cluster: a folder every node sees."""
    seed: int = 0
    policy: ModelConfig
    """The model that is tuned, evaluated and served; its untuned form is the reference."""
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_run_dir(cls, data: Any) -> Any:
        if isinstance(data, dict) and not data.get("run_dir") and isinstance(data.get("name"), str):
            return {**data, "run_dir": f"runs/{data['name']}"}
        return data


class PreferencesConfig(_Section):
    """A preference set in TRL's format: prompt, chosen, rejected, as text or as messages."""

    source: str
    """A .jsonl, .parquet or .csv file, or the name of a Hugging Face data set."""
    data_split: str = "train"


class PreferenceRunConfig(TuneConfig):
    """`cpt train` alone, on any preference set."""

    preferences: PreferencesConfig


class RunConfig(TuneConfig):
    """One run of the whole loop."""

    rubrics: Annotated[tuple[str, ...], Field(min_length=1)]
    """Rubric files, or folders of them."""
    prompts: PromptsConfig
    writer: ModelConfig
    director: ModelConfig
    """The writer unless given; without a model of its own, the writer with these entries changed."""
    judge: JudgeConfig
    """Likewise."""
    judges: tuple[JudgeConfig, ...] = ()
    """More judges, whose grades of the written answers count beside the judge's (synthesis.aggregate)."""
    synthesis: SynthesisConfig = SynthesisConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    steer: SteerConfig = SteerConfig()
    serve: ServeConfig = ServeConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_roles(cls, data: Any) -> Any:
        if isinstance(data, dict):
            data = dict(data)
            for role in ("director", "judge"):
                given = data.get(role) or {}
                if isinstance(given, dict) and "model" not in given and isinstance(data.get("writer"), dict):
                    data[role] = data["writer"] | given
        return data

    @model_validator(mode="after")
    def _only_an_engine_is_tuned(self) -> Self:
        if self.policy.endpoint:
            raise ValueError("policy.endpoint: the policy is tuned and served here; give a model with weights")
        return self

    @property
    def rubric_paths(self) -> list[Path]:
        """`rubrics` as paths."""
        return [Path(one) for one in self.rubrics]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with its overrides; UserError with a line per problem."""
    config = load_any_config(path, overrides)
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: a run file with `preferences` can be trained and pushed only; give rubrics instead")
    return config


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | PreferenceRunConfig:
    """The run file of a whole loop or, if it names `preferences`, of a training alone."""
    data = read_yaml(path)
    for override in overrides:
        _apply(data, override)
    kind: type[RunConfig | PreferenceRunConfig] = PreferenceRunConfig if "preferences" in data else RunConfig
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        lines = validation_lines(error, kind)
        copies = ("director", "judge") if any(line.startswith("writer") for line in lines) else ()
        given = {override.partition("=")[0] for override in overrides}
        told = [(line.partition(":")[0], line) for line in lines if not line.startswith(copies)]
        problems = [f"{'override' if name in given else path}: {line}" for name, line in told]
        raise UserError("\n".join(problems)) from None
    if JOB_ENV in os.environ and not os.path.isabs(config.run_dir):
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
