"""An engine behind a server: any OpenAI-compatible endpoint as writer, director or judge.

A request's own fault (too long, refused) becomes a completion with a reason. After a fault of the server the client
tries again, then the run ends: a server that is down must not turn into rejected rows, nor must a server that refuses
all requests for something they have in common.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from openai.types.chat.chat_completion import Choice
from pydantic import SecretStr

from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import CUT_OFF, Completion, Request, completion_with, log_sum, why_unfinished
from cpt_ray.engines.waiting import count_answer
from cpt_ray.errors import UserError

CHARACTERS_PER_TOKEN = 3
"""A guess on the safe side, for the tokens-per-minute limit; the ledger has the server's own counts."""
TOP_LOGPROBS = 20
"""The most alternatives that the API gives; a level number below them counts as impossible."""
REFUSED_ALIKE = 8
"""Requests that go out before one of their kind has been answered. If all of them are refused with the same words, it
is not for what each of them asks: the run ends."""
SHORTEST_SECRET = 8
"""Characters of a key that is kept out of what is shown; a shorter one ("EMPTY") is no secret."""
_TOO_LONG = re.compile(
    r"maximum (?:context|model) length (?:is|of)"
    r"|(?:exceed|longer than|too (?:long|large|many tokens) for|larger than|greater than).{0,60}"
    r"(?:context (?:length|size|window)|model length|maximum number of tokens)"
    r"|(?:prompt|input) is too long",
    re.IGNORECASE | re.DOTALL,
)
_OF_SIZE = re.compile(r"greater|larger?|less|exceed|at (?:most|least)|maximum|range", re.IGNORECASE)
"""Words of a refusal that is about a field's value."""
_TOO_LONG_CODES = {"context_length_exceeded", "exceed_context_size_error"}
_FILTER_CODES = {"content_filter", "content_policy_violation"}


class Pace:
    """Spreads work evenly: at most so much a minute, of which this process has one of `shares`."""

    def __init__(self, per_minute: float | None, shares: int):
        self._seconds_each = 60 * shares / per_minute if per_minute else 0.0
        self._free_at = 0.0

    async def wait(self, amount: float) -> None:
        """Until `amount` more may be spent."""
        now = time.monotonic()
        start = max(now, self._free_at)
        self._free_at = start + amount * self._seconds_each
        await asyncio.sleep(start - now)


def _kind_of(body: dict[str, Any]) -> str:
    """The parameters that a request shares with others: all but its texts and seed; of a schema, whether it has one."""
    own = {"messages", "seed", "response_format"}
    return json.dumps(
        [{name: value for name, value in body.items() if name not in own}, "response_format" in body], default=str
    )


