"""A user's z in a server's engine: folded into an adapter of their own, or as a soft prompt.

What `serve.preferences` offers beside directives. `cpt steer fit` trains the conditional policy and names it in a file
per form; a replica reads it once and makes what a user's choices come to when it is first asked for.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cpt_ray.config import Form, ModelConfig
from cpt_ray.serving.app import CALL
from cpt_ray.steering.inference import Choice
from cpt_ray.steering.policy import ConditionalPolicy
from cpt_ray.steering.saved import SavedForm
from cpt_ray.steering.tables import Embedder
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import RunDir

REMOVE_SECONDS = 60.0
"""From the end of the last request with an adapter to the removal of its folder."""
KEPT = 256
"""Users whose adapter or soft prompt a replica has at hand; the one not used for longest goes first."""
Change = Callable[[Any, dict[str, Any]], tuple[Any, dict[str, Any]]]
"""(prompt, options) of the engine's `generate` to what they are for a user."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """What a replica needs to make its `Conditioner`."""

    form: Form
    saved: SavedForm
    embedder: ModelConfig

    def engine_arguments(self) -> dict[str, Any]:
        """vLLM's, without which it could not be conditioned."""
        if self.form == "soft_prompt":
            return {"enable_prompt_embeds": True}
        return {"enable_lora": True, "max_lora_rank": 8, "max_loras": 8, "max_cpu_loras": 64}


class Conditioner:
    """Choices to what conditions the engine. Thread-safe."""

    def __init__(self, run: RunDir, model: ModelConfig, conditioning: Conditioning):
        from safetensors.torch import load_file
        from transformers import AutoConfig, AutoModelForCausalLM

        saved, self.form = conditioning.saved, conditioning.form
        with torch.device("meta"):  # the engine has the weights
            frozen = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path))
        self._policy = ConditionalPolicy(frozen, self.form, len(saved.mean), saved.size).eval()
        self._policy.load_own_state(load_file(run.path / saved.weights))
        self._embedder = Embedder(conditioning.embedder.model_copy(update={"num_gpus": 0}))
        self._mean, self._deviation = torch.tensor(saved.mean), torch.tensor(saved.deviation)
        self._model, self._numbers, self._embedding = model.path, itertools.count(1), threading.Lock()
        self._made = functools.lru_cache(KEPT)(self._make)
        self._folder = tempfile.TemporaryDirectory(prefix="cpt-users-", ignore_cleanup_errors=True)

    def change(self, choices: Sequence[Choice]) -> Change:
        """What a user's requests to the engine become."""
        return self._made(tuple(choices))

    @torch.no_grad()
    def z(self, choices: Sequence[Choice]) -> Tensor:
        """[size]; what is read for it is counted as a prompt of the request."""
        texts = [(one.prompt, text) for one in choices for text in (one.chosen, one.rejected)]
        with self._embedding:  # tokenizers are not for several threads
            before = self._embedder.num_tokens
            vectors = (torch.tensor(self._embedder.embed(texts)) - self._mean) / self._deviation
            if (call := CALL.get()) is not None:
                call.prompt_tokens += self._embedder.num_tokens - before
        found: Tensor = self._policy.encoder(vectors.view(1, len(choices), 2, -1))[0][0]
        return found

    @torch.no_grad()
    def _make(self, choices: tuple[Choice, ...]) -> Change:
        z = self.z(choices)
        if self.form == "soft_prompt":
            return functools.partial(_with_soft_prompt, self._policy.soft_prompt(z[None])[0])
        # a name of its own for each, since vLLM's caches go by it
        number = next(self._numbers)
        folder = self._policy.fold(z, Path(self._folder.name) / f"user-{number}", self._model)
        made = _Adapter(f"user-{content_id(z.tolist())[:12]}-{number}", number, folder)
        weakref.finalize(made, _remove_later, folder)  # when no request is under way with it
        return made


class _Adapter:
    """A `Change` to one user's adapter, whose folder lives as long as this does."""

    def __init__(self, name: str, number: int, folder: Path):
        from vllm.lora.request import LoRARequest

        self._request = LoRARequest(name, number, str(folder))

    def __call__(self, prompt: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return prompt, options | {"lora_request": self._request}


def _remove_later(folder: Path) -> None:
    """Once the engine has heard of requests that were broken off, and does not load it for them any more."""
    timer = threading.Timer(REMOVE_SECONDS, shutil.rmtree, (folder,), {"ignore_errors": True})
    timer.daemon = True
    timer.start()


def _with_soft_prompt(soft: Tensor, prompt: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The vectors in front; the engine embeds the tokens behind them itself."""
    ids, added = list(prompt["prompt_token_ids"]), len(soft)
    changed = {
        "prompt_token_ids": [0] * added + ids,
        "prompt_is_token_ids": [False] * added + [True] * len(ids),
        "prompt_embeds": torch.cat([soft, soft.new_zeros(len(ids), soft.shape[1])]),
    }
    return changed | {name: prompt[name] for name in ("cache_salt",) if prompt.get(name)}, options
