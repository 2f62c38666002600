"""The perplexity of the answers under the base policy."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.config import TuneConfig
from cpt_ray.console import say
from cpt_ray.engines.step import Runner
from cpt_ray.evaluation.resampling import MODELS, Floats, Resamples, named_estimate
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Row, Tokeniser, Unfit
from cpt_ray.tables.records import Trial
from cpt_ray.tables.rundir import RunDir

Ids = tuple[int, ...]
LogProbs = Mapping[tuple[str, str], tuple[float, int]]
"""(model, trial_id) to the log-probability (nats) that the base policy gives to the answer after its bare prompt, and
the answer's number of tokens."""
MAX_PERPLEXITY_ANSWERS = 512
"""Answers of a model that are scored, the first by hash: enough for a mean over tokens, in bounded time."""


def trials_for_perplexity(trials: Sequence[Trial]) -> list[Trial]:
    """The answers under held-out directives that the perplexity is computed of: the same requests for both models."""
    directed = [trial for trial in trials if trial.directive is not None and not trial.is_trained and trial.text]
    chosen = set(sorted({trial.trial_id for trial in directed})[:MAX_PERPLEXITY_ANSWERS])
    return [trial for trial in directed if trial.trial_id in chosen]


def base_log_probs(config: TuneConfig, run: RunDir, trials: Sequence[Trial], runner: Runner) -> LogProbs:
    """Log-probabilities of the answers after their bare prompts, without an end token, under the base policy.

    They are kept in the table of training's reference log-probabilities. Answers with control tokens are left out,
    since those would not be read as text; a note says how many they are.
    """
    from transformers import AutoTokenizer

    tokeniser = Tokeniser(AutoTokenizer.from_pretrained(config.policy.path), config.policy.chat_template_kwargs)
    ids: dict[tuple[str, str], tuple[Ids, Ids]] = {}
    lost = 0
    for trial in trials:
        try:
            answer = tokeniser.text_ids(trial.text)
            if answer:
                prompt = tokeniser.prompt(policy_messages(None, trial.prompt))
                ids[trial.model, trial.trial_id] = (prompt, answer)
        except Unfit:
            lost += 1
    if lost:
        say(f"note: perplexity: {lost} of {len(trials)} answers hold a control token and are left out")
    rows = bare_rows(ids.values(), 2 * config.train.micro_batch_size)
    known = {
        (tuple(row["prompt"]), tuple(answer)): log_prob
        for row in add_reference(config, run, rows, "perplexity", runner)
        for answer, log_prob in zip(row["answers"], row["ref_logps"], strict=True)
    }
    return {key: (known[pair], len(pair[1])) for key, pair in ids.items()}


def bare_rows(pairs: Iterable[tuple[Ids, Ids]], num_answers: int) -> list[Row]:
    """Rows without pairs that hold each distinct (prompt, answer) once, up to `num_answers` of one prompt together."""
    by_prompt: dict[Ids, set[Ids]] = defaultdict(set)
    for prompt, answer in pairs:
        by_prompt[prompt].add(answer)
    rows: list[Row] = []
    for prompt, distinct in by_prompt.items():
        answers = sorted(distinct, key=lambda ids: (len(ids), ids))  # batches of similar lengths need less padding
        for start in range(0, len(answers), num_answers):
            chunk = [list(ids) for ids in answers[start : start + num_answers]]
            rows.append(
                Row(cell_id="", rubric_id="", level="", prompt=list(prompt), answers=chunk, levels=[""] * len(chunk),
                    chosen=[], rejected=[], ref_logps=[])
            )  # fmt: skip
    return rows


def perplexities(trials: Sequence[Trial], log_probs: LogProbs, resamples: Resamples) -> dict[str, Any] | None:
    """exp(nats per token) of answers under the base policy, over all tokens of a model's answers.

    The ratio of tuned to base says whether the dials were bought with nonsense. Not the median over answers: it would
    not see one answer in ten that is nonsense. None if no log-probability is known.
    """
    known = [trial for trial in sorted(trials, key=repr) if (trial.model, trial.trial_id) in log_probs]
    columns, entry = {}, {}
    for model in MODELS:
        rows = [trial for trial in known if trial.model == model]
        nats, tokens = np.array([log_probs[model, trial.trial_id] for trial in rows]).reshape(-1, 2).T

        def compute(weights: Floats, nats: Floats = nats, tokens: Floats = tokens) -> Floats:
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.asarray(np.exp(-(nats @ weights) / (tokens @ weights)))[None]

        columns[model] = resamples.statistics(rows, compute)[0]
        entry[model] = named_estimate("perplexity", columns[model]) | {"n": len(rows), "tokens": int(tokens.sum())}
    if not known:
        return None
    return {**entry, **named_estimate("ratio", columns["tuned"] / columns["base"])}
