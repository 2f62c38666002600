"""The run file: one YAML of plain data, checked before anything expensive starts.

`key=value` on the command line overrides one entry (`train.beta=0.2`). A text is taken as it was typed, anything else
is read as YAML (`train.num_workers=[1, 4]`). Unknown keys are errors. Of what a shell replaces in a path, only a
leading `~` is replaced here.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Self, Union, get_args, get_origin

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
    ValidationInfo,
    field_validator,
    model_validator,
)

from cpt_ray import gguf_model
from cpt_ray.errors import UserError, shown
from cpt_ray.tables.address import check_address, scheme_of
from cpt_ray.tables.node_cache import local_copy
from cpt_ray.tables.records import content_id
from cpt_ray.tables.store_path import AnyPath, StorePath
from cpt_ray.yaml_file import StrictLoader, read_yaml, validation_lines

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
    if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(number) is int for number in pair)):
        raise ValueError(f"found {shown(value)}; expected a number, or [fewest, most]")
    if not least <= pair[0] <= pair[1] or pair[1] < 1:
        raise ValueError(
            f"found {value!r}; expected {least} or more as the fewest, and as many or more, not 0, as the most"
        )
    return Range(*pair)


_AS_READ = PlainSerializer(lambda limits: limits.least if limits.least == limits.most else list(limits))
OneOrMore = Annotated[Range, BeforeValidator(_read_range), _AS_READ]
NoneOrMore = Annotated[Range, BeforeValidator(functools.partial(_read_range, least=0)), _AS_READ]


# ---------------------------------------------------------------- paths

_VARIABLE = re.compile(r"\$\w+|\$\{[^}]*\}|%[A-Za-z_]\w{2,}%")
"""What only a shell replaces."""
_CONTROL = re.compile("[\x00-\x1f\x7f\ud800-\udfff]")


def expanded_path(text: str) -> str:
    """A path with the home folder in the place of a leading `~`; ValueError for variables, which only a shell replaces,
    and for control characters."""
    if _CONTROL.search(text):
        raise ValueError(f"found {text!r}; a path has no line breaks or other control characters here")
    if variable := _VARIABLE.search(text):
        raise ValueError(
            f"found {text!r}; {variable.group()} is not replaced here (nor by a shell within single quotes); "
            "write the whole path"
        )
    path = os.path.expanduser(text)
    if path.startswith("~"):
        raise ValueError(f"found {text!r}; there is no user of that name here; write the whole path, or ./{text}")
    return path


def local_path(text: str) -> str:
    """`expanded_path`; ValueError for an address (s3://...) too, since it would create a folder named "s3:"."""
    if scheme := scheme_of(text):
        what = "the path alone" if scheme == "file" else "a path of this machine, or of a shared disk"
        raise ValueError(f"found {text!r}; addresses ({scheme}:) are not read or written here; give {what}")
    return expanded_path(text)


def storage_path(text: str) -> str:
    """`expanded_path`; addresses of object stores are fine if they are whole."""
    check_address(text)
    return text if scheme_of(text) and not _VARIABLE.search(text.replace("%", "")) else expanded_path(text)


def _uri(text: str) -> str:
    """`storage_path`; `file:///a` is the path `/a`, as in Ray Train."""
    return expanded_path(text.removeprefix("file://")) if text.startswith("file:///") else storage_path(text)


def _source(text: str) -> str:
    """`local_path`, for a value that may also be the name of a data set."""
    try:
        return local_path(text)
    except ValueError as error:
        raise ValueError(f"{error}, or a Hugging Face data set's name" if scheme_of(text) else str(error)) from None


def _model_name(text: str) -> str:
    """`expanded_path`, but a `~` that names no user stays: endpoints have such model names."""
    return text if text.startswith("~") and os.path.expanduser(text) == text else expanded_path(text)


def _with_homes(value: Any) -> Any:
    """vLLM's arguments, with the home folder in the place of a leading `~/` of any text."""
    if isinstance(value, Mapping):
        return {name: _with_homes(inner) for name, inner in value.items()}
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value


LocalPath = Annotated[str, AfterValidator(local_path)]
StoragePath = Annotated[str, AfterValidator(storage_path)]
"""A folder, or an address in an object store."""
Uri = Annotated[str, AfterValidator(_uri)]
Source = Annotated[str, AfterValidator(_source)]
VllmArguments = Annotated[dict[str, Any], AfterValidator(_with_homes)]


# ---------------------------------------------------------------- which keys change which results

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
"""Arguments in a role's `engine` that change how fast it answers; all others change the answers."""
TRAIN_PLACES = {
    *("num_workers", "use_gpu", "resources_per_worker", "sharding"),
    *("save_steps", "max_failures", "checkpoints", "report_to"),
}
"""Keys of `train` that change where a model is trained and kept; all others change the model."""
PAIR_SETTINGS = {
    *("aggregate", "balance", "combine", "grids", "margin", "max_length_ratio", "neutral_directives", "offset"),
}
"""Keys of `synthesis` that change which pairs are made of given answers and grades."""
REWARD_SETTINGS = {
    *("kinds", "users", "held_out_rubrics", "choices", "targets", "conflicting"),
    *("size", "steps", "learning_rate", "batch_users"),
}
"""Keys of `steer` that change the reward models, and with them the conditional policies."""
POLICY_SETTINGS = {"policy_beta", "policy_learning_rate", "policy_steps", "policy_users", "policy_answers"}
"""Keys of `steer` that change the conditional policies alone."""


# ---------------------------------------------------------------- sections


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_odd_values(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuses what pydantic would take: true for 1, and NaN or infinity where any value is allowed."""
        leaves = list(_leaves(cls.model_fields[str(info.field_name)].annotation))
        if any(_is_section(leaf) for leaf in leaves):  # which checks its own values
            return value
        is_number = (int in leaves or float in leaves) and bool not in leaves
        for scalar in _scalars(value):
            if isinstance(scalar, float) and not math.isfinite(scalar):
                raise ValueError(f"found {scalar}; give a finite number")
            if isinstance(scalar, bool) and is_number:
                shown = "true (or on, yes)" if scalar else "false (or off, no)"
                raise ValueError(f"found {shown}, which is no number; a text of that name needs quotes")
        return value


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _leaves(annotation: Any) -> Iterator[Any]:
    """The types in an annotation, without None: `str` of `tuple[str, ...] | None`."""
    arguments = [argument for argument in get_args(annotation) if argument not in (NoneType, Ellipsis)]
    match get_origin(annotation):
        case origin if origin is Literal:
            yield str
        case origin if origin is Annotated:
            yield from _leaves(arguments[0])
        case None:
            yield annotation
        case _:
            for argument in arguments:
                yield from _leaves(argument)


def _scalars(value: Any) -> Iterator[Any]:
    """All values in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _scalars(inner)
    else:
        yield value


class PromptsConfig(_Section):
    """Where the prompts come from."""

    source: Source
    """A .jsonl, .parquet or .csv file, or the name of a Hugging Face data set."""
    column: str = "prompt"
    data_split: str = "train"
    """Which split of a Hugging Face data set is read."""
    held_out: Fraction = 0.15
    """Share of the prompts (with `topic`: of the topics) that is kept for evaluation, chosen by the hash of the
    text."""
    topic: str | None = None
    """Column with the topic of each prompt: prompts of one topic are then all trained on or all held out."""
    limit: Positive | None = None
    """Read at most this many."""


MAX_STOPS = 16
"""Stop texts of a role; each is looked for after every token."""
MAX_ENDPOINT_STOPS = 4
"""The most that OpenAI's API takes."""


def _read_stops(value: Any) -> Any:
    """A list; ValueError for what never ends an answer, or always does."""
    stops = [value] if isinstance(value, str) else value
    for text in stops if isinstance(stops, list | tuple) else ():
        if text == "":
            raise ValueError("found an empty text, which would end every answer at once; leave it out")
        if isinstance(text, str) and (escape := re.search(r"\\[nrt]", text)):
            raise ValueError(
                f"found {text} with a backslash in it, which no answer has; in double quotes YAML reads "
                f'"{escape.group()}" as white space'
            )
    return stops


class SamplingConfig(_Section):
    """How answers are sampled."""

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    max_tokens: Positive = 1024
    stop: Annotated[tuple[str, ...], BeforeValidator(_read_stops), Field(max_length=MAX_STOPS)] = ()
    """Texts that end an answer (a single text needs no list): it ends before the first of them. They end thoughts too,
    so give none to a model that thinks. The JSON of a judge (mode: rationale) ends without them."""
    include_stop: bool = False
    """Whether the answer keeps the stop text. For answers of one sentence: `stop: [". ", "! ", "? ", "\\n"]`,
    `include_stop: true`. Spaces and line breaks at the ends of an answer are removed."""

    @model_validator(mode="after")
    def _has_a_stop_to_include(self) -> Self:
        if self.include_stop and not self.stop:
            raise ValueError("include_stop: there is no stop; give one, or leave it out")
        return self


def _read_url(value: str) -> str:
    if not re.match(r"https?://", value, re.IGNORECASE):
        raise ValueError(f"found {value[:60]!r}; begin it with http:// or https://")
    if not re.fullmatch(r"\w+://[^\s/?#]+(?:[/][^\s?#]*)?", value):
        raise ValueError(f"found {value[:60]!r}; expected http://HOST:PORT/PATH, without spaces")
    return value


class EndpointConfig(_Section):
    """An OpenAI-compatible server that answers in place of a local engine. Limits are for the whole role."""

    base_url: Annotated[str, AfterValidator(_read_url)]
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable with the key; the key itself is written nowhere."""
    concurrency: Positive = 32
    """Most requests in flight."""
    requests_per_minute: Positive | None = None
    tokens_per_minute: Positive | None = None
    """Counted per request: the prompt's tokens (estimated) and the most that the answer may have."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 300.0
    """Of one attempt."""
    max_retries: Annotated[int, Field(ge=0)] = 8
    """Attempts after a 408, 409, 429, 5xx, a failed connection or a broken response. The wait is what Retry-After says,
    else longer each time, up to 8 s. A Retry-After of over two minutes is not waited for."""
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"
    """The server's name for the limit on an answer's tokens: OpenAI's is the first, many older servers have the
    second."""
    extra_body: dict[str, Any] = {}
    """Additional fields of every request."""


class PriceConfig(_Section):
    """Prices of a role's tokens and time, in any one currency; used for the costs in the ledger alone."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    """Per million prompt tokens that were not in the prefix cache."""
    cached: Annotated[float, Field(ge=0)] = 0.0
    """Per million prompt tokens from the cache."""
    generated: Annotated[float, Field(ge=0)] = 0.0
    """Per million generated tokens."""
    engine_hour: Annotated[float, Field(ge=0)] = 0.0
    """Per engine and hour of work."""


JOB_ENV = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set in the environment of a job that `ray job submit` runs."""


class ModelConfig(_Section):
    """A role of a model: which model, its resources and its engine."""

    model: Annotated[str, AfterValidator(_model_name)]
    """A folder, a Hugging Face name, a GGUF file (its path, or PACKAGE:FILE.gguf inside an installed Python package;
    converted once, into $CPT_CACHE or ~/.cache/cpt_ray), or the name that the endpoint knows it by."""
    endpoint: EndpointConfig | None = None
    """A server to ask; `engine` and `num_gpus` are then ignored."""
    price: PriceConfig = PriceConfig()
    num_actors: OneOrMore = Range(1, 1)
    """Engine actors. With [min, max], as many as the cluster has or can have room for, and the shards keep busy, are
    asked for at once, and work begins with the first."""
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """Logical CPUs per engine actor."""
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per engine actor; above 1, as many as engine.tensor_parallel_size x pipeline_parallel_size. With 0.5, two
    small engines share one (engine.gpu_memory_utilization then below 0.5)."""
    resources: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Further resources per engine actor, by Ray's names: one that only some nodes have, or a kind of GPU, as in
    {"accelerator_type:L4": 0.001}."""
    engine: VllmArguments = {}
    """vLLM engine arguments (dtype, max_model_len, gpu_memory_utilization, ...), checked by vLLM's own names. Without a
    GPU, dtype is what the CPU is fast with unless given: bfloat16 if it computes in it, else float32 (see roles.py)."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template, such as {enable_thinking: false}."""
    sampling: SamplingConfig = SamplingConfig()

    @model_validator(mode="after")
    def _has_no_more_stops_than_endpoints_take(self) -> Self:
        count = len(self.sampling.stop)
        if self.endpoint and count > MAX_ENDPOINT_STOPS and not self.sampling.include_stop:
            raise ValueError(
                f"sampling.stop: found {count} texts; an endpoint takes {MAX_ENDPOINT_STOPS} at most, leave some out"
            )
        return self

    @model_validator(mode="after")
    def _is_a_path_or_name(self) -> Self:
        if self.endpoint is None:
            try:
                storage_path(self.model)
            except ValueError as error:
                raise ValueError(f"model: {error}") from None
        return self

    @model_validator(mode="after")
    def _has_as_many_gpus_as_it_uses(self) -> Self:
        if self.endpoint is not None:
            return self
        if (copies := self.engine.get("data_parallel_size")) not in (None, 1):
            raise ValueError(
                f"engine.data_parallel_size: found {shown(copies)}; an actor has one engine: leave it out and set "
                "num_actors (of the server: serve.replicas)"
            )
        if self.num_gpus > 1 and self.num_gpus % 1:
            raise ValueError(f"num_gpus: found {self.num_gpus:g}; above 1, give a whole number")
        kinds = ("tensor", "pipeline", "prefill_context")
        sizes = {f"{kind}_parallel_size": self.engine.get(f"{kind}_parallel_size", 1) for kind in kinds}
        parts = math.prod(size for size in sizes.values() if isinstance(size, int))
        given = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1)
        if self.num_gpus and parts > max(self.num_gpus, 1):
            raise ValueError(f"num_gpus: found {self.num_gpus:g}; engine.{given} needs {parts}")
        if self.num_gpus > max(parts, 1):
            uses = f"engine.{given} uses {parts}" if given else "without engine.tensor_parallel_size it uses 1"
            raise ValueError(
                f"num_gpus: found {self.num_gpus:g}; {uses}, so the others would idle: set "
                f"engine.tensor_parallel_size, or num_gpus: {parts} and more num_actors"
            )
        return self

    @property
    def actor_resources(self) -> dict[str, float]:
        """Of one engine actor, by Ray's names; one that asks a server needs no GPU."""
        gpus = 0.0 if self.endpoint else self.num_gpus
        return {"CPU": self.num_cpus, **({"GPU": gpus} if gpus else {}), **self.resources}

    @property
    def path(self) -> str:
        """What the engine and transformers load, on this machine: a GGUF that it has not converted yet is converted
        here, a model in an object store that it has no copy of is copied."""
        if self.gguf:
            return str(gguf_model.converted(self.gguf))
        return str(local_copy(self.model)) if self.is_stored else self.model

    @property
    def is_stored(self) -> bool:
        """Whether `model` is the address of a folder in an object store."""
        return self.endpoint is None and scheme_of(self.model) != ""

    @property
    def gguf(self) -> str:
        """`model` if it names a GGUF file, else ""."""
        return self.model if self.endpoint is None and gguf_model.is_gguf(self.model) else ""

    @property
    def identity(self) -> str:
        """Changes when the model does: its name, or what is in its folder or GGUF."""
        if self.endpoint:
            return content_id(self.model, self.endpoint.base_url, self.endpoint.extra_body)
        if self.gguf:
            return content_id(gguf_model.gguf_hash(self.gguf), gguf_model.CONVERTER)
        if self.is_stored:
            return _stored_identity(self.model, int(time.monotonic()))
        folder = Path(self.model)
        if not folder.is_dir():
            return self.model
        return content_id([[file.name, file_fingerprint(file)] for file in sorted(folder.iterdir()) if file.is_file()])

    @property
    def policy_key(self) -> str:
        """Changes when the model or the rendering of its conversations does."""
        return content_id(self.identity, self.chat_template_kwargs)

    @property
    def answer_key(self) -> str:
        """Changes when this role's answers would: with the model, its sampling and all but SPEED_ARGUMENTS of
        `engine`."""
        settings = {name: value for name, value in self.engine.items() if name not in SPEED_ARGUMENTS}
        return content_id(self.policy_key, self.sampling.model_dump(), settings)

    @property
    def engine_key(self) -> str:
        """Roles with the same key can share an engine."""
        fields = {"model", "endpoint", "num_actors", "num_cpus", "num_gpus", "resources", "engine"}
        return content_id(self.model_dump(mode="json", include=fields), self.chat_template_kwargs)


class JudgeConfig(ModelConfig):
    """A model role that grades."""

    mode: Literal["logprobs", "rationale"] = "logprobs"
    """"logprobs": one token per criterion, graded by the probabilities of the level numbers. "rationale": a reason and
    a level for each criterion, as JSON (the engine enforces the schema); for models that need to reason first."""
    votes: Positive = 1
    """Rationales per answer; the grade is their mean."""

    @model_validator(mode="after")
    def _votes_need_rationales(self) -> Self:
        if self.votes > 1 and self.mode == "logprobs":
            raise ValueError(
                "votes: counts rationales, and mode: logprobs writes none; add mode: rationale, or leave votes out"
            )
        return self

    @property
    def answer_key(self) -> str:
        """Changes when the verdicts would."""
        if self.mode == "logprobs":  # nothing is sampled
            return super().answer_key
        # votes are read otherwise since two for opposite ends are no middle
        return content_id(super().answer_key, self.mode, self.votes, *(["no middle"] if self.votes > 1 else []))


@functools.lru_cache(maxsize=16)
def _stored_identity(address: str, _second: int) -> str:
    """The same as of the same files in a folder; looked up once a second at most, since every shard's name has it."""
    folder = StorePath.parse(address)
    files = {name: version for name, version in folder.files().items() if "/" not in name}
    return content_id([[name, _fingerprint(folder / name, version)] for name, version in sorted(files.items())])


def file_fingerprint(path: Path) -> str:
    """Hash of a file's size and its first and last MiB: weights are told apart without reading all of them."""
    return _fingerprint(path, path.stat().st_mtime_ns)


@functools.cache
def _fingerprint(path: AnyPath, _version: object) -> str:
    part = 1 << 20
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(part))
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - part))
        digest.update(file.read())
    return f"{size}-{digest.hexdigest()[:20]}"


