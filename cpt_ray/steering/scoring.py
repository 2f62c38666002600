"""log pi(answer | directive, prompt) of given answers by vLLM, which gives it as log-probabilities of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cpt_ray.chat.conversations import policy_messages, token_ids
from cpt_ray.chat.templates import control_tokens, find_control_token
from cpt_ray.config import ModelConfig
from cpt_ray.engines.vllm import engine_arguments
from cpt_ray.errors import UserError

SCORING: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
"""vLLM's sampling parameters under which a prompt's own log-probabilities come back."""

Triple = tuple[str | None, str, str]
"""(directive, prompt, answer) to score."""


def answer_tokens(
    tokenizer: Any, directive: str | None, prompt: str, answer: str, template_kwargs: dict[str, Any]
) -> tuple[list[int], int]:
    """Token ids of the whole conversation, and where the answer starts in them."""
    messages = policy_messages(directive, prompt)
    start = len(token_ids(tokenizer, messages, template_kwargs))
    messages.append({"role": "assistant", "content": answer})
    return token_ids(tokenizer, messages, template_kwargs, is_finished=True), start


def checked_answer_tokens(
    tokenizer: Any, triples: Sequence[Triple], template_kwargs: dict[str, Any], max_model_len: int
) -> list[tuple[list[int], int]]:
    """`answer_tokens` of each (directive, prompt, answer).

    UserError if one is too long for the model, or has a control token, which would end its turn.
    """
    control = control_tokens(tokenizer)
    for _, prompt, answer in triples:
        if token := find_control_token(control, prompt) or find_control_token(control, answer):
            raise UserError(f"choices: a text holds the control token {token!r}; leave it out, or write it otherwise")
    sequences = [answer_tokens(tokenizer, *each, template_kwargs) for each in triples]
    longest, at = max((len(ids), at) for at, (ids, _) in enumerate(sequences))
    if longest >= max_model_len:
        answer = triples[at][2][:40]
        raise UserError(f"too long: {answer!r} ... and its prompt have {longest} tokens, {max_model_len - 1} fit")
    return sequences


def logprob_from(output: Any, start: int) -> float:
    """Log-probability of a scored prompt's tokens from `start` on."""
    ids = output.prompt_token_ids
    return float(sum(output.prompt_logprobs[at][ids[at]].logprob for at in range(start, len(ids))))


class PolicyScorer:
    """Log-probabilities of given answers by a vLLM engine in this process; the `Scorer` of batches and tests.

    vLLM reads nothing from its prefix cache for them.
    """

    def __init__(self, model: ModelConfig):
        from vllm import LLM

        self._template_kwargs = model.chat_template_kwargs
        self._llm = LLM(**{"disable_log_stats": True, **engine_arguments(model)})
        self._tokenizer = self._llm.get_tokenizer()
        self._max_model_len = self._llm.llm_engine.model_config.max_model_len

    def logprobs(self, triples: Sequence[Triple]) -> list[float]:
        """log pi(answer | directive, prompt) of each, its end mark included; UserError if one is too long."""
        from vllm import SamplingParams

        sequences = checked_answer_tokens(self._tokenizer, triples, self._template_kwargs, self._max_model_len)
        params = SamplingParams(**SCORING)
        outputs = self._llm.generate([{"prompt_token_ids": ids} for ids, _ in sequences], params, use_tqdm=False)
        return [logprob_from(output, start) for (_, start), output in zip(sequences, outputs, strict=True)]
