"""The seam where a model is called: requests in, completions out, in order, none missing.

`VllmEngine` is the real one. `FakeEngine` is for tests of logic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from cpt_ray.config import ModelConfig
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.prompting import ChatMessage, token_ids

if TYPE_CHECKING:
    from vllm.outputs import RequestOutput

CPU_KV_CACHE_BYTES = 512 << 20
"""Cache of an engine without a GPU unless engine.kv_cache_memory_bytes is given; vLLM would take nearly all RAM."""


def engine_env(config: ModelConfig) -> dict[str, str]:
    """Environment of a process that will hold this engine.

    An eager CPU engine gains nothing from torch.compile, and one helper of vLLM's sampler would still spend half a
    minute in it at the first log-probability asked for.
    """
    eager = config.num_gpus == 0 and config.engine.get("enforce_eager", False)
    return {"TORCHDYNAMO_DISABLE": "1"} if eager else {}


def engine_arguments(config: ModelConfig) -> dict[str, Any]:
    """vLLM engine arguments of a role, for batches and for serving; UserError for a name vLLM does not know."""
    from vllm.engine.arg_utils import EngineArgs

    known = list(EngineArgs.__dataclass_fields__)
    for name in config.engine:
        if name not in known:
            raise UserError(f"engine.{name}: vLLM has no such engine argument{did_you_mean(name, known)}")
    arguments: dict[str, Any] = {"model": config.path, "seed": 0}
    if config.num_gpus == 0:
        # A seeded request whose prompt is prefilled in chunks kills a CPU engine (vLLM 0.32 rewinds the generator's
        # offset, which CPU generators do not have), so prompts are prefilled whole.
        arguments |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enable_chunked_prefill": False}
    return arguments | config.engine


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to be continued."""

    messages: list[ChatMessage]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    labels: tuple[str, ...] = ()
    """If given: no text is wanted but the log-probability of each label as the first token of the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of a request; `error` is a reason if nothing usable did."""

    text: str = ""
    error: str = ""
    """"" or a short fixed phrase: "too long", "empty answer", "cut off"."""
    detail: str = ""
    label_logprobs: tuple[float, ...] = ()
    """Per label of the request, under the full vocabulary."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0


class Engine(Protocol):
    """Anything that continues conversations."""

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the same order."""
        ...


class VllmEngine:
    """A vLLM engine in this process."""

    def __init__(self, config: ModelConfig):
        from vllm import LLM

        self._template_kwargs = config.chat_template_kwargs
        self._llm = LLM(**{"disable_log_stats": True, **engine_arguments(config)})
        self._tokenizer = self._llm.get_tokenizer()
        self._max_model_len = self._llm.llm_engine.model_config.max_model_len
        self._label_ids: dict[str, int] = {}

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request, in the same order; a prompt too long for the model is never sent."""
        from vllm import SamplingParams

        completions: list[Completion | None] = [None] * len(requests)
        prompts, params, places = [], [], []
        for place, request in enumerate(requests):
            ids = token_ids(self._tokenizer, request.messages, self._template_kwargs)
            if len(ids) + request.max_tokens > self._max_model_len:
                detail = f"{len(ids)} prompt + {request.max_tokens} answer tokens, model takes {self._max_model_len}"
                completions[place] = Completion(error="too long", detail=detail, num_prompt_tokens=len(ids))
                continue
            label_ids = [self._label_id(label) for label in request.labels]
            prompts.append({"prompt_token_ids": ids})
            params.append(
                SamplingParams(
                    max_tokens=1 if label_ids else request.max_tokens,
                    temperature=0.0 if label_ids else request.temperature,
                    top_p=request.top_p,
                    seed=None if label_ids else request.seed,
                    logprob_token_ids=label_ids or None,
                )
            )
            places.append(place)
        for place, output in zip(places, self._llm.generate(prompts, params, use_tqdm=False), strict=True):
            completions[place] = self._completion(requests[place], output)
        return [one for one in completions if one is not None]

    def _label_id(self, label: str) -> int:
        if label not in self._label_ids:
            ids = self._tokenizer.encode(label, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(f"judge: the model's tokenizer makes {len(ids)} tokens of {label!r}; use another judge")
            self._label_ids[label] = ids[0]
        return self._label_ids[label]

    def _completion(self, request: Request, output: RequestOutput) -> Completion:
        answer = output.outputs[0]
        done = Completion(
            num_prompt_tokens=len(output.prompt_token_ids or ()),
            num_cached_tokens=output.num_cached_tokens or 0,
            num_tokens=len(answer.token_ids),
        )
        if request.labels:
            found = answer.logprobs[0] if answer.logprobs else {}
            ids = [self._label_id(label) for label in request.labels]
            values = tuple(found[one].logprob if one in found else float("-inf") for one in ids)
            return replace(done, label_logprobs=values)
        text = answer.text.strip()
        if answer.finish_reason == "length":
            return replace(done, text=text, error="cut off", detail=f"not finished after {request.max_tokens} tokens")
        if not text:
            return replace(done, error="empty answer", detail="the model ended its answer at once")
        return replace(done, text=text)


class FakeEngine:
    """Answers with a function of the request; for tests of logic only."""

    def __init__(self, answer: Callable[[Request], Completion]):
        self._answer = answer

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """`answer` of each request."""
        return [self._answer(request) for request in requests]


def seed_of(subject_id: str, seed: int) -> int:
    """A request's own seed, so that an answer does not depend on what else is in the batch or the run."""
    return int(hashlib.sha256(f"{subject_id}/{seed}".encode()).hexdigest()[:8], 16)