MOST_FURTHER_PASSES = 4
"""Passes after the first, each of which may ask for several answers of a prompt at once."""


class SynthesisConfig(_Section):
    """How much is written."""

    ask: Literal["levels", "prompt"] = "levels"
    """What the writer is asked for. "levels": an answer at each level of each rubric, with the rubric in the prompt.
    "prompt": an answer to the bare prompt, for a writer that follows rubrics badly but whose own answers vary."""
    first_pass: Positive = 1
    """Answers asked for in the first pass, per prompt, rubric and level (`ask: prompt`: per prompt)."""
    samples: Positive = 3
    """The same, at most and over all passes; later passes ask only for the levels that a prompt still lacks."""
    grids: Positive = 1
    """Grids (an answer at each level) wanted per prompt and rubric; a prompt that has them is asked no more."""
    margin: Annotated[float, Field(ge=0, lt=0.5)] = 0.1
    """An answer whose score is this close to the middle between two levels belongs to neither; a share of the distance
    between the two."""
    balance: bool = True
    """Prefer, among the answers at a level, those that differ from the others in this rubric alone, and drop up to half
    of the grids if the remaining differences then cancel out. false: choose by hash."""
    offset: dict[str, dict[str, float]] = {}
    """Of a rubric's grids: the mean difference in another rubric that is wanted instead of none, highest level less
    lowest, in standard deviations. {wording: {length: -1}} is against a model that writes longer when it should write
    in learned words (crosstalk in the report): its learned answers are then shorter than its plain ones."""
    paraphrases: Annotated[int, Field(ge=2)] = 6
    """Directives wanted per (rubric, level) where the rubric gives none."""
    held_out_directives: Fraction = 0.3
    """Share of them kept for evaluation."""
    shard_rows: Positive = 1024
    """Rows that an engine works on at a time, in two shards of half as many; a process that dies loses at most these.
    Four times the engine's max_num_seqs keep it busy all the time. Another size means other shards: a change redoes
    the whole run, unless it fits in one shard both before and after."""
    combine: tuple[tuple[str, str], ...] = ()
    """Pairs of rubric ids that are also combined in one directive."""
    control: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of prompts, by rubric, whose first grid has the policy's own answer (to the bare prompt, or under a neutral
    directive) as one more level: chosen where no rubric's directive is given, rejected where one is."""
    neutral_directives: tuple[str, ...] = ("You are a helpful assistant.",)
    """Used in half of the control rows; the other half have no directive."""
    aggregate: Literal["mean", "median", "majority", "min"] = "mean"
    """How the grades of several judges (`judges`) become one."""
    near_duplicates: Fraction | None = None
    """Drop an answer whose words resemble by this much (Jaccard similarity, by MinHash) those of an earlier answer, to
    any prompt, that was asked for at the same rubric and level."""
    max_length_ratio: Annotated[float, Field(gt=1)] | None = None
    """Drop a pair (and its twin) if the longer answer has more than this many times the tokens of the shorter."""

    @model_validator(mode="after")
    def _first_pass_is_within(self) -> Self:
        if self.first_pass > self.samples:
            raise ValueError(
                f"first_pass: found {self.first_pass}, but samples, the most in all passes, is {self.samples}; "
                "raise samples"
            )
        return self

    @model_validator(mode="after")
    def _offset_is_of_others(self) -> Self:
        if self.offset and not self.balance:
            raise ValueError("offset: says what grids are balanced to, but balance is false; leave one of them out")
        if itself := next((name for name, others in self.offset.items() if name in others), None):
            raise ValueError(f"offset.{itself}: names itself; give another rubric that it should differ in")
        return self

    @property
    def num_passes(self) -> int:
        """The first, and as many as may be needed; a pass with nothing to ask for costs nothing."""
        return 1 + min(self.samples - self.first_pass, MOST_FURTHER_PASSES)


