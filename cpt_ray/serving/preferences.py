"""`/v1/preferences`: choices that clients' users made, and the configuration they set.

    GET    /v1/preferences      ids of this key's states, and the question worth asking somebody unknown
    POST   /v1/preferences      {"choices": [{"prompt": ..., "chosen": ..., "rejected": ...}, ...]}: a new state
    POST   /v1/preferences/ID   more choices
    GET    /v1/preferences/ID   what they say, and the choices themselves
    DELETE /v1/preferences/ID

A chat with `"preferences": "ID"`, or with the model `cpt:ID`, gets the configuration inferred so far or, with
`serve.preferences: gated_lora`, the user's own adapter. A configuration named in the chat itself takes precedence.
States are files in the run directory, one folder per key: restarts and replicas find them there.
"""

from __future__ import annotations

import asyncio
import contextvars
import re
import secrets
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from cpt_ray.config import ModelConfig
from cpt_ray.errors import UserError
from cpt_ray.serving.asgi import Refusal
from cpt_ray.serving.conditioning import Conditioner, UserAdapter
from cpt_ray.serving.request import CHAT_PATH, PREFERENCES_PREFIX
from cpt_ray.serving.store import JsonStore
from cpt_ray.steering.choices import Choice, PreferenceState, Question, parse_choices
from cpt_ray.steering.inference import Belief, Candidates, Scorer
from cpt_ray.steering.scoring import SCORING, Triple, checked_answer_tokens, logprob_from
from cpt_ray.tables.address import StoreError
from cpt_ray.tables.store_path import AnyPath

ID = re.compile(PREFERENCES_PREFIX + "[0-9a-f]{24}", re.ASCII)
MAX_STATES = 10_000
"""Per key."""
MAX_KEPT = 256
"""Choices in one state."""
MAX_KEPT_CHARS = 200_000
"""Characters of all its texts together."""
MAX_SCORING = 4
"""Requests whose choices are scored at a time; the others wait."""
MAX_IN_ENGINE = 64
"""Answers that are scored at a time, so that chats still get their share of the engine."""
UNKNOWN = Refusal(status=404, code="preferences_not_found", text="There are no such preferences (of this API key).")
FULL = Refusal(status=403, code="preferences_full", text=f"This API key has {MAX_STATES} preferences; delete some.")
WRONG_METHOD = Refusal(status=405, code="method_not_allowed", text="/v1/preferences takes GET, POST and DELETE.")
Result = TypeVar("Result")


class EngineScorer:
    """The `Scorer` of a server: its own engine, called from other threads than that of the event loop."""

    def __init__(self, engine: Any, model: ModelConfig):
        from transformers import AutoTokenizer

        self._engine, self._loop = engine, asyncio.get_running_loop()
        self._room = asyncio.Semaphore(MAX_IN_ENGINE)
        self._tokenizer, self._tokenizing = AutoTokenizer.from_pretrained(model.path), threading.Lock()
        self._template_kwargs, self._max_model_len = model.chat_template_kwargs, engine.model_config.max_model_len

    def logprobs(self, triples: Sequence[Triple]) -> list[float]:
        """log pi(answer | directive, prompt) of each; UserError if one is too long."""
        with self._tokenizing:
            sequences = checked_answer_tokens(self._tokenizer, triples, self._template_kwargs, self._max_model_len)
        return asyncio.run_coroutine_threadsafe(self._score(sequences), self._loop).result()

    async def _score(self, sequences: Sequence[tuple[list[int], int]]) -> list[float]:
        return await asyncio.gather(*(self._score_one(ids, start) for ids, start in sequences))

    async def _score_one(self, ids: list[int], start: int) -> float:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(**SCORING, output_kind=RequestOutputKind.FINAL_ONLY)
        async with self._room:
            name = f"preferences-{secrets.token_hex(12)}"
            outputs = [output async for output in self._engine.generate({"prompt_token_ids": ids}, params, name)]
        return logprob_from(outputs[-1], start)


