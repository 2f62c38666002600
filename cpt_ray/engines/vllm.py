"""The adapter to vLLM: a model in this process, kept full by what several threads ask for.

Written for the pinned vLLM 0.32.0; where it uses what vLLM does not promise to keep, a comment says why.
"""

from __future__ import annotations

import itertools
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from cpt_ray.chat.conversations import PromptTokens
from cpt_ray.chat.templates import ChatTemplate, control_tokens, find_control_token
from cpt_ray.chat.thoughts import mark_tokens, opens_thoughts
from cpt_ray.config import ModelConfig, SamplingConfig
from cpt_ray.engines.engine import (
    CUT_OFF,
    Completion,
    EngineDiedError,
    Request,
    completion_with,
    log_sum,
    why_unfinished,
)
from cpt_ray.errors import UserError, did_you_mean, first_line

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput, RequestOutput

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

    known = list(EngineArgs.__dataclass_fields__)  # 0.32.0 has no list of its own
    for name in config.engine:
        if name not in known:
            raise UserError(f"engine.{name}: vLLM has no such engine argument{did_you_mean(name, known)}")
    _check_reasoning_parser(config)
    arguments: dict[str, Any] = {"model": config.path, "seed": 0}
    if config.num_gpus == 0:
        # A seeded request whose prompt is prefilled in chunks kills a CPU engine (vLLM 0.32 rewinds the generator's
        # offset, which CPU generators do not have), so prompts are prefilled whole.
        arguments |= {"kv_cache_memory_bytes": CPU_KV_CACHE_BYTES, "enable_chunked_prefill": False}
    return arguments | config.engine


def check_template(config: ModelConfig, other: str = "") -> None:
    """UserError if the chat template drops what a system message or a user says; before the weights are loaded.

    Args:
        other: a template, or its file, in the place of the model's own.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.engine.get("tokenizer") or config.path)
    except (ImportError, OSError, ValueError):  # vLLM reports what is wrong, or brings its own tokenizer
        return
    if other and "{" not in other and not Path(other).is_file():
        raise UserError(f"serve.frontend.chat_template: {other}: no such file")
    if other:
        tokenizer.chat_template = other if "{" in other else Path(other).read_text(encoding="utf-8")
    if hasattr(tokenizer, "chat_template") and config.engine.get("tokenizer_mode") != "mistral":
        ChatTemplate(tokenizer, config.chat_template_kwargs, config.model).check()


def _check_reasoning_parser(config: ModelConfig) -> None:
    name = config.engine.get("reasoning_parser")
    if name and not config.engine.get("reasoning_parser_plugin"):
        from vllm.reasoning import ReasoningParserManager

        known = ReasoningParserManager.list_registered()
        if name not in known:
            raise UserError(f"engine.reasoning_parser: vLLM has no {name!r}{did_you_mean(str(name), known)}")


def vllm_sampling(sampling: SamplingConfig) -> dict[str, Any]:
    """A role's sampling by the names of vLLM's `SamplingParams`."""
    params = sampling.model_dump()
    return params | {"stop": list(sampling.stop), "include_stop_str_in_output": params.pop("include_stop")}


class _Batch:
    """The requests of one call of `run`, and what the thread that steps the engine returns for them."""

    def __init__(self, asked: dict[int, tuple[list[int], SamplingParams]]):
        self.asked = asked
        """Token ids and parameters, by the request's number."""
        self.outputs: dict[int, RequestOutput] = {}
        self.done: Future[None] = Future()


