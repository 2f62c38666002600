"""Evaluation: held-out prompts x held-out directives x levels, base against tuned, with and without a directive."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.chat.conversations import policy_messages
from cpt_ray.chat.layout import layout_hash
from cpt_ray.config import EvaluateConfig, TuneConfig
from cpt_ray.console import say
from cpt_ray.engines.engine import CUT_OFF, Completion, Engine, sampled
from cpt_ray.engines.ledger import Tally, ledger_entry, thoughts_note
from cpt_ray.engines.losses import cut_note
from cpt_ray.engines.pool import SHARDS_IN_FLIGHT, run_lines
from cpt_ray.engines.step import Line, Runner, Step
from cpt_ray.errors import UserError
from cpt_ray.evaluation.dials import LogProbs
from cpt_ray.evaluation.report import write_report
from cpt_ray.evaluation.scoring import score_trials
from cpt_ray.evaluation.summary import judge_check_line
from cpt_ray.evaluation.terminal import dial_lines, opposites_lines, table_lines
from cpt_ray.judging.check import check_judge
from cpt_ray.judging.judge import JudgeStep, grader, judge_answers
from cpt_ray.judging.spread import Spread, pool_spread
from cpt_ray.logprobs.reference import add_reference
from cpt_ray.logprobs.rows import Row, Tokeniser, Unfit
from cpt_ray.plan import Plan, Shards
from cpt_ray.rubrics.measures import whole_sentences
from cpt_ray.rubrics.rubric import Level, Rubric
from cpt_ray.tables.records import Directive, Prompt, Trial, content_id
from cpt_ray.tables.rundir import REPORT, RESULTS, RunDir
from cpt_ray.tables.shard import ShardName

Ids = tuple[int, ...]
MAX_LIKELIHOODS = 512
"""Answers of a model whose likelihood is computed, first by hash: enough for a mean over tokens, in bounded time."""
TRIAL_FORMAT = 2
"""Changes when the rows' columns do: answers in another form are then made anew under other names."""


