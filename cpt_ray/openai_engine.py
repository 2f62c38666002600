"""An engine that is somebody else's server: any OpenAI-compatible endpoint as writer, director or judge.

What a request can be at fault for (too long, refused) is a completion with its reason. What only the server can be at
fault for is tried again by the client, then ends the run: a server that is down must not turn into rejected rows.
"""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import openai
from openai.types.chat import ChatCompletion
from pydantic import SecretStr

from cpt_ray.config import ModelConfig
from cpt_ray.engine import Completion, Request, finished
from cpt_ray.errors import UserError

CHARACTERS_PER_TOKEN = 3
"""A guess on the safe side, for the tokens-per-minute limit; the ledger has the server's own counts."""
TOP_LOGPROBS = 20
"""The most alternatives that the API gives; a level number below them counts as impossible."""


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


class OpenAIEngine:
    """Chat completions of an endpoint, many at a time, within its limits; all threads' requests go through one loop."""

    def __init__(self, config: ModelConfig, key: SecretStr):
        assert config.endpoint is not None
        self._config, self._endpoint = config, config.endpoint
        share = config.num_actors.most  # every engine actor takes its part of the limits
        self._requests = Pace(self._endpoint.requests_per_minute, share)
        self._tokens = Pace(self._endpoint.tokens_per_minute, share)
        self._slots = asyncio.Semaphore(max(1, self._endpoint.concurrency // share))
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
        async with self._slots:
            await self._requests.wait(1)
            await self._tokens.wait(characters / CHARACTERS_PER_TOKEN + request.max_tokens * request.samples)
            try:
                made = await self._create(request)
            except openai.AuthenticationError:
                raise UserError(f"{self._where}: the key in ${self._endpoint.api_key_env} is refused") from None
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                too_long = "context" in error.message.lower() or "maximum" in error.message.lower()
                refusal = Completion(error="too long" if too_long else "refused", detail=error.message[:300])
                return [refusal] * request.samples
            except openai.OpenAIError as error:
                text = " ".join(str(error).split())[:200]
                raise UserError(f"{self._where}: gave up after a last {type(error).__name__} ({text})") from None
        return self._completions(request, made)

    async def _create(self, request: Request) -> ChatCompletion:
        """The client itself tries again after errors of the server and the network; this, after an unreadable body."""
        body = self._body(request)
        for tried in range(self._endpoint.max_retries + 1):
            if tried:
                await asyncio.sleep(random.uniform(0.5, 1) * min(2**tried, 60))
            try:
                made = await self._client.chat.completions.create(**body)
            except (openai.APIResponseValidationError, json.JSONDecodeError):
                continue
            if isinstance(made, ChatCompletion) and len(made.choices or ()) == request.samples:
                return made
        raise UserError(f"{self._where}: what it sends is no chat completion with {request.samples} choice(s)")

    @property
    def _where(self) -> str:
        return f"{self._config.model} at {self._endpoint.base_url}"

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "messages": request.messages,
            "max_completion_tokens": request.max_tokens,
            "temperature": 0.0 if request.labels else request.temperature,
            "top_p": request.top_p,
            "n": request.samples,
        }
        more = dict(self._endpoint.extra_body)
        if self._config.chat_template_kwargs:
            more["chat_template_kwargs"] = self._config.chat_template_kwargs
        if request.seed is not None:
            body["seed"] = request.seed
        if request.labels:
            body |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if request.json_schema:
            wanted = {"name": "answer", "strict": True, "schema": request.json_schema}
            body["response_format"] = {"type": "json_schema", "json_schema": wanted}
        return body | ({"extra_body": more} if more else {})

    def _completions(self, request: Request, made: ChatCompletion) -> list[Completion]:
        usage = made.usage
        cached = usage and usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens
        counts = Completion(
            num_prompt_tokens=usage.prompt_tokens if usage else 0,
            num_cached_tokens=cached or 0,
            num_tokens=usage.completion_tokens if usage else 0,
        )
        done = []
        for choice in made.choices:
            if request.labels:
                found = choice.logprobs.content[0].top_logprobs if choice.logprobs and choice.logprobs.content else []
                known = {one.token: one.logprob for one in found}
                values = tuple(known.get(label, float("-inf")) for label in request.labels)
                done.append(replace(counts, label_logprobs=values))
            else:
                text, cut_off = choice.message.content or "", choice.finish_reason == "length"
                done.append(finished(counts, text, cut_off, request.max_tokens))
            counts = Completion()  # the server counts all of a request's samples together
        return done
