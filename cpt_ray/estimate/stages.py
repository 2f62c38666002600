"""What the stages of a run will ask of models, disk and time, from its plan; nothing is started or written.

Units and files follow from the plan exactly. Tokens and time are those of `rates.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from cpt_ray.chat.conversations import director_messages, policy_messages
from cpt_ray.config import JudgeConfig
from cpt_ray.estimate.rates import PAIR_SHARE, Rates
from cpt_ray.estimate.stage import Estimating, Stage
from cpt_ray.evaluation.perplexity import MAX_PERPLEXITY_ANSWERS
from cpt_ray.evaluation.stage import evaluated_prompts, prompts_per_shard, trial_lines, trial_outputs
from cpt_ray.judging.judge import first_judge
from cpt_ray.judging.judge_check import num_checked
from cpt_ray.judging.spread import surveyed_shards
from cpt_ray.plan import Plan, Shards, Units, plan_units, read_judge_check, writer_units
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.synthesis.direct import num_held_out
from cpt_ray.synthesis.pair_steps import PAIRING
from cpt_ray.synthesis.stage import Steps, finished_synthesis, name_shards
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RESULTS_FILE, RunDir

SAMPLED = 64
"""Prompts whose requests are tokenised, evenly spread, where there are more."""
MOST_TOKENISED = 1024
"""Requests, in all."""


class Estimate(Estimating):
    """The stages of a run, from its plan."""

    def __init__(self, plan: Plan, run: RunDir, rates: Rates, train_key: Callable[[Shards], str]):
        super().__init__(plan, run, rates)
        self._units = plan_units(plan)
        self._shards = name_shards(plan, self._units)
        self._steps = Steps.of(plan, self._units)
        self._prompts = plan.prompts_of("train")
        self._sample = self._prompts[:: max(1, len(self._prompts) // SAMPLED)]
        info = run.read_json(MODEL_INFO_FILE)
        is_finished = set(self._shards.pairs) <= self.complete["pairs"]
        self._is_trained = bool(info) and is_finished and info["key"] == train_key(self._shards)

    def stages(self, command: str) -> list[Stage]:
        """Those of a command, in order."""
        made: list[Stage] = []
        if command in ("run", "synthesize"):
            made += self._synthesis()
        if command in ("run", "train"):
            made += [self._training()]
        if command in ("run", "evaluate"):
            made += self._evaluation()
        return [self.timed(stage) for stage in made]

    def units_line(self) -> str:
        """How many units there are, in words."""
        first, most = self._num_units()
        passes = self.plan.config.synthesis.num_passes
        return (
            f"{first:,} in the first pass, at most {most:,} in all (passes: {passes}); {len(self._prompts):,} prompts, "
            f"{len(self._shards.written):,} shards of answers"
        )

    def _num_units(self) -> tuple[int, int]:
        """The writer's, in the first pass and at most in all: if each pass leaves every level lacking."""
        first = Units(writer_units(self.plan), self._prompts[:1]).count
        settings, levels = self.plan.config.synthesis, [len(rubric.levels) for rubric in self.plan.rubrics]
        later = (settings.num_passes - 1) * settings.grids
        if settings.ask == "prompt":
            most = min(settings.samples, first + later * max(levels))
        else:
            most = first + min(settings.samples - settings.first_pass, later) * sum(levels)
        return first * len(self._prompts), most * len(self._prompts)

    # ------------------------------------------------------------ synthesis

    def _synthesis(self) -> list[Stage]:
        config, shards = self.plan.config, self._shards
        stages = [self._direct(), self._write()]
        controls = sum(self._units[name].count for name in shards.controls)
        if controls:
            stages.append(self._control(controls))
        graders = [("judge", first_judge(self.plan.rubrics, config.judge, config.writer))]
        graders += [(f"judges[{at}]", judge) for at, judge in enumerate(config.judges)]
        for at, ((role, judge), step) in enumerate(zip(graders, self._steps.judges, strict=True), start=1):
            names = [step.output(name) for name in shards.generations]
            name = f"judge-{at}" if at > 1 else "judge"
            stages.append(self._judge(name, role, judge, names, self._answers(stages)))
        for name, table, names in (("repeats", "repeats", list(shards.repeats)), ("pair", "pairs", shards.pairs)):
            if names:
                rows, most = self._answers(stages)
                more = len(names) if table == "pairs" else 0  # its rejects
                stages.append(self.stage(name, "", PAIRING, rows, most, table, names, more=more))
        return stages

    def _answers(self, stages: Sequence[Stage]) -> tuple[int, int]:
        """The writer's and the policy's own: expected, at most."""
        asked = [stage for stage in stages if stage.name in ("write", "control")]
        return sum(stage.rows for stage in asked), sum(stage.most for stage in asked)

    def _direct(self) -> Stage:
        role = self.plan.config.director
        asked = [
            (director_messages(rubric, level), self._steps.direct.num_asked)
            for rubric in self.plan.rubrics
            for level in rubric.levels
            if not level.directives
        ]
        tokens = self.count_tokens(role, [messages for messages, _ in asked])
        rows = sum(count for _, count in asked)
        prompt = sum(each * count for each, (_, count) in zip(tokens, asked, strict=True))
        names = self._shards.directives
        stage = self.stage("direct", "director", role, rows, rows, "directives", names, more=len(names))
        return self.sampled(dataclasses.replace(stage, requests=rows, prompt_tokens=round(prompt)))

    def _write(self) -> Stage:
        role = self.plan.config.writer
        first, most = self._num_units()
        rows = round(min(most, first * self.rates.growth)) if self.rates.growth else most
        writer = writer_units(self.plan)
        few = self._sample[:: math.ceil(len(self._sample) * first / len(self._prompts) / MOST_TOKENISED)]
        units = list(writer.first_pass(few))
        messages = [self._steps.write.request(unit).messages for unit in units]
        names = self._shards.written
        more = 2 * len(names) + len(self._shards.plan_rejects)  # units, rejects
        stage = self.stage("write", "writer", role, rows, most, "generations", names, more=more)
        return self.sampled(
            dataclasses.replace(stage, requests=rows, prompt_tokens=round(rows * self.mean(role, messages)))
        )

    def _control(self, rows: int) -> Stage:
        role, names = self.plan.config.policy, self._shards.controls
        units = [unit for name in names[:: max(1, len(names) // 4)] for unit in self._units[name]]
        mean = self.mean(role, [self._steps.control.request(unit).messages for unit in units])
        stage = self.stage("control", "policy", role, rows, rows, "generations", names, more=2 * len(names))
        return self.sampled(dataclasses.replace(stage, requests=rows, prompt_tokens=round(rows * mean)))

    def _judge(self, name: str, role: str, judge: JudgeConfig, names: Sequence[str], answers: tuple[int, int]) -> Stage:
        """Rows of the ledger are (answer, rubric). Measured rubrics grade every answer, judged ones those that were
        written to them and, where a prompt then lacks a level, the others: that is the difference to `most`."""
        rubrics, config = self.plan.rubrics, self.plan.config
        judged = [rubric for rubric in rubrics if rubric.judged]
        share = 1 / len(rubrics) if config.synthesis.ask == "levels" else 1.0
        rows = round(answers[0] * (len(rubrics) - len(judged) + share * len(judged)))
        stage = self.stage(name, role if judged else "writer", judge, rows, answers[1] * len(rubrics), "grades", names)
        answer = self.rates.answer_tokens("write", "writer", config.writer)
        return self.graded(stage, judge, judged, (round(share * answers[0]), answers[1]), answer, self._sample)

    # ------------------------------------------------------------ training, evaluation

    def _workers(self, name: str, rows: int, most: int, tokens: int, is_done: bool) -> Stage:
        """A stage on the resources of the training's workers."""
        train = self.plan.config.train
        resources = train.worker_resources
        place = {"num_cpus": resources.get("CPU", 1.0) or 1.0, "num_gpus": resources.get("GPU", 0.0), "engine": {}}
        model = self.plan.config.policy.model_copy(update={"num_actors": train.num_workers, **place})
        return Stage(name=name, role="policy", model=model, rows=rows, most=most, prompt_tokens=tokens, is_done=is_done)

    def _training(self) -> Stage:
        """Pairs, and the tokens that training runs; the reference's pass over them is in the time."""
        config, most = self.plan.config, self._most_pairs()
        first, most_units = self._num_units()
        answers = first * self.rates.growth if self.rates.growth else most_units
        share = self.rates.pairs_per_answer
        rows = min(most, round(PAIR_SHARE * most if share is None else share * answers))
        prompt = self.mean(config.policy, self.directed(self._sample))
        answer = self.rates.answer_tokens("write", "writer", config.writer)
        # a row is one prompt, K answers and the K - 1 pairs of one level
        k = 2 if config.train.contrast == "ends" else max(len(rubric.levels) for rubric in self.plan.rubrics)
        each = self.rates.tokens_per_pair or (prompt + k * answer) / (k - 1)
        return self._workers("train", rows, most, round(config.train.epochs * rows * each), self._is_trained)

    def _most_pairs(self) -> int:
        """If each prompt had all its grids, and no pair were lost."""
        config, settings = self.plan.config, self.plan.config.synthesis
        groups = [len(rubric.levels) for rubric in self.plan.rubrics]
        groups += [min(len(self.plan.by_id[name].levels) for name in names) for names in settings.combine]
        each = 0
        for levels in groups:
            k = 2 if config.train.contrast == "ends" else levels
            each += settings.grids * k * (k - 1) + (2 * k if settings.control else 0)
        total = each * len(self._prompts)
        return min(total, config.train.max_pairs or total)

    def _evaluation(self) -> list[Stage]:
        plan, config = self.plan, self.plan.config
        prompts = evaluated_prompts(plan)
        per_rubric = {rubric.id: self._trials_of(rubric) for rubric in plan.rubrics}
        rows = len(prompts) * sum(map(sum, per_rubric.values()))
        files = sum(math.ceil(len(prompts) / prompts_per_shard(plan, rubric)) for rubric in plan.rubrics)
        answered, graded = [0, 0], 0
        if self._is_trained:
            finished, _ = finished_synthesis(plan, self.run)
            names = trial_outputs(trial_lines(finished, self.run, self._shards))
            answered = [len({*some} & self.run.names("evaluation_answers")) for some in names[0]]
            graded = len({*names[1]} & self.run.names("evaluation"))
        bare = self.mean(config.policy, [policy_messages(None, prompt.text) for prompt in prompts])
        num_bare = len(prompts) * sum(len(rubric.levels) for rubric in plan.rubrics)
        asked = (rows - num_bare) * self.mean(config.policy, self.directed(prompts)) + num_bare * bare
        base = Stage(name="", role="policy", model=config.policy, rows=rows, most=rows, requests=rows, files=files)
        base = dataclasses.replace(base, prompt_tokens=round(asked))
        stages = [
            self.sampled(dataclasses.replace(base, name=name, there=there))
            for name, there in zip(("answer-tuned", "answer-base"), answered, strict=True)
        ]
        answer = self.rates.answer_tokens("answer-base", "policy", config.policy)
        judged = [rubric for rubric in plan.rubrics if rubric.judged]
        judge = first_judge(plan.rubrics, config.judge, config.policy)
        grade = Stage(name="grade", role="judge" if judged else "policy", model=judge, rows=2 * rows, most=2 * rows,
                      files=2 * files, there=graded)  # fmt: skip
        each = 2 * rows // len(plan.rubrics)
        stages.append(self.graded(grade, judge, judged, (each, each), answer, prompts))
        is_done = graded == 2 * files and self.run.read_json(RESULTS_FILE) is not None
        directed = len(prompts) * sum(counts[0] for counts in per_rubric.values())
        compared = 2 * min(MAX_PERPLEXITY_ANSWERS, directed)
        tokens = round(compared * (bare + answer))
        stages.append(self._workers("perplexity", compared, compared, tokens, is_done))
        if check := self._judge_check(is_done):
            stages.append(check)
        return stages

    def _trials_of(self, rubric: Rubric) -> tuple[int, int]:
        """Trials per prompt under held-out directives, and all others."""
        settings, synthesis = self.plan.config.evaluate, self.plan.config.synthesis
        held_out = others = 0
        for level in rubric.levels:
            total = len(level.directives) or synthesis.paraphrases
            aside = num_held_out(total, synthesis.held_out_directives)
            held_out += min(settings.directives, aside)
            others += min(settings.trained_directives, total - aside) + 1
        return held_out, others

    def _judge_check(self, is_done: bool) -> Stage | None:
        rubric, config = read_judge_check(self.plan.config), self.plan.config
        if rubric is None:
            return None
        shards = len(surveyed_shards(list(self._shards.passes)))
        rows = shards * num_checked(self.plan, shards)
        stage = Stage(name="check-judge", role="judge", model=config.judge, rows=rows, most=rows, files=shards,
                      there=shards if is_done else 0)  # fmt: skip
        answer = self.rates.answer_tokens("write", "writer", config.writer)
        return self.graded(stage, config.judge, [rubric], (rows, rows), answer, self._sample)
