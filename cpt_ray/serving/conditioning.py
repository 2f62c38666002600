"""Turns a user's choices into an adapter that the server's engine answers with.

This is what `serve.preferences: gated_lora` offers in the place of directives. `cpt steer fit` trains the conditional
policy and names it in a file; a replica reads it once and folds the adapter of a user's choices when it is first asked
for.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpt_ray.config import Form, ModelConfig
from cpt_ray.serving.call import CALL
from cpt_ray.steering.actors import Embedder
from cpt_ray.steering.choices import Choice
from cpt_ray.steering.policy import RANK, ConditionalPolicy, SavedForm
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import RunDir

FORM: Form = "gated_lora"
"""The one form of a conditional policy that becomes adapters, which vLLM can serve."""
ENGINE_ARGUMENTS = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 8, "max_cpu_loras": 64}
"""vLLM's, for the users' adapters."""
REMOVE_SECONDS = 60.0
"""From the end of the last request with an adapter to the removal of its folder."""
KEPT = 256
"""Users whose adapter a replica has at hand; the one not used for longest goes first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConditionerSettings:
    """What a replica needs to make its `Conditioner`."""

    saved: SavedForm
    embedder: ModelConfig


class Conditioner:
    """Makes adapters of choices. Thread-safe."""

    form = FORM

    def __init__(self, run: RunDir, model: ModelConfig, conditioning: ConditionerSettings):
        from safetensors.torch import load
        from transformers import AutoConfig, AutoModelForCausalLM

        saved = conditioning.saved
        with torch.device("meta"):  # the engine has the weights
            frozen = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model.path))
        self._policy = ConditionalPolicy(frozen, FORM, len(saved.mean), saved.size).eval()
        self._policy.load_own_state(load((run.path / saved.weights).read_bytes()))
        self._embedder = Embedder(conditioning.embedder.model_copy(update={"num_gpus": 0}))
        self._mean, self._deviation = torch.tensor(saved.mean), torch.tensor(saved.deviation)
        self._model, self._numbers, self._embedding = model.path, itertools.count(1), threading.Lock()
        self._cached = functools.lru_cache(KEPT)(self._fold)
        self._folder = tempfile.TemporaryDirectory(prefix="cpt-users-", ignore_cleanup_errors=True)

    def adapter(self, choices: Sequence[Choice]) -> UserAdapter:
        """The adapter of the user who made these choices, folded when it is first asked for."""
        return self._cached(tuple(choices))

    @torch.no_grad()
    def z(self, choices: Sequence[Choice]) -> Tensor:
        """[size]; the tokens that are embedded for it count as a prompt of the request."""
        texts = [(choice.prompt, text) for choice in choices for text in (choice.chosen, choice.rejected)]
        with self._embedding:  # tokenizers are not for several threads
            before = self._embedder.num_tokens
            vectors = (torch.tensor(self._embedder.embed(texts)) - self._mean) / self._deviation
            if (call := CALL.get()) is not None:
                call.prompt_tokens += self._embedder.num_tokens - before
        z: Tensor = self._policy.encoder(vectors.view(1, len(choices), 2, -1))[0]
        return z

    @torch.no_grad()
    def _fold(self, choices: tuple[Choice, ...]) -> UserAdapter:
        z = self.z(choices)
        # each adapter has a name of its own, since vLLM's caches go by it
        number = next(self._numbers)
        folder = self._policy.fold(z, Path(self._folder.name) / f"user-{number}", self._model)
        adapter = UserAdapter(f"user-{content_id(z.tolist())[:12]}-{number}", number, folder)
        weakref.finalize(adapter, _remove_later, folder)  # when no request is under way with it
        return adapter


class UserAdapter:
    """One user's adapter, whose folder lives as long as this object does."""

    def __init__(self, name: str, number: int, folder: Path):
        from vllm.lora.request import LoRARequest

        self.lora_request = LoRARequest(name, number, str(folder))


def _remove_later(folder: Path) -> None:
    """Waits until requests that were broken off have ended in the engine too, which then no longer loads the folder."""
    timer = threading.Timer(REMOVE_SECONDS, shutil.rmtree, (folder,), {"ignore_errors": True})
    timer.daemon = True
    timer.start()
