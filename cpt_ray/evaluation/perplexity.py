"""How likely the base policy finds the answers, from which the perplexity is computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.config import TuneConfig
from cpt_ray.console import say
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Runner
from cpt_ray.evaluation.dials import LogProbs
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Row, Tokeniser, Unfit
from cpt_ray.tables.records import Trial
from cpt_ray.tables.rundir import RunDir

Ids = tuple[int, ...]
MAX_LIKELIHOODS = 512
"""Answers of a model whose likelihood is computed, first by hash: enough for a mean over tokens, in bounded time."""


def likely_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The answers under held-out directives whose likelihood is computed: the same requests for both models."""
    directed = [trial for trial in trials if trial.directive is not None and not trial.is_trained and trial.text]
    chosen = set(sorted({trial.trial_id for trial in directed})[:MAX_LIKELIHOODS])
    return [trial for trial in directed if trial.trial_id in chosen]


def base_log_probs(config: TuneConfig, run: RunDir, trials: Sequence[Trial], runner: Runner = run_lines) -> LogProbs:
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