class LoraConfig(_Section):
    """The LoRA adapter."""

    r: Positive = 16
    alpha: Positive = 16
    target_modules: str | tuple[str, ...] = "all-linear"
    quantize: Literal["nf4"] | None = None
    """"nf4" keeps the frozen weights in 4 bits during training (QLoRA; needs bitsandbytes); the exported model is
    whole."""


Loss = Literal["sigmoid", "ipo", "hinge", "apo_zero", "apo_down", "sigmoid_norm", "sft"]


class TrainConfig(_Section):
    """Training by DPO (direct preference optimization)."""

    num_workers: OneOrMore = Range(2, 2)
    """With [min, max], training continues with fewer workers when nodes are lost, and with more when nodes join."""
    use_gpu: bool = False
    resources_per_worker: dict[str, Annotated[float, Field(ge=0)]] | None = None
    loss: Annotated[dict[Loss, Annotated[float, Field(gt=0)]], Field(min_length=1)] = {"sigmoid": 1.0}
    """Loss by TRL's name, and its weight."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 32
    """Pairs per optimizer step over all workers, on average."""
    micro_batch_size: Positive = 4
    """Most pairs per worker and forward pass; a larger batch is reached by gradient accumulation."""
    max_length: Positive = 2048
    """Most tokens of prompt and answer together; a longer pair is rejected, never cut."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the initial adapter and of the order of the pairs (never of which pairs); the run's `seed` unless
    given."""
    contrast: Literal["all", "ends"] = "all"
    """Which levels of a rubric are trained against each other: all, or only the lowest and the highest. With "ends", a
    base model that ignores directives learns to follow them in a fraction of the steps; the levels between are then
    left to what it knows of the words."""
    max_pairs: Positive | None = None
    """Train on at most this many pairs, chosen by hash, with their twins."""
    held_out: Annotated[int, Field(ge=0)] = 200
    """Pairs kept for the training's metrics: all pairs of some prompts, at most a tenth."""
    lora: LoraConfig | None = LoraConfig()
    """null tunes all weights."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the frozen weights and the arithmetic. Unless given: bfloat16; on a CPU, float32 if it has no bfloat16."""
    gradient_checkpointing: bool = True
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """"fsdp" splits the frozen weights among the workers (FSDP2); "ddp" gives each worker all of them."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    save_steps: Positive = 50
    """Optimizer steps between checkpoints, and between measurements on the held-out pairs."""
    checkpoints: Uri | None = None
    """Where checkpoints are kept: a folder or an address (s3://, gs://, abfs://); the run directory unless given."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often a failed worker group is restarted from the last checkpoint."""
    report_to: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Where loss and metrics go; TensorBoard's files are in the run directory."""

    @property
    def precision(self) -> Literal["float32", "bfloat16"]:
        """`dtype`, or bfloat16 where nothing has chosen one (roles.py does)."""
        return self.dtype or "bfloat16"

    @property
    def worker_resources(self) -> dict[str, float]:
        """Of one worker, by Ray's names."""
        return self.resources_per_worker or {"GPU" if self.use_gpu else "CPU": 1}


class EvaluateConfig(_Section):
    """What the evaluation compares, and on how much."""

    prompts: Positive = 32
    """Most held-out prompts."""
    directives: Positive = 1
    """Held-out directives per (prompt, rubric, level)."""
    trained_directives: Annotated[int, Field(ge=0)] = 0
    """Directives from training per (prompt, rubric, level), in addition: they show how much worse new wording is
    followed."""
    judge_check: LocalPath | None = None
    """A rubric file, not one of `rubrics`, with a judged and a measured criterion: the judge grades some written
    answers by it, and the report says how far the judge agrees with the measure."""
    judge_check_answers: Positive = 60
    """How many answers."""
    bootstrap: Positive = 1000
    """Resamples (of prompts and of directives) behind each 95% interval."""


class AnswersConfig(_Section):
    """Graded answers in the prompts' own data, in UltraFeedback's layout: a list of answers per row."""

    list: str
    """Column of the answers."""
    text: str
    """Field of an answer that holds its text."""
    scores: Annotated[dict[str, str], Field(min_length=1)]
    """Rubric id to the field of its grade (nested names joined by dots); a value that is no number counts as
    ungraded."""
    scale: tuple[float, float] = (1.0, 5.0)
    """Lowest and highest grade; they become the rubric's lowest and highest anchor."""

    @field_validator("scale")
    @classmethod
    def _is_ascending(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if scale[0] >= scale[1]:
            raise ValueError(f"found {list(scale)}; give the lowest grade, then the highest")
        return scale


Form = Literal["film", "gated_lora"]
"""How z gets into a conditional policy; only gated_lora is served, film is there to compare with."""
Kind = Literal["high", "low", "middle", "mixture", "noisy"]
"""Taste of a user: an end of one rubric, a score in its middle, a blend of two, an end with wrong choices."""


class SteerConfig(_Section):
    """Few-shot steering: models are trained on simulated users and tested on held-out ones."""

    kinds: Annotated[tuple[Kind, ...], Field(min_length=1)] = get_args(Kind)
    """Kinds of taste; the simulated users have them in turn."""
    answers: AnswersConfig | None = None
    """Where users' answers come from; the run's own generations and evaluation unless given."""
    users: Positive = 2000
    """Users to train on; each has a twin with the opposite choices."""
    test_users: Positive = 100
    """Held-out users, twins included: other tastes, and prompts that were not trained on."""
    held_out_rubrics: tuple[str, ...] = ()
    """Ids of rubrics that only held-out users care about."""
    choices: Positive = 10
    """Choices of each user that are shown to the models."""
    targets: Positive = 20
    """Further pairs of each user, which are predicted from the choices: in training, and to test."""
    conflicting: Annotated[float, Field(ge=0.75, le=1)] = 0.8
    """Least share of pairs on which users disagree."""
    embedder: ModelConfig | None = None
    """The model that embeds answers, run by transformers in float32; the tuned policy unless given."""
    size: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    """Width of the models that read choices."""
    steps: Positive = 600
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    batch_users: Positive = 32
    """Users per step over all workers, without their twins."""
    seeds: Positive = 5
    """Reward models trained, with different seeds; results are over all of them."""
    forms: tuple[Form, ...] = ("gated_lora",)
    """Conditional policies (NP-DPO) to train; only answers of gated_lora are evaluated."""
    policy_beta: Annotated[float, Field(gt=0)] = 0.05
    policy_learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    policy_steps: Positive = 1000
    policy_users: Positive = 4
    """Users per step over all workers, without their twins."""
    policy_answers: Annotated[int, Field(ge=2)] = 8
    """Answers per user and step, to a single prompt if it has enough; all pairs of answers to a prompt count."""
    num_workers: Positive = 1
    use_gpu: bool = False
    samples: Positive = 4
    """Answers per held-out prompt and configuration on which satisfaction is measured."""
    best_of: Positive = 16
    """Answers from which re-ranking chooses the best."""
    certainty: Fraction = 0.6
    """Least probability at which an inferred level is applied."""
    lapse: Fraction = 0.1
    """Share of a user's choices that inference assumes to be random."""
    prior: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Rubric id to how likely users are to care about it before any choice, relative to 1 for rubrics not listed."""

    @field_validator("embedder")
    @classmethod
    def _is_run_here(cls, embedder: ModelConfig | None) -> ModelConfig | None:
        if embedder and (embedder.endpoint or embedder.engine):
            name = "endpoint" if embedder.endpoint else "engine"
            raise ValueError(f"{name}: the embedder is run by transformers, not by a server or by vLLM; leave it out")
        return embedder


class ServeConfig(_Section):
    """The server of the tuned model."""

    host: str = "127.0.0.1"
    """An address other than loopback needs keys (`cpt keys add`), or --insecure."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: NoneOrMore = Range(1, 1)
    """[min, max] follows the load. With min 0, an idle server has no engine, and the next request waits for one to
    start."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 64.0
    """Target for requests in flight per replica, where `replicas` is [min, max]."""
    idle_seconds: Annotated[float, Field(ge=0)] = 600.0
    """How long a replica that is not needed is kept."""
    configurations: dict[Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+$")], dict[str, str | float]] = {}
    """Saved configurations: name to {rubric: level or score}. Clients ask for them by name, or as the model
    `cpt:NAME`."""
    frontend: VllmArguments = {}
    """Arguments of vLLM's OpenAI server (enable_auto_tool_choice, tool_call_parser, ...), by vLLM's own names.
    allowed_origins lists the other origins whose pages may send requests; none unless given."""
    base: bool = False
    """Serve the untuned model too, at /<name>/base, with as many replicas again."""
    preferences: Literal["directive", "gated_lora"] = "directive"
    """How a user's choices steer a chat: by the inferred directive, or by the policy that `cpt steer fit` trained."""
    adapters: dict[str, Uri] = {}
    """Adapters of policy.model to serve in place of the merged model: name to folder or URI, the default first."""

    @field_validator("frontend")
    @classmethod
    def _has_what_is_used(cls, frontend: dict[str, Any]) -> dict[str, Any]:
        """Refuses what is for vLLM's own HTTP server: Ray Serve's proxy listens here."""
        for name in frontend:
            if remedy := NOT_OF_SERVE.get(re.sub("^(ssl|uvicorn|h11|dp_supervisor)_.*", r"\1_", name)):
                raise ValueError(f"{name}: would do nothing, since Ray Serve listens here and not vLLM; {remedy}")
        return frontend

    @field_validator("frontend")
    @classmethod
    def _has_lists_of_origins(cls, frontend: dict[str, Any]) -> dict[str, Any]:
        """Refuses a text where a list belongs, since Starlette would look for origins inside the text, and an origin
        with a path, since it never matches."""
        for name in ("allowed_origins", "allowed_methods", "allowed_headers"):
            texts = frontend.get(name, [])
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}: found {texts!r}; expected a list of texts")
        for origin in frontend.get("allowed_origins", ()):
            if not re.fullmatch(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#\s*]+", origin):
                raise ValueError(f"allowed_origins: found {origin!r}; expected one like https://example.org, or *")
        return frontend


NOT_OF_SERVE = {
    **dict.fromkeys(("ssl_", "enable_ssl_refresh"), "put a server with TLS in front of serve.port"),
    **dict.fromkeys(("host", "port", "uds"), "give serve.host and serve.port"),
    "api_key": "make keys with `cpt keys add`",
    **dict.fromkeys(
        ("uvicorn_", "h11_", "disable_uvicorn_access_log", "disable_access_log_for_endpoints", "grpc_port",
         "data_parallel_supervisor_port", "dp_supervisor_"),
        "leave it out",
    ),
}  # fmt: skip
"""vLLM's arguments that are for its own HTTP server (of some, what their names begin with), and what to do instead."""
NO_PROGRESS_MINUTES = 30.0
"""`no_progress_minutes` unless given."""


class TuneConfig(_Section):
    """What training needs, whether on a run's pairs or on a preference set."""

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]
    """Of the run, of its server (http://HOST:PORT/<name>), and of the server's log files, which hold it twice."""
    run_dir: StoragePath = ""
    """The run directory; "runs/<name>" unless given. On a cluster: a folder that every node sees, or an address
    in an object store (s3://, gs://, abfs://)."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    no_progress_minutes: Annotated[float, Field(gt=0)] = NO_PROGRESS_MINUTES
    """A stage ends, with what it waited for, after so long without any progress. A download, an engine that loads or
    compiles, and a finished shard or step are all progress; waiting for a node that nobody launches is not. Launching
    nodes that can hold what is waited for are given three times as long."""
    policy: ModelConfig
    """The model that is tuned, evaluated and served; its untuned form is the reference."""
    train: TrainConfig = TrainConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_run_dir(cls, data: Any) -> Any:
        name = data.get("name") if isinstance(data, dict) and "run_dir" not in data else None
        # a name with a line break is refused for itself, and once
        return {**data, "run_dir": f"runs/{name}"} if isinstance(name, str) and name.isprintable() else data

    @field_validator("run_dir", mode="before")
    @classmethod
    def _is_not_empty(cls, run_dir: Any) -> Any:
        if run_dir is None or run_dir == "":
            raise ValueError('found nothing (YAML reads ~ so); give a path, in quotes if it is "~", or leave it out')
        return run_dir


class PreferencesConfig(_Section):
    """A preference set in TRL's format: prompt, chosen, rejected, as text or as messages."""

    source: Source
    """A .jsonl, .parquet or .csv file, or the name of a Hugging Face data set."""
    data_split: str = "train"


class PreferenceRunConfig(TuneConfig):
    """A run file for `cpt train` alone, on any preference set."""

    preferences: PreferencesConfig


COPIES = ("director", "judge")
"""Roles that are the writer but for what is given for them."""


class RunConfig(TuneConfig):
    """A run file of the whole loop."""

    rubrics: Annotated[tuple[LocalPath, ...], Field(min_length=1)]
    """Rubric files, or folders of them."""
    prompts: PromptsConfig
    writer: ModelConfig
    director: ModelConfig
    """The writer unless given; without a model of its own, the writer with these entries changed. `engine`, `sampling`
    and other sections that are given stand in the place of the writer's; an override changes one entry of them."""
    judge: JudgeConfig
    """As `director`."""
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
            for role in COPIES:
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
        return [Path(path) for path in self.rubrics]


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file with its overrides; UserError with a line per problem."""
    config = load_any_config(path, overrides)
    if not isinstance(config, RunConfig):
        raise UserError(f"{path}: a run file with `preferences` can be trained and pushed only; give rubrics instead")
    return config


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | PreferenceRunConfig:
    """The run file of a whole loop or, if it names `preferences`, of a training alone."""
    data = read_yaml(path)
    sections = {*data, *(override.partition("=")[0].partition(".")[0] for override in overrides)}
    if "preferences" in data and (others := [name for name in ("rubrics", "prompts", "writer") if name in data]):
        raise UserError(
            f"{path}: `preferences` stands in the place of rubrics, prompts and writer; leave out {', '.join(others)}, "
            "in a run file of its own"
        )
    kind: type[RunConfig | PreferenceRunConfig] = PreferenceRunConfig if "preferences" in sections else RunConfig
    for override in sorted(overrides, key=_turn):
        _apply(kind, data, override)
    given = [override.partition("=")[0] for override in overrides]
    if removed := [f"{_origin_of(path, name, given)}: {name}: {advice}" for name, advice in _removed(data)]:
        raise UserError("\n".join(removed))
    try:
        config = kind.model_validate(data)
    except ValidationError as error:
        lines = validation_lines(error, kind)
        # a section's own line is left out where one of its entries has a line
        lines = [line for line in lines if not any(other.startswith(f"{_entry(line)}.") for other in lines)]
        # director and judge copy the writer, so its problems would be listed three times
        copies = COPIES if any(line.startswith("writer") for line in lines) else ()
        problems = [f"{_origin_of(path, _entry(line), given)}: {line}" for line in lines if not line.startswith(copies)]
        raise UserError("\n".join(problems)) from None
    if JOB_ENV in os.environ and not (os.path.isabs(config.run_dir) or scheme_of(config.run_dir)):
        raise UserError(
            f"{path}: run_dir: {config.run_dir!r} is relative, and inside a Ray job that is a folder that goes away "
            "with the job; give an absolute path that every node sees (run_dir=/shared/runs/NAME), or an address (s3://BUCKET/NAME)"
        )
    return config


REMOVED = {
    "serve.route_by": "was removed, since it made nothing faster; leave it out (the replica with the fewest requests "
    "gets the next one)",
    "serve.preferences=soft_prompt": "soft prompts are no longer served, since they were the weakest form; give "
    "gated_lora or directive",
    "steer.variational": "was removed, since no gain was ever measured; leave it out",
    "steer.forms=soft_prompt": "soft prompts were removed, since they were the weakest form; give gated_lora",
}
"""Entries of earlier versions, as KEY or KEY=VALUE (also one of several values), and what to do about them."""


def _removed(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, what to do) of every entry that an earlier version had."""
    for entry, advice in REMOVED.items():
        key, equals, value = entry.partition("=")
        *sections, name = key.split(".")
        inner: Any = data
        for section in sections:
            inner = inner.get(section) if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping) or name not in inner:
            continue
        if not equals or value in (inner[name] if isinstance(inner[name], list) else [inner[name]]):
            yield key, advice


