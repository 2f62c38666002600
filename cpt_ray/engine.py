"""The seam where a model is called: requests in, completions out, in order, none missing.

`VllmEngine` is a model here, `OpenAIEngine` (openai_engine.py) one behind a server. `FakeEngine` is for tests of logic.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Protocol

from cpt_ray.config import ModelConfig, SamplingConfig
from cpt_ray.errors import UserError, did_you_mean
from cpt_ray.prompting import ChatMessage, PromptTokens

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import RequestOutput

CPU_KV_CACHE_BYTES = 512 << 20
"""Cache of an engine without a GPU unless engine.kv_cache_memory_bytes is given; vLLM would take nearly all RAM."""


TIGHT_JSON = {"backend": "xgrammar", "disable_any_whitespace": True}
"""A weak model that may put spaces into JSON puts in nothing else until its tokens are used up."""


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
    json_schema: dict[str, Any] | None = None
    """If given: the answer is JSON of this schema, by force."""
    samples: int = 1
    """Completions wanted; they share one prefill."""


def sampled(messages: list[ChatMessage], sampling: SamplingConfig, subject_id: str, seed: int, **more: Any) -> Request:
    """A request for text under a role's sampling, with a seed of its own: the same whatever else is in the batch."""
    return Request(messages=messages, seed=seed_of(subject_id, seed), **sampling.model_dump(), **more)


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
    """Anything that continues conversations; `run` may be called by several threads at once."""

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request and sample, in the same order."""
        ...


class EngineDiedError(RuntimeError):
    """The engine came to an end of itself, or one of its processes did; a new one may do better."""


def check_schema_is_enforced(engine: Engine, where: str) -> None:
    """UserError unless the engine makes a model write JSON of a schema that no model would write of itself."""
    word = "quokka-7301"
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": [word]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    answer = engine.run([Request(messages=asked, max_tokens=64, temperature=0, json_schema=schema)])[0]
    try:
        found = json.loads(answer.text)
    except json.JSONDecodeError:
        found = None
    if found != {"answer": word}:
        raise UserError(
            f"{where}: asked for JSON of a given schema, it wrote {answer.text[:60]!r} {answer.error}; "
            "rationales need a server that enforces schemas (or set judge.mode: logprobs)"
        )


class _Batch:
    """What one call of `run` asks for, on its way to the thread that steps the engine and back."""

    def __init__(self, asked: dict[int, tuple[list[int], SamplingParams]]):
        self.asked = asked
        """Token ids and parameters, by the request's number."""
        self.outputs: dict[int, RequestOutput] = {}
        self.done: Future[None] = Future()