def plan_trials(plan: Plan, run: RunDir, shards: Shards) -> dict[str, list[Trial]]:
    """The evaluation's rows (still unanswered) by shard name, the same for both models."""
    settings = plan.config.evaluate
    directives = run.read("directives", shards.directives, Directive)
    prompts = sorted(plan.prompts_of("held_out"), key=lambda prompt: prompt.prompt_id)[: settings.prompts]
    planned: dict[str, list[Trial]] = {}
    for rubric in plan.rubrics:
        own = [directive for directive in directives if directive.rubric_id == rubric.id]
        per_prompt = len(rubric.levels) * (settings.directives + settings.trained_directives + 1)
        step = max(1, plan.config.synthesis.shard_rows // SHARDS_IN_FLIGHT // per_prompt)
        for start in range(0, len(prompts), step):
            chunk = list(enumerate(prompts))[start : start + step]
            rows = [row for turn, prompt in chunk for row in trials_of(rubric, prompt, own, settings, turn)]
            ids = content_id(*(row.trial_id for row in rows), rubric.content_hash, TRIAL_FORMAT)
            planned[ShardName(rubric.id, start // step).keyed(ids)] = rows
    return planned


def trials_of(
    rubric: Rubric, prompt: Prompt, directives: list[Directive], settings: EvaluateConfig, turn: int
) -> list[Trial]:
    """A prompt's rows for each level; `turn`: the prompt's number, which says whose turn it is among the directives."""
    counts = {"held_out": settings.directives, "train": settings.trained_directives}
    rows = []
    for level in rubric.levels:
        of_level = [directive for directive in directives if directive.level == level.name]
        for split, count in counts.items():
            chosen = in_turn([directive for directive in of_level if directive.split == split], count, turn)
            rows += [_trial(rubric, level, prompt, directive) for directive in chosen]
        rows.append(_trial(rubric, level, prompt, None))
    return rows


def in_turn(directives: Sequence[Directive], count: int, turn: int) -> list[Directive]:
    """`count` of a level's directives (or all) for prompt number `turn`: over all prompts each is used equally often.

    Equally but for one use, where the numbers do not divide.
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
        asked = [sampled(policy_messages(row.directive, row.prompt), sampling, row.trial_id, self.seed) for row in rows]
        completions = engine.run(asked)
        tally.add(completions)
        done = [self._answered(row, one, tally) for row, one in zip(rows, completions, strict=True)]
        run.write(self.table, self.output(shard), done, tally.close(sum(not row.reason for row in done)))

    def _answered(self, row: Trial, one: Completion, tally: Tally) -> Trial:
        row = dataclasses.replace(row, model=self.name, num_tokens=one.num_tokens, is_cut=one.error == CUT_OFF)
        if one.error and not (row.is_cut and one.text):  # the whole sentences of a cut answer are graded
            tally.reject(one.error)
            return dataclasses.replace(row, reason=f"{one.error}: {one.detail}")
        text = whole_sentences(one.text) if row.is_cut else ""
        return dataclasses.replace(row, text=text or one.text, reason="")


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


# ---------------------------------------------------------------- likelihood under the base policy


def likely_trials(trials: Sequence[Trial]) -> list[Trial]:
    """The answers under held-out directives whose likelihood is computed: the same requests for both models."""
    said = [trial for trial in trials if trial.directive is not None and not trial.is_trained and trial.text]
    chosen = set(sorted({trial.trial_id for trial in said})[:MAX_LIKELIHOODS])
    return [trial for trial in said if trial.trial_id in chosen]


def base_log_probs(config: TuneConfig, run: RunDir, trials: Sequence[Trial], runner: Runner = run_lines) -> LogProbs:
    """What the base policy gives to the answers after their bare prompts, without an end mark.

    Kept in the table that training keeps its reference in. A note says how many hold control tokens, which would not be
    read as text; they are left out.
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
        answers = sorted(distinct, key=lambda ids: (len(ids), ids))  # of like lengths: less padding in attention
        for start in range(0, len(answers), num_answers):
            some = [list(ids) for ids in answers[start : start + num_answers]]
            rows.append(
                Row(cell_id="", rubric_id="", level="", prompt=list(prompt), answers=some, levels=[""] * len(some),
                    chosen=[], rejected=[], ref_logps=[])
            )  # fmt: skip
    return rows


# ---------------------------------------------------------------- the stage


def _say_of_answers(run: RunDir, step: Step, names: list[str], entry: dict[str, Any]) -> None:
    """A line if answers came with thoughts, one if many were cut, one if over half of them were lost."""
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


def _lines(plan: Plan, run: RunDir, shards: Shards) -> list[Line]:
    """The tuned model's trials and the base model's: answered, then graded."""
    config = plan.config
    planned = plan_trials(plan, run, shards)
    tuned = config.policy.model_copy(update={"model": str(run.model)})
    lines = []
    for name, model in (("tuned", tuned), ("base", config.policy)):
        answer = AnswerStep(stage=f"answer-{name}", name=name, model=model, planned=planned, seed=config.seed)
        judge = grader(plan.rubrics, config.judge, model)
        lines.append(Line(list(planned), [answer, GradeTrialsStep(rubrics=plan.by_id, model=judge)]))
    return lines


def _outputs(lines: Sequence[Line]) -> tuple[list[list[str]], list[str]]:
    """Names of the answered shards, line by line, and of all graded ones."""
    answered = [[line.steps[0].output(name) for name in line.shards] for line in lines]
    graded = [line.steps[1].output(name) for line, names in zip(lines, answered, strict=True) for name in names]
    return answered, graded


def update_report(plan: Plan, run: RunDir, shards: Shards) -> None:
    """Renders the report of an evaluation with these settings again, if there is one: steering has new results."""
    _, graded = _outputs(_lines(plan, run, shards))
    if run.read_json(RESULTS) and all(run.has("evaluation", name) for name in graded):
        say(f"report       {write_report(plan, run, run.read('evaluation', graded, Trial))}")
    elif (run.path / REPORT).exists():
        say(f"note: {REPORT} is of other settings and stays as it is; `cpt evaluate` renders it with these results")


def evaluate(plan: Plan, run: RunDir, shards: Shards, runner: Runner = run_lines) -> dict[str, Any]:
    """Answers, grades and scores both models; writes report/ and prints the table. Returns results.json's content."""
    start = time.monotonic()
    config = plan.config
    lines = _lines(plan, run, shards)
    runner(run, lines)
    answered, graded = _outputs(lines)
    steps = [*(line.steps[0] for line in lines), lines[0].steps[1]]
    for step, names in zip(steps, [*answered, graded], strict=True):
        entry = ledger_entry(run, step.table, names, step.model.price)
        run.add_to_ledger(step.stage, entry)
        _say_of_answers(run, step, names, entry)
    run.prune("evaluation", graded)
    trials = run.read("evaluation", graded, Trial)
    results = score_trials(
        trials,
        plan.rubrics,
        config.evaluate.bootstrap,
        config.seed,
        pool_spread(plan.rubrics, Spread(plan.rubrics, tuple(shards.passes)).known(run)),
        base_log_probs(config, run, likely_trials(trials), runner),
    )
    try:
        results["judge_check"] = check_judge(plan, run, shards, runner)
    except UserError as error:  # what else was measured is worth a report without it
        results["judge_check"] = None
        say(f"note: evaluate.judge_check: {error}")
    run.write_json(RESULTS, results)
    written = write_report(plan, run, trials)
    for block in (opposites_lines(trials, plan.rubrics), dial_lines(results), table_lines(results)):
        say("\n".join(["", *block]))
    if line := judge_check_line(results["judge_check"]):
        say(line)
    least = [(results["difference"][f"{name}_ci"] or [0.0])[0] for name in ("accuracy", "spearman_rho")]
    if max(least) <= 0:
        say("note: no gain over the base is shown; see how many answers became pairs, and the loss (`cpt status`)")
    say(f"report       {written} ({time.monotonic() - start:.0f} s for evaluation)")
    return results