class _Kind:
    """Requests with the same parameters: the first few are sent, the others wait until one of those is answered."""

    def __init__(self) -> None:
        self._sent = self._back = 0
        self._is_known = asyncio.Event()
        self._was_answered = False
        self._refusals: Counter[str] = Counter()

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Waits until a request of this kind may be sent."""
        if self._sent >= REFUSED_ALIKE:
            await self._is_known.wait()
        self._sent += 1
        try:
            yield
        finally:  # also of one that failed: others may wait for it
            self._back += 1
            if self._back >= REFUSED_ALIKE:
                self._is_known.set()

    def answered(self) -> None:
        """The server takes requests of this kind."""
        self._was_answered = True
        self._is_known.set()

    def refused(self, words: str) -> bool:
        """Whether so many were refused, all in these words, that the others will be as well."""
        self._refusals[words] += 1
        return not self._was_answered and len(self._refusals) == 1 and self._refusals[words] >= REFUSED_ALIKE


class OpenAIEngine:
    """Chat completions of an endpoint, many at a time, within its limits; all threads' requests go through one loop."""

    def __init__(self, config: ModelConfig, key: SecretStr):
        assert config.endpoint is not None
        self._config, self._endpoint = config, config.endpoint
        share = config.num_actors.most  # every engine actor takes its part of the limits
        self._requests = Pace(self._endpoint.requests_per_minute, share)
        self._tokens = Pace(self._endpoint.tokens_per_minute, share)
        self._slots = asyncio.Semaphore(max(1, self._endpoint.concurrency // share))
        self._kinds: defaultdict[str, _Kind] = defaultdict(_Kind)
        self._ended: UserError | None = None
        """The error that ended the run; requests of other threads are then not sent."""
        self._client = openai.AsyncOpenAI(
            base_url=self._endpoint.base_url,
            api_key=key.get_secret_value(),
            timeout=self._endpoint.timeout_seconds,
            max_retries=self._endpoint.max_retries,
        )
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request and sample, in the same order."""
        return asyncio.run_coroutine_threadsafe(self._run(requests), self._loop).result()

    async def _run(self, requests: Sequence[Request]) -> list[Completion]:
        try:
            async with asyncio.TaskGroup() as group:  # one failure stops what is under way
                tasks = [group.create_task(self._answer(request)) for request in requests]
        except* UserError as failed:
            raise failed.exceptions[0] from None
        return [completion for task in tasks for completion in task.result()]

    async def _answer(self, request: Request) -> list[Completion]:
        characters = sum(len(message["content"]) for message in request.messages)
        kind = self._kinds[_kind_of(self._body(request))]
        async with kind.turn(), self._slots:
            if self._ended:
                raise self._ended
            await self._requests.wait(1)
            await self._tokens.wait(characters / CHARACTERS_PER_TOKEN + request.max_tokens * request.samples)
            try:
                return await self._send(request, kind)
            except UserError as error:
                self._ended = error
                raise

    async def _send(self, request: Request, kind: _Kind) -> list[Completion]:
        try:
            answer = await self._create(request)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return [self._refusal(error, kind)] * request.samples
        except openai.AuthenticationError as error:
            where = f"{self._where}: the key in ${self._endpoint.api_key_env} is refused"
            raise UserError(f"{where} ({self._server_message(error)})") from None
        except (openai.PermissionDeniedError, openai.NotFoundError) as error:
            raise UserError(
                f"{self._where}: refused with {error.status_code} ({self._server_message(error)}); see model, "
                "endpoint.base_url and what the key may do"
            ) from None
        except openai.OpenAIError as error:
            text = self._without_key(" ".join(str(error).split())[:200])
            raise UserError(f"{self._where}: gave up; the last error was {type(error).__name__} ({text})") from None
        kind.answered()
        count_answer()
        return self._completions(request, answer)

    def _refusal(self, error: openai.APIStatusError, kind: _Kind) -> Completion:
        """The completion of a refused request; UserError if the server refuses all requests alike."""
        words = self._server_message(error)
        codes = {error.code, error.type}
        if codes & _TOO_LONG_CODES or _TOO_LONG.search(words):
            return Completion(error="too long", detail=words)
        if codes & _FILTER_CODES:
            return Completion(error="filtered", detail=words)
        sent = self._endpoint.max_tokens_field
        if re.search(rf"\b{sent}\b", words) and not _OF_SIZE.search(words):
            other = "max_tokens" if sent == "max_completion_tokens" else "max_completion_tokens"
            words += f" (if it does not know {sent}, set endpoint.max_tokens_field: {other})"
        if kind.refused(words):
            raise UserError(f"{self._where}: refuses all requests for one reason, with {error.status_code}: {words}")
        return Completion(error="refused", detail=words)

    def _server_message(self, error: openai.APIStatusError) -> str:
        """What the server said, in one line."""
        text = _text_of(error.body) if error.body else error.response.text
        return self._without_key(" ".join(text.split())[:300]) or "no reason given"

    def _without_key(self, text: str) -> str:
        """The text without the key, which some servers repeat."""
        key = self._client.api_key
        return text.replace(key, "***") if len(key) >= SHORTEST_SECRET else text

    async def _create(self, request: Request) -> ChatCompletion:
        """The client itself tries again after errors of the server and the network; this, after an unreadable body."""
        body = self._body(request)
        for tried in range(self._endpoint.max_retries + 1):
            if tried:
                await asyncio.sleep(random.uniform(0.5, 1) * min(2**tried, 60))
            try:
                answer = await self._client.chat.completions.create(**body)
            except (openai.APIResponseValidationError, json.JSONDecodeError):
                continue
            whole = [choice for choice in getattr(answer, "choices", None) or () if getattr(choice, "message", None)]
            if isinstance(answer, ChatCompletion) and len(whole) == request.samples:
                return answer
        raise UserError(f"{self._where}: its response is not a chat completion with {request.samples} choice(s)")

    @property
    def _where(self) -> str:
        return f"{self._config.model} at {self._endpoint.base_url}"

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": request.messages,
            self._endpoint.max_tokens_field: request.max_tokens,
            "temperature": 0.0 if request.labels else request.temperature,
            "top_p": request.top_p,
            "n": request.samples,
        }
        more = dict(self._endpoint.extra_body)
        if self._config.chat_template_kwargs:
            more["chat_template_kwargs"] = self._config.chat_template_kwargs
        # the API cannot include a stop text: then all is written, and cut here
        if request.active_stops and not request.include_stop:
            body["stop"] = list(request.active_stops)
        if request.seed is not None:
            body["seed"] = request.seed
        if request.labels:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if request.json_schema:
            wanted = {"name": "answer", "strict": True, "schema": request.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body | ({"extra_body": more} if more else {})

    def _completions(self, request: Request, answer: ChatCompletion) -> list[Completion]:
        usage = answer.usage
        cached = usage and usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
        thought = usage and usage.completion_tokens_details and usage.completion_tokens_details.reasoning_tokens
        counts = Completion(
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_cached_tokens=cached or 0,
            num_tokens=usage.completion_tokens if usage else 0,
            thought_tokens=thought or 0,
        )
        done = []
        for choice in answer.choices:
            done.append((_label_completion if request.labels else _text_completion)(request, choice, counts))
            counts = Completion()  # the server counts all of a request's samples together
        return done


def _label_completion(request: Request, choice: Choice, counts: Completion) -> Completion:
    """The labels' log-probabilities: a label may be several tokens, which look alike or differ by white space."""
    reason = choice.finish_reason
    if (error := why_unfinished(reason)) not in ("", CUT_OFF):
        return replace(counts, error=error, detail=f"finish_reason {reason}")
    if not choice.logprobs or not choice.logprobs.content:
        if choice.message.refusal:
            return replace(counts, error="refused", detail=choice.message.refusal[:300])
        detail = "the server sends no logprobs; use another judge, or judge.mode: rationale"
        return replace(counts, error="no probabilities", detail=detail)
    top = choice.logprobs.content[0].top_logprobs
    masses = [[token.logprob for token in top if token.token.strip() == label] for label in request.labels]
    return replace(counts, label_logprobs=tuple(map(log_sum, masses)))


def _text_completion(request: Request, choice: Choice, counts: Completion) -> Completion:
    """The completion of a request for text."""
    message, reason = choice.message, choice.finish_reason
    whole, thoughts = _parts(message.content)
    text = request.up_to_stop(whole)
    if text != whole:
        reason = "stop"
    for name in ("reasoning_content", "reasoning"):  # no fields of OpenAI's own
        thoughts = thoughts or _parts(getattr(message, name, None))[0]
    if not text.strip() and not why_unfinished(reason):
        if message.refusal:
            return replace(counts, error="refused", detail=message.refusal[:300])
        if message.tool_calls:
            reason = "tool_calls"
    return completion_with(counts, text, reason, request.max_tokens, thoughts)


def _parts(content: Any) -> tuple[str, str]:
    """(text, thoughts) of a message's content, which some servers send in parts."""
    if not isinstance(content, list):
        return content or "", ""
    parts = [part for part in content if isinstance(part, dict)]
    thoughts = [_text_of(part.get("thinking", "")) for part in parts if part.get("type") == "thinking"]
    return "".join(str(part.get("text") or "") for part in parts if part.get("type") == "text"), "".join(thoughts)


def _text_of(body: Any) -> str:
    """What an error's body says, whatever its shape: OpenAI's, FastAPI's (a list of places and messages), another."""
    if isinstance(body, list):
        return "; ".join(filter(None, map(_text_of, body)))
    if not isinstance(body, dict):
        return str(body)
    if body.get("msg"):
        place = ".".join(map(str, body.get("loc") or ()))
        return f"{place}: {body['msg']}" if place else str(body["msg"])
    inner = next((body[name] for name in ("message", "detail", "error", "errors", "text") if body.get(name)), None)
    return _text_of(inner) if inner else json.dumps(body, ensure_ascii=False)
