"""Evaluation: held-out prompts x held-out directives x levels, base against tuned, with and without a directive."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import EvaluateConfig
from cpt_ray.console import say
from cpt_ray.engines.engine import CUT_OFF, Completion, Engine, sampling_request
from cpt_ray.engines.ledger import Tally, ledger_entry, thoughts_note
from cpt_ray.engines.losses import cut_note
from cpt_ray.engines.pool import run_lines
from cpt_ray.engines.step import Line, Runner, Step
from cpt_ray.engines.worker import SHARDS_IN_FLIGHT
from cpt_ray.errors import UserError
from cpt_ray.evaluation.perplexity import base_log_probs, trials_for_perplexity
from cpt_ray.evaluation.report import write_report
from cpt_ray.evaluation.scoring import score_trials
from cpt_ray.evaluation.summary import judge_check_line
from cpt_ray.evaluation.terminal import dial_lines, opposites_lines, table_lines
from cpt_ray.judging.judge import JudgeStep, first_judge, judge_answers
from cpt_ray.judging.judge_check import check_judge
from cpt_ray.judging.spread import Spread
from cpt_ray.plan import Plan, Shards
from cpt_ray.rubrics.measures import whole_sentences
from cpt_ray.rubrics.rubric import Level, Rubric
from cpt_ray.tables.records import Directive, Prompt, Trial, content_id
from cpt_ray.tables.rundir import REPORT_FILE, RESULTS_FILE, RunDir
from cpt_ray.tables.shard import ShardName

TRIAL_FORMAT = 2
"""Goes up when the columns of the rows change: answers are then written again, in shards of other names."""


def plan_trials(plan: Plan, run: RunDir, shards: Shards) -> dict[str, list[Trial]]:
    """The evaluation's trials (still unanswered) by shard name, the same for both models."""
    settings = plan.config.evaluate
    directives = run.read("directives", shards.directives, Directive)
    prompts = evaluated_prompts(plan)
    planned: dict[str, list[Trial]] = {}
    for rubric in plan.rubrics:
        own = [directive for directive in directives if directive.rubric_id == rubric.id]
        step = prompts_per_shard(plan, rubric)
        for start in range(0, len(prompts), step):
            chunk = list(enumerate(prompts))[start : start + step]
            rows = [row for turn, prompt in chunk for row in trials_of(rubric, prompt, own, settings, turn)]
            ids = content_id(*(row.trial_id for row in rows), rubric.content_hash, TRIAL_FORMAT)
            planned[ShardName(rubric.id, start // step).keyed(ids)] = rows
    return planned


def evaluated_prompts(plan: Plan) -> list[Prompt]:
    """The held-out prompts that are asked, chosen by hash."""
    prompts = sorted(plan.prompts_of("held_out"), key=lambda prompt: prompt.prompt_id)
    return prompts[: plan.config.evaluate.prompts]


def prompts_per_shard(plan: Plan, rubric: Rubric) -> int:
    """Prompts whose trials of a rubric are one shard."""
    settings = plan.config.evaluate
    per_prompt = len(rubric.levels) * (settings.directives + settings.trained_directives + 1)
    return max(1, plan.config.synthesis.shard_rows // SHARDS_IN_FLIGHT // per_prompt)


def trials_of(
    rubric: Rubric, prompt: Prompt, directives: list[Directive], settings: EvaluateConfig, turn: int
) -> list[Trial]:
    """A prompt's trials for each level; `turn`: the prompt's number; the directives are used in rotation."""
    counts = {"held_out": settings.directives, "train": settings.trained_directives}
    rows = []
    for level in rubric.levels:
        of_level = [directive for directive in directives if directive.level == level.name]
        for split, count in counts.items():
            chosen = rotated([directive for directive in of_level if directive.split == split], count, turn)
            rows += [_trial(rubric, level, prompt, directive) for directive in chosen]
        rows.append(_trial(rubric, level, prompt, None))
    return rows


def rotated(directives: Sequence[Directive], count: int, turn: int) -> list[Directive]:
    """`count` of a level's directives (or all) for prompt number `turn`.

    Over all prompts each directive is used equally often, or once more where the numbers do not divide.
    """
    ordered = sorted(directives, key=lambda directive: directive.directive_id)
    count = min(count, len(ordered))
    return [ordered[(turn * count + at) % len(ordered)] for at in range(count)]


def _trial(rubric: Rubric, level: Level, prompt: Prompt, directive: Directive | None) -> Trial:
    text = directive.text if directive else None
    return Trial(
        trial_id=content_id(prompt.text, rubric.id, level.name, text),
        prompt_id=prompt.prompt_id,
        prompt=prompt.text,
        rubric_id=rubric.id,
        level=level.name,
        target=level.score,
        directive=text,
        directive_id=directive.directive_id if directive else "",
        is_trained=directive is not None and directive.split == "train",
    )


# ---------------------------------------------------------------- answers and grades


@dataclass(frozen=True, kw_only=True)
class AnswerStep(Step):
    """Planned trials -> the trials with one model's answers."""

    name: str
    """"base" or "tuned"."""
    planned: dict[str, list[Trial]]
    seed: int
    table: str = "evaluation_answers"

    def output(self, shard: str) -> str:
        """Depends on the rows, the model's weights and its sampling."""
        return dataclasses.replace(ShardName.parse(shard), model=self.name, digest="").made_of(
            shard, self.model.answer_key, self.seed, layout_hash("policy")
        )

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Answers one shard."""
        rows, sampling = self.planned[shard], self.model.sampling
        tally = Tally(len(rows))
        completions = engine.run(
            [
                sampling_request(policy_messages(row.directive, row.prompt), sampling, row.trial_id, self.seed)
                for row in rows
            ]
        )
        tally.add(completions)
        answered = [self._answered(row, answer, tally) for row, answer in zip(rows, completions, strict=True)]
        run.write(self.table, self.output(shard), answered, tally.close(sum(not row.reason for row in answered)))

    def _answered(self, row: Trial, answer: Completion, tally: Tally) -> Trial:
        row = dataclasses.replace(row, model=self.name, num_tokens=answer.num_tokens, is_cut=answer.error == CUT_OFF)
        if answer.error and not (row.is_cut and answer.text):  # the whole sentences of a cut answer are graded
            tally.reject(answer.error)
            return dataclasses.replace(row, reason=f"{answer.error}: {answer.detail}")
        text = whole_sentences(answer.text) if row.is_cut else ""
        return dataclasses.replace(row, text=text or answer.text, reason="")


@dataclass(frozen=True, kw_only=True)
class GradeTrialsStep(JudgeStep):
    """Answered trials -> graded trials, by the judge of the written answers."""

    stage: str = "grade"
    table: str = "evaluation"

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Grades one shard."""
        rows = run.read("evaluation_answers", [shard], Trial)
        tally = Tally(len(rows))
        answered = [row for row in rows if not row.reason]
        rubric = self.rubrics[rows[0].rubric_id]
        texts = [(row.trial_id, row.prompt, row.text) for row in answered]
        grades = {grade.unit_id: grade for grade in judge_answers(engine, rubric, texts, self.model, tally)}
        done = []
        for row in rows:
            if grade := grades.get(row.trial_id):
                row = dataclasses.replace(
                    row, score=grade.score, judged=grade.judged, measured=grade.measured, reason=grade.reason
                )
                if row.score is None:
                    tally.reject("ungraded")
            done.append(row)
        graded = sum(row.score is not None for row in done)
        run.write(self.table, self.output(shard), done, tally.close(graded))


# ---------------------------------------------------------------- the stage


def _print_notes(run: RunDir, step: Step, names: list[str], entry: dict[str, Any]) -> None:
    """Prints a line each if answers came with thoughts, if many were cut, and if over half were lost."""
    if note := thoughts_note(entry):
        say(f"{step.stage}: {entry['rows_in']:.0f} in{note}")
    if isinstance(step, AnswerStep):
        trials = run.read(step.table, names, Trial)
        finished = [row.num_tokens for row in trials if row.text and not row.is_cut]
        num_cut = sum(row.is_cut for row in trials)
        if note := cut_note("policy", finished, num_cut, step.model.sampling.max_tokens):
            say(f"note: {step.stage}: {note}")
    lost = sum(entry["rejected"].values())
    if lost > entry.get("rows_in", 0) / 2:
        was_answered = isinstance(step, GradeTrialsStep)
        rows = run.read(step.table, names, Trial)
        reasons = Counter(row.reason for row in rows if row.reason and bool(row.text) == was_answered)
        say(f"note: {step.stage}: {lost} of {entry['rows_in']:.0f} were lost, most to: {reasons.most_common(1)[0][0]}")


def trial_lines(plan: Plan, run: RunDir, shards: Shards) -> list[Line]:
    """The tuned model's trials and the base model's: answered, then graded."""
    config = plan.config
    planned = plan_trials(plan, run, shards)
    tuned = config.policy.model_copy(update={"model": str(run.model)})
    lines = []
    for name, model in (("tuned", tuned), ("base", config.policy)):
        answer = AnswerStep(stage=f"answer-{name}", name=name, model=model, planned=planned, seed=config.seed)
        judge = first_judge(plan.rubrics, config.judge, model)
        lines.append(Line(list(planned), [answer, GradeTrialsStep(rubrics=plan.by_id, model=judge)]))
    return lines


def trial_outputs(lines: Sequence[Line]) -> tuple[list[list[str]], list[str]]:
    """Names of the answered shards, line by line, and of all graded ones."""
    answered = [[line.steps[0].output(name) for name in line.shards] for line in lines]
    graded = [line.steps[1].output(name) for line, names in zip(lines, answered, strict=True) for name in names]
    return answered, graded


def update_report(plan: Plan, run: RunDir, shards: Shards) -> None:
    """Renders the report of an evaluation with these settings again, if there is one: steering has new results."""
    _, graded = trial_outputs(trial_lines(plan, run, shards))
    if run.read_json(RESULTS_FILE) and all(run.has("evaluation", name) for name in graded):
        say(f"report       {write_report(plan, run, run.read('evaluation', graded, Trial))}")
    elif (run.path / REPORT_FILE).exists():
        say(
            f"note: {REPORT_FILE} is of other settings and stays as it is; `cpt evaluate` renders it with these results"
        )


def evaluate(plan: Plan, run: RunDir, shards: Shards, runner: Runner = run_lines) -> dict[str, Any]:
    """Answers, grades and scores both models; writes report/ and prints the table. Returns results.json's content."""
    start = time.monotonic()
    lines = trial_lines(plan, run, shards)
    runner(run, lines)
    answered, graded = trial_outputs(lines)
    steps = [*(line.steps[0] for line in lines), lines[0].steps[1]]
    for step, names in zip(steps, [*answered, graded], strict=True):
        entry = ledger_entry(run, step.table, names, step.model.price)
        run.add_to_ledger(step.stage, entry)
        _print_notes(run, step, names, entry)
    run.prune("evaluation", graded)
    trials = run.read("evaluation", graded, Trial)
    results = _results(plan, run, shards, trials, runner)
    run.write_json(RESULTS_FILE, results)
    written = write_report(plan, run, trials)
    _say_results(results, trials, plan.rubrics)
    say(f"report       {written} ({time.monotonic() - start:.0f} s for evaluation)")
    return results


def _results(plan: Plan, run: RunDir, shards: Shards, trials: Sequence[Trial], runner: Runner) -> dict[str, Any]:
    """The content of results.json."""
    config = plan.config
    written = Spread(plan.rubrics, tuple(shards.passes)).read_or_make(run)
    log_probs = base_log_probs(config, run, trials_for_perplexity(trials), runner)
    results = score_trials(trials, plan.rubrics, config.evaluate.bootstrap, config.seed, written, log_probs)
    try:
        results["judge_check"] = check_judge(plan, run, shards, runner)
    except UserError as error:  # what else was measured is worth a report without it
        results["judge_check"] = None
        say(f"note: evaluate.judge_check: {error}")
    return results


def _say_results(results: Mapping[str, Any], trials: Sequence[Trial], rubrics: Sequence[Rubric]) -> None:
    for block in (opposites_lines(trials, rubrics), dial_lines(results), table_lines(results)):
        say("\n".join(["", *block]))
    if line := judge_check_line(results["judge_check"]):
        say(line)
    least = [(results["difference"][f"{name}_ci"] or [0.0])[0] for name in ("accuracy", "spearman_rho")]
    if max(least) <= 0:
        say("note: no gain over the base is shown; see how many answers became pairs, and the loss (`cpt status`)")