class VllmEngine:
    """A vLLM engine in this process, kept full: what several threads ask for is worked on together."""

    def __init__(self, config: ModelConfig):
        from transformers import TokenizersBackend
        from vllm import LLM

        arguments = {"disable_log_stats": True, "structured_outputs_config": TIGHT_JSON, **engine_arguments(config)}
        self._llm = LLM(**arguments)
        self._engine = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        self._token_ids = PromptTokens(self._tokenizer, config.chat_template_kwargs)
        is_fast = isinstance(self._tokenizer, TokenizersBackend)
        self._decoder: Any = self._tokenizer.backend_tokenizer if is_fast else None
        self._max_model_len = self._engine.model_config.max_model_len
        self._label_ids: dict[str, int] = {}
        self._inbox: SimpleQueue[_Batch] = SimpleQueue()
        self._dead: EngineDiedError | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request and sample; a prompt too long for the model is never sent."""
        prompts = self._token_ids([request.messages for request in requests])
        both = list(enumerate(zip(requests, prompts, strict=True)))
        room = self._max_model_len
        fits = {at: (ids, self._params(one)) for at, (one, ids) in both if len(ids) + one.max_tokens <= room}
        batch = _Batch(fits)
        if batch.asked:
            self._inbox.put(batch)
            self._wait(batch.done)
        self._write_texts([output for at, output in batch.outputs.items() if not requests[at].labels])
        completions = []
        for at, (request, ids) in both:
            if at in batch.outputs:
                completions += self._completions(request, batch.outputs[at])
            else:
                detail = f"{len(ids)} prompt + {request.max_tokens} answer tokens, model takes {room}"
                refused = Completion(error="too long", detail=detail, num_prompt_tokens=len(ids))
                completions += [refused] * request.samples
        return completions

    def _wait(self, done: Future[None]) -> None:
        while True:
            try:
                return done.result(timeout=1)
            except TimeoutError:
                if self._dead:  # it died before it saw this batch
                    raise self._dead from None

    def _work(self) -> None:
        """Adds what is asked for and steps the engine, for ever; alone in touching it."""
        waiting: dict[str, tuple[_Batch, int]] = {}
        for number in itertools.count():  # the engine wants an id of its own for every request
            try:
                while not waiting or not self._inbox.empty():
                    batch = self._inbox.get()
                    for at, (ids, params) in batch.asked.items():
                        name = f"{number}-{len(waiting)}"
                        waiting[name] = batch, at
                        self._engine.add_request(name, {"prompt_token_ids": ids}, params)
                for output in self._engine.step():
                    if output.finished:
                        batch, at = waiting.pop(output.request_id)
                        batch.outputs[at] = output
                        if len(batch.outputs) == len(batch.asked):
                            batch.done.set_result(None)
            except BaseException as error:  # raised again in every thread that waits for an answer
                traceback.print_exc()
                self._dead = EngineDiedError(f"{type(error).__name__}: {error}")
                for batch in {batch for batch, _ in waiting.values()}:
                    batch.done.set_exception(self._dead)
                return

    def _params(self, request: Request) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

        label_ids = [self._label_id(label) for label in request.labels]
        schema = request.json_schema
        return SamplingParams(
            n=request.samples,
            max_tokens=1 if label_ids else request.max_tokens,
            temperature=0.0 if label_ids else request.temperature,
            top_p=request.top_p,
            seed=None if label_ids else request.seed,
            logprob_token_ids=label_ids or None,
            detokenize=not label_ids and self._decoder is None,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _write_texts(self, outputs: Sequence[RequestOutput]) -> None:
        """The answers' texts, all at once and beside the engine; vLLM would decode each token between its steps.

        As vLLM has them: without the token that ended one, nor a character of which bytes are missing at the end (but
        where bytes are no text at all, tokenizers that fall back to bytes may put in more replacement characters).
        """
        if self._decoder is None:  # then vLLM has done it
            return
        answers = [answer for output in outputs for answer in output.outputs]
        ids = [list(one.token_ids)[: -1 if one.finish_reason == "stop" else None] for one in answers]
        for answer, text in zip(answers, self._decoder.decode_batch(ids, skip_special_tokens=True), strict=True):
            answer.text = text.rstrip("\N{REPLACEMENT CHARACTER}")

    def _label_id(self, label: str) -> int:
        if label not in self._label_ids:
            ids = self._tokenizer.encode(label, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(f"judge: the model's tokenizer makes {len(ids)} tokens of {label!r}; use another judge")
            self._label_ids[label] = ids[0]
        return self._label_ids[label]

    def _completions(self, request: Request, output: RequestOutput) -> list[Completion]:
        """One per sample; the prompt's tokens are counted with the first."""
        done = []
        for at, answer in enumerate(output.outputs):
            counts = Completion(
                num_prompt_tokens=0 if at else len(output.prompt_token_ids or ()),
                num_cached_tokens=0 if at else output.num_cached_tokens or 0,
                num_tokens=len(answer.token_ids),
            )
            if request.labels:
                found = answer.logprobs[0] if answer.logprobs else {}
                ids = [self._label_id(label) for label in request.labels]
                values = tuple(found[one].logprob if one in found else float("-inf") for one in ids)
                done.append(replace(counts, label_logprobs=values))
            else:
                done.append(finished(counts, answer.text, answer.finish_reason == "length", request.max_tokens))
        return done


def finished(counts: Completion, text: str, cut_off: bool, max_tokens: int) -> Completion:
    """`counts` with the answer's text, or with the reason why it is not usable."""
    text = text.strip()
    if cut_off:
        return replace(counts, text=text, error="cut off", detail=f"not finished after {max_tokens} tokens")
    if not text:
        return replace(counts, error="empty answer", detail="the model ended its answer at once")
    return replace(counts, text=text)


class FakeEngine:
    """Answers with a function of the request; for tests of logic only."""

    def __init__(self, answer: Callable[[Request], Completion]):
        self._answer = answer

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """`answer` of each request, once per sample."""
        return [self._answer(request) for request in requests for _ in range(request.samples)]


def seed_of(subject_id: str, seed: int) -> int:
    """A request's own seed, so that an answer does not depend on what else is in the batch or the run."""
    return int(hashlib.sha256(f"{subject_id}/{seed}".encode()).hexdigest()[:8], 16)