class VllmEngine:
    """A vLLM engine in this process, kept full: requests of several threads share its batches.

    UserError if the model's chat template drops what a system message or a user says.
    """

    def __init__(self, config: ModelConfig):
        from transformers import TokenizersBackend
        from vllm import LLM

        check_template(config)
        arguments = {"disable_log_stats": True, "structured_outputs_config": TIGHT_JSON, **engine_arguments(config)}
        self._llm = LLM(**arguments)
        # `LLM.generate` answers one batch before it takes the next, so its engine is stepped here (`_work`) by
        # `llm_engine`, `add_request` and `step`, which in 0.32.0 are there for LLM alone.
        self._engine = self._llm.llm_engine
        self._tokenizer = self._llm.get_tokenizer()
        self._token_ids = PromptTokens(self._tokenizer, config.chat_template_kwargs)
        is_fast = isinstance(self._tokenizer, TokenizersBackend)
        self._decoder: Any = self._tokenizer.backend_tokenizer if is_fast else None
        self._control = control_tokens(self._tokenizer)
        self._max_model_len = self._engine.model_config.max_model_len
        self._label_ids: dict[str, list[int]] = {}
        self._mark_tokens = mark_tokens(self._tokenizer)
        # That of gpt-oss parses nothing by itself; the table of marks has its form, whose tokens are kept.
        has_parser = config.engine.get("reasoning_parser") not in (None, "", "openai_gptoss")
        self._parser = _NamedParser(config, self._tokenizer, self._engine.model_config) if has_parser else None
        self._inbox: SimpleQueue[_Batch] = SimpleQueue()
        self._dead: EngineDiedError | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request and sample; what is too long, or has a control token in a text, is never sent."""
        prompts = self._token_ids([request.messages for request in requests])
        both = list(enumerate(zip(requests, prompts, strict=True)))
        room = self._max_model_len
        marked = {at: token for at, request in enumerate(requests) if (token := self._control_token(request))}
        fits = {
            at: (ids, self._params(request))
            for at, (request, ids) in both
            if len(ids) + request.max_tokens <= room and at not in marked
        }
        batch = _Batch(fits)
        if batch.asked:
            self._inbox.put(batch)
            self._wait(batch.done)
        self._write_texts([output for at, output in batch.outputs.items() if not requests[at].labels])
        completions = []
        for at, (request, ids) in both:
            if at in batch.outputs:
                completions += self._completions(request, batch.outputs[at])
                continue
            detail = f"{len(ids)} prompt + {request.max_tokens} answer tokens, model takes {room}"
            refused = Completion(error="too long", detail=detail, num_prompt_tokens=len(ids))
            if at in marked:
                refused = Completion(error="control token", detail=f"{marked[at]!r} would end or begin a turn")
            completions += [refused] * request.samples
        return completions

    def _control_token(self, request: Request) -> str:
        texts = (find_control_token(self._control, message["content"]) for message in request.messages)
        return next(filter(None, texts), "")

    def _wait(self, done: Future[None]) -> None:
        while True:
            try:
                return done.result(timeout=1)
            except TimeoutError:
                if self._dead:  # it died before it saw this batch
                    raise self._dead from None

    def _work(self) -> None:
        """Adds requests and steps the engine, for ever; the only thread that touches it."""
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

        label_ids = list(dict.fromkeys(token_id for ids in self._ids_of_labels(request.labels) for token_id in ids))
        schema = request.json_schema
        # `logprob_token_ids` and `MAX_LOGPROB_TOKEN_IDS` (below) are in 0.32.0 and in no documentation: all labels'
        # probabilities by one token, where `logprobs` has only those of the likeliest tokens.
        return SamplingParams(
            n=request.samples,
            max_tokens=1 if label_ids else request.max_tokens,
            temperature=0.0 if label_ids else request.temperature,
            top_p=request.top_p,
            seed=None if label_ids else request.seed,
            stop=list(request.active_stops),
            include_stop_str_in_output=request.include_stop,
            logprob_token_ids=label_ids or None,
            detokenize=bool(request.active_stops) or (not label_ids and self._decoder is None),
            skip_special_tokens=not (self._mark_tokens or self._keeps_special_tokens),
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _write_texts(self, outputs: Sequence[RequestOutput]) -> None:
        """The answers' texts, all at once and beside the engine; vLLM would decode each token between its steps.

        As vLLM has them: without the token that ended one, nor a character of which bytes are missing at the end (but
        where bytes are no text at all, tokenizers that fall back to bytes may put in more replacement characters).
        What ended at a stop text is still whole.
        """
        if self._decoder is None:  # then vLLM has done it
            return
        answers = [answer for output in outputs for answer in output.outputs]
        ids = [list(answer.token_ids)[: -1 if _ended_by_token(answer) else None] for answer in answers]
        for answer, text in zip(answers, self._decode(ids), strict=True):
            answer.text = text.rstrip("\N{REPLACEMENT CHARACTER}")

    @property
    def _keeps_special_tokens(self) -> bool:
        return self._parser is not None and self._parser.keeps_special_tokens

    def _decode(self, answers: list[list[int]]) -> list[str]:
        """Texts without special tokens, but for those that are marks of thoughts (or all that a parser asks for)."""
        if self._keeps_special_tokens or not self._mark_tokens:
            return list(self._decoder.decode_batch(answers, skip_special_tokens=not self._keeps_special_tokens))
        return ["".join(map(self._piece, itertools.groupby(ids, self._mark_tokens.get))) for ids in answers]

    def _piece(self, run: tuple[str | None, Iterable[int]]) -> str:
        """Text of a run of tokens: the same mark, or none of the marks."""
        mark, ids = run[0], list(run[1])
        return mark * len(ids) if mark else str(self._decoder.decode(ids, skip_special_tokens=True))

    def _ids_of_labels(self, labels: Sequence[str]) -> list[list[int]]:
        """Each label's tokens, the most usual first: every token that is the label but for white space around it."""
        from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

        for label in labels:
            if label not in self._label_ids:
                self._label_ids[label] = self._forms(label)
        return [self._label_ids[label][: max(1, MAX_LOGPROB_TOKEN_IDS // len(labels))] for label in labels]

    def _forms(self, label: str) -> list[int]:
        known = self._engine.model_config.get_vocab_size()
        near = [at for token, at in self._tokenizer.get_vocab().items() if label in token and at < known]
        texts = {at: self._tokenizer.decode([at]) for at in near}
        forms = [at for at in sorted(near, key=lambda at: (len(texts[at]), at)) if texts[at].strip() == label]
        if not forms:
            raise UserError(f"judge: the model's tokenizer has no one token for {label!r}; use another judge")
        return forms

    def _completions(self, request: Request, output: RequestOutput) -> list[Completion]:
        """One per sample; the prompt's tokens are counted with the first."""
        prompt_ids = output.prompt_token_ids or ()
        done = []
        for at, answer in enumerate(output.outputs):
            counts = Completion(
                num_prompt_tokens=0 if at else len(prompt_ids),
                num_cached_tokens=0 if at else output.num_cached_tokens or 0,
                num_tokens=len(answer.token_ids),
            )
            if request.labels:
                done.append(self._label_completion(request, answer, counts))
                continue
            thoughts, text = "", request.up_to_stop(answer.text)
            if self._parser:
                thoughts, text = self._parser.part(prompt_ids, answer.token_ids, text)
            # JSON that is forced upon a model has no room for thoughts, even where the chat template opens them.
            starts_in_thoughts = (
                not self._parser and not request.json_schema and opens_thoughts(self._tokenizer, prompt_ids)
            )
            done.append(
                completion_with(counts, text, answer.finish_reason, request.max_tokens, thoughts, starts_in_thoughts)
            )
        return done

    def _label_completion(self, request: Request, answer: CompletionOutput, counts: Completion) -> Completion:
        if (error := why_unfinished(answer.finish_reason)) not in ("", CUT_OFF):
            return replace(counts, error=error, detail=f"finish_reason {answer.finish_reason}")
        logprobs = answer.logprobs[0] if answer.logprobs else {}
        ids_of_labels = self._ids_of_labels(request.labels)
        forms = [[logprobs[token_id].logprob for token_id in ids if token_id in logprobs] for ids in ids_of_labels]
        return replace(counts, label_logprobs=tuple(map(log_sum, forms)))


def _ended_by_token(answer: CompletionOutput) -> bool:
    """Whether the last token is the model's end mark, and no part of a stop text."""
    return answer.finish_reason == "stop" and not isinstance(answer.stop_reason, str)


class _NamedParser:
    """vLLM's own parser of a model's thoughts (engine.reasoning_parser), for forms that no table of marks covers."""

    def __init__(self, config: ModelConfig, tokenizer: Any, model_config: Any):
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.parser import ParserManager

        # What vLLM's server does with a parser, by the same calls (0.32.0: vllm/parser, which may change): offline vLLM
        # parses no thoughts.
        name, options = config.engine["reasoning_parser"], {"chat_template_kwargs": config.chat_template_kwargs}
        try:
            kind = ParserManager.get_parser(reasoning_parser_name=name, model_name=config.model, tokenizer=tokenizer)
            assert kind is not None
            self._make: Callable[[], Any] = lambda: kind(tokenizer, None, model_config=model_config, **options)
            self._request = self._make().adjust_request(ChatCompletionRequest(model=config.model, messages=[]))
            self.part((), (), "")
        except Exception as error:  # each parser has its own; now, not at the first answer
            raise UserError(f"engine.reasoning_parser: {name} and {config.model}: {first_line(error)}") from error
        self.keeps_special_tokens = not self._request.skip_special_tokens

    def part(self, prompt_ids: Sequence[int], ids: Sequence[int], text: str) -> tuple[str, str]:
        """(thoughts, answer); parsers have a state, so that each answer needs one of its own."""
        parser = self._make()
        parser.set_prompt_token_ids(prompt_ids)
        if prompt_ids and parser.is_reasoning_end(list(prompt_ids)):
            return "", text  # the template has ended the thoughts: these parsers would take the answer for thoughts
        thoughts, answer, _ = parser.parse(text, self._request, model_output_token_ids=ids)
        return thoughts or "", answer or ""
