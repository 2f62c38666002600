"""One stage as it is estimated, and what all estimates have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from cpt_ray.chat.conversations import ChatMessage, judge_messages, policy_messages, rationale_messages
from cpt_ray.config import JudgeConfig, ModelConfig, PriceConfig
from cpt_ray.engines.ledger import cost_of
from cpt_ray.estimate.rates import Rates, TokenCounter, start_seconds
from cpt_ray.plan import Plan
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.synthesis.pair_steps import PAIRING
from cpt_ray.tables.records import Prompt
from cpt_ray.tables.rundir import RunDir

DIRECTIVE = "Use plain, everyday words and short sentences, as if you talked to a friend who has little time."
"""In the place of those that the director has yet to write."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage of a run will ask for."""

    name: str
    """As in the ledger."""
    role: str
    """In the run file; "" where no model is called."""
    model: ModelConfig
    """For its resources, where no model is called."""
    rows: int
    """As the ledger counts them: units, grades, trials, pairs ..."""
    most: int
    """Rows, at most."""
    requests: int = 0
    """To the model."""
    prompt_tokens: int = 0
    written: int = 0
    """Tokens."""
    most_written: int = 0
    """Of `most` rows, each with all the tokens that sampling allows."""
    files: int = 0
    """Shards of tables."""
    there: int = 0
    """Those of them that are complete already."""
    is_done: bool = False
    """Of what has no shards of its own."""
    seconds: float = 0.0
    """On the clock, for what is not there yet."""
    cost: float | None = None
    """Of what is not there yet; None without a price."""

    @property
    def engines(self) -> int:
        """As many as the run file allows and there are shards for."""
        most = self.model.num_actors.most
        return min(most, self.files) if self.files else most

    @property
    def left(self) -> float:
        """Share of the stage that is not done yet."""
        return 1 - self.there / self.files if self.files else 1.0 - self.is_done

    @property
    def place(self) -> str:
        """Where it runs, in words."""
        if self.model.endpoint:
            return "endpoint"
        each = f"{self.model.num_gpus:g} GPU" if self.model.num_gpus else f"{self.model.num_cpus:g} CPU"
        return f"{self.engines} x {each}"


class Estimating:
    """Tokens, time and cost of stages."""

    def __init__(self, plan: Plan, run: RunDir, rates: Rates):
        self.plan, self.run, self.rates = plan, run, rates
        self.count_tokens = TokenCounter()
        self.complete = {
            table: run.names(table) for table in ("directives", "generations", "grades", "repeats", "pairs")
        }
        self._pool = ""

    def stage(
        self,
        name: str,
        role: str,
        model: ModelConfig,
        rows: int,
        most: int,
        table: str,
        names: Sequence[str],
        more: int = 0,
    ) -> Stage:
        """Args:
        names: the stage's shards in `table`.
        more: shards that it writes elsewhere.
        """
        files = len(names) + more
        there = sum(each in self.complete[table] for each in names)
        return Stage(name=name, role=role, model=model, rows=rows, most=most, files=files,
                     there=round(files * there / max(1, len(names))))  # fmt: skip

    def sampled(self, stage: Stage) -> Stage:
        """The stage with the texts that a model writes in it, one a row."""
        mean = self.rates.answer_tokens(stage.name, stage.role, stage.model)
        most = stage.most * stage.model.sampling.max_tokens
        return dataclasses.replace(stage, written=round(stage.rows * mean), most_written=most)

    def directed(self, prompts: Sequence[Prompt]) -> list[list[ChatMessage]]:
        """What the policy is asked: the prompts, each under one of the directives."""
        levels = [level for rubric in self.plan.rubrics for level in rubric.levels]
        texts = [text for level in levels for text in level.directives or (DIRECTIVE,)]
        return [policy_messages(texts[at * 7919 % len(texts)], each.text) for at, each in enumerate(prompts)]

    def mean(self, role: ModelConfig, conversations: Sequence[list[ChatMessage]]) -> float:
        """Tokens of a prompt."""
        counts = self.count_tokens(role, conversations)
        return sum(counts) / max(1, len(counts))

    def timed(self, stage: Stage) -> Stage:
        """The stage with the time and the cost of what is left of it."""
        left = stage.left
        work = left * self.rates.engine_seconds(stage)
        key = "" if stage.model is PAIRING else stage.model.engine_key
        is_new = bool(key) and key != self._pool and left > 0 and (stage.requests or stage.prompt_tokens)
        self._pool = key if is_new else self._pool
        start = start_seconds(stage.model) if is_new else 0.0
        counts = {"prompt_tokens": left * stage.prompt_tokens, "generated_tokens": left * stage.written}
        counts |= {"cached_tokens": counts["prompt_tokens"] * self.rates.cached_share(stage), "engine_seconds": work}
        has_price = stage.model.price != PriceConfig() and stage.name != "train"
        return dataclasses.replace(
            stage, seconds=work / stage.engines + start, cost=cost_of(counts, stage.model.price) if has_price else None
        )

    def graded(
        self,
        stage: Stage,
        judge: JudgeConfig,
        judged: Sequence[Rubric],
        answers: tuple[int, int],
        answer_tokens: float,
        prompts: Sequence[Prompt],
    ) -> Stage:
        """The stage with what a judge is asked of so many answers (expected, at most) by each of its rubrics."""
        requests = tokens = most = 0
        for rubric in judged:
            if judge.mode == "rationale":
                asked = [rationale_messages(rubric, prompt.text, "") for prompt in prompts]
                each = judge.votes
            else:
                asked = [judge_messages(rubric, rubric.judged[0], prompt.text, "") for prompt in prompts]
                each = len(rubric.judged)
            requests, most = requests + answers[0] * each, most + answers[1] * each
            tokens += round(answers[0] * each * (self.mean(judge, asked) + answer_tokens))
        limit, mean = 1, 1.0
        if judge.mode == "rationale":
            limit, mean = judge.sampling.max_tokens, self.rates.answer_tokens(stage.name, stage.role, judge)
            per_row = self.rates.per_row(stage.name, stage.role)
            mean = per_row * stage.rows / max(1, requests) if per_row else mean
        return dataclasses.replace(
            stage, requests=requests, prompt_tokens=tokens, written=round(requests * mean), most_written=most * limit
        )
