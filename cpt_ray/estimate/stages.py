"""What the stages of a run will ask of models, disk and time, from its plan; nothing is started or written.

Units and files follow from the plan exactly. Tokens and time are those of `rates.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from cpt_ray.chat.conversations import (
    ChatMessage,
    director_messages,
    judge_messages,
    policy_messages,
    rationale_messages,
)
from cpt_ray.config import JudgeConfig, PriceConfig
from cpt_ray.engines.ledger import cost_of
from cpt_ray.engines.losses import StageShards
from cpt_ray.estimate.rates import PAIR_SHARE, Rates, Stage, TokenCounter, start_seconds
from cpt_ray.evaluation.perplexity import MAX_PERPLEXITY_ANSWERS
from cpt_ray.evaluation.stage import evaluated_prompts, prompts_per_shard, trial_lines, trial_outputs
from cpt_ray.judging.judge import first_judge
from cpt_ray.judging.judge_check import num_checked
from cpt_ray.judging.spread import surveyed_shards
from cpt_ray.plan import Plan, Shards, plan_units, read_judge_check, writer_units
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.synthesis.direct import num_held_out
from cpt_ray.synthesis.pair_steps import PAIRING
from cpt_ray.synthesis.stage import Steps, finished_synthesis, name_shards
from cpt_ray.synthesis.write import WriteStep
from cpt_ray.tables.records import Prompt, Unit
from cpt_ray.tables.rundir import MODEL_INFO_FILE, RESULTS_FILE, RunDir
from cpt_ray.units import Units

DIRECTIVE = "Use plain, everyday words and short sentences, as if you talked to a friend who has little time."
"""In the place of those that the director has yet to write."""
SAMPLED = 64
"""Prompts whose requests are tokenised, evenly spread, where there are more."""
MOST_TOKENISED = 1024
"""Requests, in all."""


class Estimate:
    """The stages of a run, from its plan."""

    def __init__(self, plan: Plan, run: RunDir, rates: Rates, train_key: Callable[[Shards], str]):
        self.plan, self.run, self.rates = plan, run, rates
        self._count_tokens = TokenCounter()
        self._units = plan_units(plan)
        self._shards = name_shards(plan, self._units)
        self._steps = Steps.of(plan, self._units)
        self._prompts = plan.prompts_of("train")
        self._sample = self._prompts[:: max(1, len(self._prompts) // SAMPLED)]
        self._judged = [rubric for rubric in plan.rubrics if rubric.judged]
        info = run.read_json(MODEL_INFO_FILE)
        is_finished = set(self._shards.pairs) <= run.names("pairs")
        self._is_trained = bool(info) and is_finished and info["key"] == train_key(self._shards)
        self._first, self._most = self._num_units()
        self._expected = min(self._most, self._first * rates.growth) if rates.growth else self._most
        """Answers of all passes."""
        self._answer_tokens = rates.answer_tokens("write", "writer", plan.config.writer)

    def stages(self, command: str) -> list[Stage]:
        """Those of a command, in order."""
        stages = self._synthesis() if command in ("run", "synthesize") else []
        if command in ("run", "train"):
            stages.append(self._training())
        if command in ("run", "evaluate"):
            stages += self._evaluation()
        last = ""  # an engine that the stage before has open is not started again
        for stage in stages:
            last = self._add_time(stage, last)
        return stages

    def units_line(self) -> str:
        """How many units there are, in words."""
        return (
            f"{self._first:,} in the first pass, at most {self._most:,} in all (passes: "
            f"{self.plan.config.synthesis.num_passes}); {len(self._prompts):,} prompts, "
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

    # ------------------------------------------------------------ what all stages have in common

    def _stage(self, of: StageShards, rows: int, most: int | None = None, *, more: int = 0) -> Stage:
        """Args:
        most: rows, where that is not `rows`. more: shards that the stage writes to other tables.
        """
        files, there = len(of.shards) + more, len(self.run.names(of.table).intersection(of.shards))
        role = "" if of.model is PAIRING else of.role
        return Stage(name=of.name, role=role, model=of.model, rows=rows, most=rows if most is None else most,
                     files=files, there=round(files * there / len(of.shards)))  # fmt: skip

    def _asking(self, stage: Stage, prompt_tokens: float) -> Stage:
        """The stage with what its model reads and writes: one text a row, to prompts of so many tokens."""
        mean = self.rates.answer_tokens(stage.name, stage.role, stage.model)
        stage.requests, stage.prompt_tokens = stage.rows, round(stage.rows * prompt_tokens)
        stage.written = round(stage.rows * mean)
        stage.most_written = stage.most * stage.model.sampling.max_tokens
        return stage

    def _grading(self, stage: Stage, judge: JudgeConfig, rubrics: Sequence[Rubric], answers: tuple[int, int],
                 answer_tokens: float, prompts: Sequence[Prompt]) -> Stage:  # fmt: skip
        """The stage with what a judge is asked of so many answers (expected, at most) by each of its rubrics."""
        explains, most = judge.mode == "rationale", 0
        for rubric in rubrics:
            each = judge.votes if explains else len(rubric.judged)
            asked = [
                rationale_messages(rubric, prompt.text, "")
                if explains
                else judge_messages(rubric, rubric.judged[0], prompt.text, "")
                for prompt in prompts
            ]
            stage.requests += answers[0] * each
            most += answers[1] * each
            stage.prompt_tokens += round(answers[0] * each * (self._count_tokens.mean(judge, asked) + answer_tokens))
        mean = 1.0
        if explains:
            per_row = self.rates.tokens_per_row(stage.name, stage.role)
            answer = self.rates.answer_tokens(stage.name, stage.role, judge)
            mean = per_row * stage.rows / max(1, stage.requests) if per_row else answer
        stage.written = round(stage.requests * mean)
        stage.most_written = most * (judge.sampling.max_tokens if explains else 1)
        return stage

    def _on_workers(self, name: str, rows: int, most: int, tokens: float, is_done: bool) -> Stage:
        """A stage on the resources of the training's workers."""
        train = self.plan.config.train
        resources = train.worker_resources
        place = {"num_cpus": resources.get("CPU", 1.0) or 1.0, "num_gpus": resources.get("GPU", 0.0), "engine": {}}
        model = self.plan.config.policy.model_copy(update={"num_actors": train.num_workers, **place})
        return Stage(name=name, role="policy", model=model, rows=rows, most=most, prompt_tokens=round(tokens),
                     is_done=is_done)  # fmt: skip

    def _add_time(self, stage: Stage, last: str) -> str:
        """Adds the time and the cost of what is left of a stage; `last`, returned: key of the engines that are open."""
        left, price = stage.left, stage.model.price
        work = left * self.rates.engine_seconds(stage)
        key = "" if stage.model is PAIRING else stage.model.engine_key
        is_new = bool(key) and key != last and left > 0 and stage.prompt_tokens > 0
        stage.seconds = work / stage.engines + (start_seconds(stage.model) if is_new else 0.0)
        if price != PriceConfig() and stage.name != "train":
            counts = {"prompt_tokens": left * stage.prompt_tokens, "generated_tokens": left * stage.written}
            counts |= {"cached_tokens": counts["prompt_tokens"] * self.rates.cached_share(stage)}
            stage.cost = cost_of(counts | {"engine_seconds": work}, price)
        return key if is_new else last

    def _directed(self, prompts: Sequence[Prompt]) -> float:
        """Tokens of what the policy is asked: the prompts, each under one of the directives."""
        levels = [level for rubric in self.plan.rubrics for level in rubric.levels]
        texts = [text for level in levels for text in level.directives or (DIRECTIVE,)]
        return self._policy_tokens([(texts[at * 7919 % len(texts)], each.text) for at, each in enumerate(prompts)])

    def _policy_tokens(self, asked: Sequence[tuple[str | None, str]]) -> float:
        conversations: list[list[ChatMessage]] = [policy_messages(directive, prompt) for directive, prompt in asked]
        return self._count_tokens.mean(self.plan.config.policy, conversations)

    # ------------------------------------------------------------ synthesis

    def _synthesis(self) -> list[Stage]:
        controls = sum(self._units[name].count for name in self._shards.controls)
        answers = round(self._expected) + controls, self._most + controls

        def estimated(of: StageShards) -> Stage:
            match of.table:
                case "directives":
                    return self._direct(of)
                case "generations":
                    return self._write(of) if of.name == "write" else self._control(of, controls)
                case "grades":
                    return self._judge(of, answers)
                case table:  # its rejects are of another one
                    return self._stage(of, *answers, more=len(of.shards) if table == "pairs" else 0)

        return [estimated(of) for of in self._steps.stages(self._shards)]

    def _direct(self, of: StageShards) -> Stage:
        levels = [(rubric, level) for rubric in self.plan.rubrics for level in rubric.levels if not level.directives]
        stage = self._stage(of, len(levels) * self._steps.direct.num_asked, more=len(of.shards))  # rejects
        return self._asking(stage, self._count_tokens.mean(of.model, [director_messages(*each) for each in levels]))

    def _write(self, of: StageShards) -> Stage:
        few = self._sample[:: math.ceil(len(self._sample) * self._first / len(self._prompts) / MOST_TOKENISED)]
        more = 2 * len(of.shards) + len(self._shards.plan_rejects)  # units, rejects
        stage = self._stage(of, round(self._expected), self._most, more=more)
        return self._asking(stage, self._request_tokens(self._steps.write, writer_units(self.plan).first_pass(few)))

    def _control(self, of: StageShards, rows: int) -> Stage:
        units = [unit for name in of.shards[:: max(1, len(of.shards) // 4)] for unit in self._units[name]]
        stage = self._stage(of, rows, more=2 * len(of.shards))  # units, rejects
        return self._asking(stage, self._request_tokens(self._steps.control, units))

    def _request_tokens(self, step: WriteStep, units: Iterable[Unit]) -> float:
        return self._count_tokens.mean(step.model, [step.request(unit).messages for unit in units])

    def _judge(self, of: StageShards, answers: tuple[int, int]) -> Stage:
        """Rows of the ledger are (answer, rubric). Measured rubrics grade every answer, judged ones those that were
        written to them and, where a prompt then lacks a level, the others: that is the difference to `most`. Judges but
        the first grade by judged rubrics alone."""
        num_rubrics, num_judged = len(self.plan.rubrics), len(self._judged)
        num_measured = num_rubrics - num_judged if of.name == "judge" else 0
        share = 1 / num_rubrics if self.plan.config.synthesis.ask == "levels" else 1.0
        rows = round(answers[0] * (num_measured + share * num_judged))
        stage = self._stage(of, rows, answers[1] * (num_measured + num_judged))
        stage.role = stage.role if self._judged else "writer"
        assert isinstance(of.model, JudgeConfig)
        asked = (round(share * answers[0]), answers[1])
        return self._grading(stage, of.model, self._judged, asked, self._answer_tokens, self._sample)

    # ------------------------------------------------------------ training, evaluation

    def _training(self) -> Stage:
        """Pairs, and the tokens that training runs; the reference's pass over them is in the time."""
        train, most, share = self.plan.config.train, self._most_pairs(), self.rates.pairs_per_answer
        rows = min(most, round(PAIR_SHARE * most if share is None else share * self._expected))
        # a row is one prompt, K answers and the K - 1 pairs of one level
        k = 2 if train.contrast == "ends" else max(len(rubric.levels) for rubric in self.plan.rubrics)
        each = self.rates.tokens_per_pair or (self._directed(self._sample) + k * self._answer_tokens) / (k - 1)
        return self._on_workers("train", rows, most, train.epochs * rows * each, self._is_trained)

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
        plan, config, prompts = self.plan, self.plan.config, evaluated_prompts(self.plan)
        bare = self._policy_tokens([(None, prompt.text) for prompt in prompts])
        counts = [self._trials_of(rubric) for rubric in plan.rubrics]
        rows = len(prompts) * sum(map(sum, counts))
        share = len(prompts) * sum(len(rubric.levels) for rubric in plan.rubrics) / max(1, rows)  # without a directive
        asked = (1 - share) * self._directed(prompts) + share * bare
        files = sum(math.ceil(len(prompts) / prompts_per_shard(plan, rubric)) for rubric in plan.rubrics)
        answered, graded = self._evaluated()
        is_done = graded == 2 * files and self.run.read_json(RESULTS_FILE) is not None
        stages = [
            self._asking(
                Stage(name=name, role="policy", model=config.policy, rows=rows, most=rows, files=files, there=there),
                asked,
            )
            for name, there in zip(("answer-tuned", "answer-base"), answered, strict=True)
        ]
        answer = self.rates.answer_tokens("answer-base", "policy", config.policy)
        judge, each = first_judge(plan.rubrics, config.judge, config.policy), 2 * rows // len(plan.rubrics)
        grade = Stage(name="grade", role="judge" if self._judged else "policy", model=judge, rows=2 * rows,
                      most=2 * rows, files=2 * files, there=graded)  # fmt: skip
        stages.append(self._grading(grade, judge, self._judged, (each, each), answer, prompts))
        compared = 2 * min(MAX_PERPLEXITY_ANSWERS, len(prompts) * sum(held_out for held_out, _ in counts))
        stages.append(self._on_workers("perplexity", compared, compared, compared * (bare + answer), is_done))
        return [*stages, *self._judge_check(is_done)]

    def _evaluated(self) -> tuple[list[int], int]:
        """Shards that are complete: answered by the tuned and by the base model, and graded."""
        if not self._is_trained:
            return [0, 0], 0
        finished, _ = finished_synthesis(self.plan, self.run)
        answered, graded = trial_outputs(trial_lines(finished, self.run, self._shards))
        there = self.run.names("evaluation_answers")
        return [len(there.intersection(names)) for names in answered], len(
            self.run.names("evaluation").intersection(graded)
        )

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

    def _judge_check(self, is_done: bool) -> list[Stage]:
        rubric, judge = read_judge_check(self.plan.config), self.plan.config.judge
        if rubric is None:
            return []
        shards = len(surveyed_shards(list(self._shards.passes)))
        rows = shards * num_checked(self.plan, shards)
        stage = Stage(name="check-judge", role="judge", model=judge, rows=rows, most=rows, files=shards,
                      there=shards if is_done else 0)  # fmt: skip
        return [self._grading(stage, judge, [rubric], (rows, rows), self._answer_tokens, self._sample)]