# ---------------------------------------------------------------- overrides


def _entry(line: str) -> str:
    """The entry that a problem's line begins with."""
    return line.partition(":")[0]


def _origin_of(path: Path, name: str, given: Sequence[str]) -> str:
    """Where an entry was given: the run file, an override, or both."""
    if any(f"{name}.".startswith(f"{key}.") for key in given):
        return "override"
    return f"{path}, overrides" if any(key.startswith(f"{name}.") for key in given) else str(path)


def _turn(override: str) -> int:
    """Overrides of what copies the writer come after the writer's own, and after what makes it no copy."""
    role, _, entry = override.partition("=")[0].partition(".")
    return 0 if role not in COPIES or not entry else 1 if entry == "model" else 2


def _apply(kind: type[BaseModel], data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise UserError(f"{override!r} is not key=value (for example train.beta=0.2)")
    try:
        value = _typed(_annotation_at(kind, parts), text)
    except ValueError as error:
        raise UserError(f"override: {key}: {error}") from None
    role, writer = data.get(parts[0]) or {}, data.get("writer")
    if parts[0] in COPIES and len(parts) > 2 and isinstance(role, dict) and isinstance(writer, dict):
        section = writer.get(parts[1])
        if isinstance(section, dict) and not {"model", parts[1]} & set(role):
            data[parts[0]] = role | {parts[1]: copy.deepcopy(section)}
    for part in parts[:-1]:
        inner = data.get(part)
        if inner is None:
            inner = data[part] = {}
        if not isinstance(inner, dict):
            raise UserError(f"{override!r}: {part!r} holds a value, not a section")
        data = inner
    data[parts[-1]] = value


def _annotation_at(annotation: Any, parts: Sequence[str]) -> Any:
    """The annotation of the entry that `parts` name; Any if there is no such entry."""
    for part in parts:
        options = [_bare(option) for option in _options(annotation)]
        section = next((option for option in options if _is_section(option)), None)
        mapping = next((option for option in options if get_origin(option) is dict), None)
        if section is not None and part in section.model_fields:
            annotation = section.model_fields[part].annotation
        else:
            annotation = Any if mapping is None else get_args(mapping)[1]
    return annotation


def _bare(annotation: Any) -> Any:
    return _bare(get_args(annotation)[0]) if get_origin(annotation) is Annotated else annotation


def _options(annotation: Any) -> list[Any]:
    annotation = _bare(annotation)
    return list(get_args(annotation)) if get_origin(annotation) in (Union, UnionType) else [annotation]


def _typed(annotation: Any, text: str) -> Any:
    """The value of an override: its text where the entry is one, else what it says in YAML.

    ValueError if it is neither.
    """
    if not text:
        none = ", or null for none" if NoneType in _options(annotation) else ""
        raise ValueError(f"has no value; give one{none}, or leave it out (was it a variable that is not set?)")
    if re.search("[\ud800-\udfff]", text):
        raise ValueError(f"found {text!r}; it is not UTF-8")
    options = [_bare(option) for option in _options(annotation)]
    texts = [option for option in options if option is str or get_origin(option) is Literal]
    if not texts:
        return _read_yaml_value(text)
    if text == "null" and NoneType in options:
        return None
    if text[0] == text[-1] and text[0] in "\"'" and len(text) > 1:
        return _read_yaml_value(text)
    if float in options and (number := _NUMBER.fullmatch(text)):
        return float(number[0])
    is_list = text.startswith("[") and any(get_origin(option) is tuple for option in options)
    return _read_yaml_value(text) if is_list else text


def _read_yaml_value(text: str) -> Any:
    """ValueError for what cannot be read, or has a comment: its text would be lost."""
    try:
        value = yaml.load(text, Loader=_ValueLoader)
        scalars = [scalar for scalar in yaml.scan(text) if isinstance(scalar, yaml.ScalarToken)]
    except yaml.MarkedYAMLError as error:
        raise ValueError(f"found {text!r}; not read as YAML ({error.problem}); put texts in quotes") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ValueError(f"found {text!r:.100}; not read as YAML ({str(error)[:100]})") from None
    read = {at for scalar in scalars for at in range(scalar.start_mark.index, scalar.end_mark.index)}
    if any(letter == "#" and at not in read for at, letter in enumerate(text)):
        raise ValueError(f"found {text!r}; what follows # would be a comment; put texts in quotes")
    return value


_NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?", re.ASCII)


class _ValueLoader(StrictLoader):
    """Numbers as they are usually written (1e-3, but not 12:30 or 0123), and no dates."""


_ValueLoader.yaml_implicit_resolvers = {
    first: [resolver for resolver in known if resolver[0].rpartition(":")[2] in ("bool", "null")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern in {
    "int": r"[-+]?(0|[1-9]\d*)",
    "float": rf"(?=.*[.eE]){_NUMBER.pattern}|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
}.items():
    _ValueLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(f"({_pattern})$", re.ASCII), list("-+.0123456789")
    )
