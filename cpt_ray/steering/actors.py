"""What steering asks of models: log-probabilities, embeddings and answers, by Ray Data actors.

Tables are made of them shard by shard like every other one: a shard that is there is not made again.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cpt_ray.chat.conversations import policy_messages, token_ids
from cpt_ray.chat.thoughts import opens_thoughts, without_thoughts
from cpt_ray.config import ModelConfig
from cpt_ray.engines.engine import sampling_request, seed_of
from cpt_ray.engines.step import Step
from cpt_ray.engines.vllm import VllmEngine, engine_arguments, vllm_sampling
from cpt_ray.steering.answers import Answer
from cpt_ray.steering.scoring import PolicyScorer
from cpt_ray.tables.node_cache import local_copy
from cpt_ray.tables.records import AnswerEmbedding, AnswerLogprobs, SteeredAnswer, content_id
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.store_path import AnyPath

_TURN = threading.Lock()
"""A pool calls its actors from several threads; those of this module take one call at a time."""
EMBEDDED_BATCH = 32
"""Texts of a forward pass."""


class Embedder:
    """The mean of a transformer's states over the tokens of (prompt, answer), in this process.

    Of a chat model the word embeddings and the middle layer are taken, side by side, since its last layer is about the
    next token. Of an encoder it is the last layer.
    """

    def __init__(self, model: ModelConfig):
        import torch
        from transformers import AutoModel, AutoTokenizer

        self._device = "cuda" if model.num_gpus else "cpu"
        self._tokenizer = AutoTokenizer.from_pretrained(model.path)
        dtype = torch.bfloat16 if model.num_gpus else torch.float32
        self._model = AutoModel.from_pretrained(model.path, dtype=dtype).eval().to(self._device)
        self._layers = (0, self._model.config.num_hidden_layers // 2) if self._tokenizer.chat_template else (-1,)
        self.num_tokens = 0
        """Read so far."""

    def embed(self, texts: Sequence[tuple[str, str]]) -> list[list[float]]:
        """One vector per (prompt, answer)."""
        import torch

        vectors: list[list[float]] = []
        longest = min(self._tokenizer.model_max_length, getattr(self._model.config, "max_position_embeddings", 8192))
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        for start in range(0, len(texts), EMBEDDED_BATCH):
            joined = [f"{prompt}\n\n{answer}" for prompt, answer in texts[start : start + EMBEDDED_BATCH]]
            batch = self._tokenizer(joined, padding=True, truncation=True, max_length=longest, return_tensors="pt")
            ids, mask = batch["input_ids"].to(self._device), batch["attention_mask"].to(self._device)
            with torch.no_grad():
                states = self._model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
            self.num_tokens += int(mask.sum())
            weights = mask[..., None].float()
            means = [(states[at].float() * weights).sum(dim=1) / weights.sum(dim=1) for at in self._layers]
            vectors += torch.cat(means, dim=1).cpu().tolist()
        return vectors


# ---------------------------------------------------------------- actors


class LogprobActor:
    """Answers -> their log-probabilities under each directive."""

    def __init__(self, model: ModelConfig, directives: Sequence[str]):
        self._scorer, self._directives = PolicyScorer(model), directives

    def __call__(self, rows: Sequence[Answer]) -> list[AnswerLogprobs]:
        """One row per answer."""
        triples = [(directive, row.prompt, row.text) for row in rows for directive in self._directives]
        logprobs = np.reshape(self._scorer.logprobs(triples), (len(rows), -1)).tolist()
        return [AnswerLogprobs(answer_id=row.answer_id, logprobs=own) for row, own in zip(rows, logprobs, strict=True)]


class EmbedActor:
    """Answers -> their embeddings."""

    def __init__(self, model: ModelConfig):
        self._embedder = Embedder(model)

    def __call__(self, rows: Sequence[Answer]) -> list[AnswerEmbedding]:
        """One row per answer."""
        vectors = self._embedder.embed([(row.prompt, row.text) for row in rows])
        return [AnswerEmbedding(answer_id=row.answer_id, vector=own) for row, own in zip(rows, vectors, strict=True)]


class AnswerActor:
    """Planned answers (without text) -> answers of the policy."""

    def __init__(self, model: ModelConfig, seed: int):
        self._engine, self._sampling, self._seed = VllmEngine(model), model.sampling, seed

    def __call__(self, rows: Sequence[SteeredAnswer]) -> list[SteeredAnswer]:
        """The same rows with the policy's texts; "" where there is none."""
        requests = [
            sampling_request(policy_messages(row.directive, row.prompt), self._sampling, _subject(row), self._seed)
            for row in rows
        ]
        completions = self._engine.run(requests)
        return [replace(row, text=completion.text) for row, completion in zip(rows, completions, strict=True)]


def _subject(row: SteeredAnswer) -> str:
    return content_id(row.directive, row.prompt_id, row.sample)


class AdapterActor:
    """Planned answers, whose `directive` is the name of a folded adapter -> answers of the policy under it."""

    def __init__(self, model: ModelConfig, folder: AnyPath, rank: int, seed: int):
        from vllm import LLM

        lora = {"enable_lora": True, "max_lora_rank": rank, "max_loras": 8}
        self._llm = LLM(**{"disable_log_stats": True, **engine_arguments(model), **lora})
        self._tokenizer = self._llm.get_tokenizer()
        self._model, self._folder, self._seed = model, folder, seed
        self._numbers: dict[str, int] = {}
        """Of adapters; unique as long as the engine lives, since it caches adapters by them."""

    def __call__(self, rows: Sequence[SteeredAnswer]) -> list[SteeredAnswer]:
        """The same rows with the policy's texts."""
        from vllm import SamplingParams

        kwargs, sampling = self._model.chat_template_kwargs, vllm_sampling(self._model.sampling)
        ids = [token_ids(self._tokenizer, policy_messages(None, row.prompt), kwargs) for row in rows]
        outputs = self._llm.generate(
            [{"prompt_token_ids": own} for own in ids],
            [SamplingParams(**sampling, seed=seed_of(_subject(row), self._seed)) for row in rows],
            use_tqdm=False,
            lora_request=[self._adapter(str(row.directive)) for row in rows],
        )
        return [replace(row, text=self._text(output)) for row, output in zip(rows, outputs, strict=True)]

    def _adapter(self, name: str) -> Any:
        from vllm.lora.request import LoRARequest

        number = self._numbers.setdefault(name, len(self._numbers) + 1)
        return LoRARequest(name, number, str(local_copy(self._folder / name)))

    def _text(self, output: Any) -> str:
        is_begun = opens_thoughts(self._tokenizer, output.prompt_token_ids or ())
        return without_thoughts(output.outputs[0].text, is_begun).answer


@dataclass(frozen=True, kw_only=True)
class Fill(Step):
    """Rows in memory -> a steering table: what an actor makes of them is a shard of it."""

    shards: Mapping[str, Sequence[Any]]

    def __call__(self, engine: Any, run: RunDir, shard: str) -> None:
        """Writes one shard."""
        with _TURN:
            rows = engine(self.shards[shard])
        run.write(self.table, shard, rows)
