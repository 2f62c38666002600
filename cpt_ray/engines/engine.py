"""The seam where a model is called: requests in, completions out, in order, none missing.

`VllmEngine` (vllm.py) is a model here, `OpenAIEngine` (openai.py) one behind a server. `FakeEngine` is for tests.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from cpt_ray.chat.conversations import ChatMessage
from cpt_ray.chat.thoughts import DETAILS, NOT_ENDED, without_thoughts
from cpt_ray.config import SamplingConfig
from cpt_ray.errors import UserError
from cpt_ray.texts import is_blank


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One conversation to be continued."""

    messages: list[ChatMessage]
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    """Texts that end the answer; not looked for where the answer is JSON of a schema, which ends by itself."""
    include_stop: bool = False
    """Whether the stop text is the answer's last part."""
    seed: int | None = None
    labels: tuple[str, ...] = ()
    """If given: no text is wanted but the log-probability of each label as the first token of the answer."""
    json_schema: dict[str, Any] | None = None
    """If given: the answer is JSON of this schema, by force."""
    samples: int = 1
    """Completions wanted; they share one prefill."""

    @property
    def active_stops(self) -> tuple[str, ...]:
        """The stop texts that are looked for: none where labels or JSON are asked for."""
        return () if self.labels or self.json_schema else self.stop

    def up_to_stop(self, text: str) -> str:
        """The text up to its first stop text: the one that is complete first, as vLLM finds it."""
        places = [(at + len(stop), at) for stop in self.active_stops if (at := text.find(stop)) >= 0]
        end, start = min(places, default=(len(text), len(text)))
        return text[: end if self.include_stop else start]


def sampling_request(
    messages: list[ChatMessage], sampling: SamplingConfig, subject_id: str, seed: int, **more: Any
) -> Request:
    """A request for text with a role's sampling settings. Its seed is its own, so the answer does not depend on the
    batch."""
    return Request(messages=messages, seed=seed_of(subject_id, seed), **sampling.model_dump(), **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What came of a request; `error` is a reason if nothing usable did."""

    text: str = ""
    """Without thoughts; "" where there is an error, unless the answer itself was cut off."""
    error: str = ""
    """"" or a short fixed phrase: "too long", "empty answer", "cut off"."""
    detail: str = ""
    label_logprobs: tuple[float, ...] = ()
    """Per label of the request, under the full vocabulary: all tokens that are the label but for white space."""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_tokens: int = 0
    """All that were generated."""
    had_thoughts: bool = False
    thought_tokens: int = 0
    """How many of the generated tokens were thoughts; estimated by their share of the characters unless known."""


class Engine(Protocol):
    """Anything that continues conversations; `run` may be called by several threads at once."""

    def run(self, requests: Sequence[Request]) -> list[Completion]:
        """One completion per request and sample, in the same order."""
        ...


class EngineDiedError(RuntimeError):
    """The engine, or one of its processes, ended by itself; a new engine may succeed."""


def check_schema_is_enforced(engine: Engine, where: str, max_tokens: int = 64) -> None:
    """UserError unless the engine enforces a JSON schema: no model would write this JSON by itself.

    Args:
        max_tokens: enough for the thoughts that a model may have before it.
    """
    word = "quokka-7301"
    schema = {
        "type": "object",
        "properties": {"answer": {"enum": [word]}},
        "required": ["answer"],
        "additionalProperties": False,
    }
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    answer = engine.run([Request(messages=asked, max_tokens=max_tokens, temperature=0, json_schema=schema)])[0]
    try:
        written = json.loads(answer.text)
    except json.JSONDecodeError:
        written = None
    if written != {"answer": word}:
        why = f" ({answer.error}: {answer.detail})" if answer.error else ""
        raise UserError(
            f"{where}: asked for JSON of a given schema, it wrote {answer.text[:60]!r}{why}; "
            "rationales need a server that enforces schemas (or set judge.mode: logprobs)"
        )


def log_sum(logprobs: Iterable[float]) -> float:
    """Logarithm of the sum of probabilities; never above 0, whatever rounding makes of it."""
    total = math.fsum(math.exp(min(logprob, 0.0)) for logprob in logprobs)
    return min(math.log(total), 0.0) if total else -math.inf


CUT_OFF = "cut off"
_FINISHED = {"", "stop", "eos", "eos_token"}
_UNFINISHED = {"length": CUT_OFF, "content_filter": "filtered", "tool_calls": "tool call", "function_call": "tool call"}


def why_unfinished(finish_reason: str | None) -> str:
    """Why an answer that ended so is not a finished one, as a short phrase; "" if it is."""
    name = (finish_reason or "").lower()
    plain = "".join(letter if letter.isalnum() or letter in "_-" else " " for letter in name[:40])
    return "" if name in _FINISHED else _UNFINISHED.get(name, f"ended by {plain}")


def completion_with(
    counts: Completion,
    text: str,
    finish_reason: str | None,
    max_tokens: int,
    thoughts: str = "",
    starts_in_thoughts: bool = False,
) -> Completion:
    """`counts` as a completion: with the answer's text, thoughts removed, or with the reason why there is none.

    Args:
        counts: with `thought_tokens`, if they are known.
        finish_reason: the engine's or server's.
        thoughts: those that came beside the text.
        starts_in_thoughts: the prompt ends with a begin mark of thoughts, so the text starts inside them.
    """
    answer, had_thoughts, problem = without_thoughts(text, starts_in_thoughts)
    answer = "" if is_blank(answer) else answer
    if thoughts and not answer:
        problem = problem or NOT_ENDED
    if had_thoughts or thoughts or counts.thought_tokens:
        share = 1 - len(answer) / max(1, len(thoughts) + len(text))
        known = counts.thought_tokens or round(share * counts.num_tokens)
        most = max(0, counts.num_tokens - bool(answer))
        counts = replace(counts, had_thoughts=True, thought_tokens=min(known, most))
    error = why_unfinished(finish_reason)
    if error == CUT_OFF:
        within = f" ({DETAILS[problem]})" if problem else ""
        return replace(counts, text=answer, error=error, detail=f"not finished after {max_tokens} tokens{within}")
    if error:
        return replace(counts, error=error, detail=f"finish_reason {finish_reason}"[:80])
    if problem:
        return replace(counts, error=problem, detail=DETAILS[problem])
    if not answer:
        detail = "nothing behind the thoughts" if counts.had_thoughts else "the model ended its answer at once"
        return replace(counts, error="empty answer", detail=detail)
    return replace(counts, text=answer)


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