class PreferenceStore:
    """The states of all keys; each (`owner`) has access to its own only."""

    def __init__(
        self,
        folder: AnyPath,
        candidates: Candidates,
        scorer: Scorer,
        questions: Sequence[Question],
        conditioner: Conditioner | None = None,
    ):
        """`conditioner`: makes adapters, in the place of directives; choices are then kept without being scored."""
        self._store, self._candidates, self._scorer, self._questions = JsonStore(folder), candidates, scorer, questions
        self._conditioner = conditioner
        # of its own: in Serve's, which may have five, scorings would leave one for all else
        self._threads, self._scoring = ThreadPoolExecutor(2 * MAX_SCORING), asyncio.Semaphore(MAX_SCORING)

    async def answer(self, owner: str, method: str, name: str, data: Any) -> dict[str, Any] | Refusal:
        """The answer to a request to /v1/preferences or /v1/preferences/`name`; UserError for a bad body."""
        if name and not ID.fullmatch(name):
            return UNKNOWN
        if method == "POST":
            if not isinstance(data, dict) or set(data) != {"choices"}:
                raise UserError('body: expected a JSON object {"choices": [...]} and nothing else')
            choices = parse_choices(data["choices"])
            async with self._scoring:
                return await self._in_thread(self._add if name else self._create, owner, choices, name)
        if method == "GET" and name:
            state = await self.find(owner, name)
            return state if isinstance(state, Refusal) else await self._in_thread(self._shown, name, state)
        if method == "GET":
            return await self._in_thread(self._list, owner)
        return await self._in_thread(self._delete, owner, name) if method == "DELETE" and name else WRONG_METHOD

    async def find(self, owner: str, name: str) -> PreferenceState | Refusal:
        """The state of an id, scored by the policy that is served."""
        state = await self._in_thread(self._read, owner, name) if ID.fullmatch(name) else None
        if state is not None and not self._is_scored(state):
            async with self._scoring:
                state = await self._in_thread(self._current, owner, name, ())
        return UNKNOWN if state is None else state

    async def steer(self, state: PreferenceState, path: str) -> tuple[dict[str, str], str, UserAdapter | None]:
        """The configuration that a state comes to, what to call its source, and the user's adapter if there is one."""
        configuration = self._belief(state).configuration or {}
        if self._conditioner is None or path != CHAT_PATH:
            return configuration, "preferences", None
        async with self._scoring:
            adapter = await self._in_thread(self._conditioner.adapter, state.choices)
        return configuration, f"preferences, by {self._conditioner.form}", adapter

    def _is_scored(self, state: PreferenceState) -> bool:
        return state.key == self._candidates.key or self._conditioner is not None

    async def _in_thread(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """`work` away from the event loop, since it may wait for a disk or the engine."""
        context = contextvars.copy_context()  # in which the engine's tokens are counted
        return await asyncio.get_running_loop().run_in_executor(self._threads, context.run, work, *arguments)

    # ------------------------------------------------------------ in a thread

    def _create(self, owner: str, choices: list[Choice], name: str) -> dict[str, Any] | Refusal:
        state = PreferenceState()
        self._add_to(state, choices)
        if len(self._store.names(owner)) >= MAX_STATES:
            return FULL
        name = f"preferences-{secrets.token_hex(12)}"
        self._put(owner, name, None, state)
        return self._described(name, state)

    def _add(self, owner: str, choices: list[Choice], name: str) -> dict[str, Any] | Refusal:
        state = self._current(owner, name, choices)
        return UNKNOWN if state is None else self._described(name, state)

    def _shown(self, name: str, state: PreferenceState) -> dict[str, Any]:
        return self._described(name, state) | {"choices": state.to_json()["choices"]}

    def _list(self, owner: str) -> dict[str, Any]:
        data = [{"id": name, "object": "preferences"} for name in self._store.names(owner)]
        return {"object": "list", "data": data, "question": self._question(PreferenceState())}

    def _delete(self, owner: str, name: str) -> dict[str, Any] | Refusal:
        was_there = self._store.remove(f"{owner}/{name}.json")
        return UNKNOWN if not was_there else {"id": name, "object": "preferences", "deleted": True}

    def _current(self, owner: str, name: str, choices: Sequence[Choice]) -> PreferenceState | None:
        """The state with these choices added, its margins those of the policy that is served; None if it is gone."""
        while (state := self._read(owner, name)) is not None:
            before = state.to_json()
            if not choices and self._is_scored(state):
                return state
            self._add_to(state, choices)
            if self._put(owner, name, before, state):  # else another request came in between
                return state
        return None

    def _add_to(self, state: PreferenceState, choices: Sequence[Choice]) -> None:
        kept = [*state.choices, *state.new(choices)]
        if len(kept) > MAX_KEPT:
            raise UserError(f"choices: {len(kept)} with those that are known; one state has at most {MAX_KEPT}")
        if (size := sum(len(choice.prompt + choice.chosen + choice.rejected) for choice in kept)) > MAX_KEPT_CHARS:
            raise UserError(f"choices: {size} characters in all; one state has at most {MAX_KEPT_CHARS}")
        if self._conditioner is None:
            self._candidates.add(state, choices, self._scorer, self._questions)
        else:
            state.add_unscored(choices)

    def _described(self, name: str, state: PreferenceState) -> dict[str, Any]:
        belief = self._belief(state).to_json()
        return {"id": name, "object": "preferences", **belief, "question": self._question(state)}

    def _belief(self, state: PreferenceState) -> Belief:
        """What the choices say in directives: nothing where a conditioner makes adapters of them."""
        if self._conditioner is None:
            return self._candidates.belief(state.margins)
        return Belief(num_choices=len(state.choices))

    def _question(self, state: PreferenceState) -> dict[str, str] | None:
        if self._conditioner is not None:  # by the prior alone
            state = PreferenceState(choices=state.choices)
        question = self._candidates.next_question(state, self._questions)
        return None if question is None else question.to_json()

    def _read(self, owner: str, name: str) -> PreferenceState | None:
        try:
            data = self._store.read(f"{owner}/{name}.json")
            return None if data is None else PreferenceState.from_json(data)
        except StoreError as error:
            raise RuntimeError(str(error)) from error
        except ValueError:
            raise UserError("preferences: not a saved state; delete it and choose again") from None

    def _put(self, owner: str, name: str, before: dict[str, Any] | None, state: PreferenceState) -> bool:
        """Whether the kept state was still as it was `before` (None: there was none); `state` then takes its place.

        RuntimeError, which is answered 500, if the disk or the store refuses: a UserError would blame the request.
        """

        def changed(latest: Any) -> Any:
            now = None if latest is None else PreferenceState.from_json(latest).to_json()
            return state.to_json() if now == before else None

        try:
            return self._store.change(f"{owner}/{name}.json", changed) is not None
        except (UserError, OSError) as error:
            raise RuntimeError(str(error)) from error
