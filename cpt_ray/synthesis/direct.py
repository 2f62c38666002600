"""Directives: given in a rubric, or written by the director; some are held out."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cpt_ray.chat.conversations import director_messages
from cpt_ray.chat.layout import layout_hash
from cpt_ray.engines.engine import Completion, Engine, sampling_request
from cpt_ray.engines.ledger import Tally
from cpt_ray.engines.step import Step
from cpt_ray.errors import UserError
from cpt_ray.plan import Rubrics
from cpt_ray.rubrics.checks import wording_of
from cpt_ray.rubrics.rubric import Rubric, directive_leak
from cpt_ray.tables.by_hash import shuffled
from cpt_ray.tables.records import Directive, Reject, content_id
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import ShardName

DIRECTOR_OVERSAMPLING = 4
"""Directives sampled for each one wanted, because some leak and some repeat each other."""


@dataclass(frozen=True, kw_only=True)
class DirectStep(Step):
    """rubric -> directives (+ rejects): given in the rubric, or written by the director."""

    rubrics: Rubrics
    paraphrases: int
    held_out: float
    seed: int
    stage: str = "direct"
    table: str = "directives"

    def output(self, shard: str) -> str:
        """Depends on the rubric, its own directives, the director and how many are wanted."""
        rubric = self.rubrics[shard]
        given = [level.directives for level in rubric.levels]
        settings = (self.paraphrases, self.held_out, self.seed, layout_hash("direct"))
        return ShardName(shard).made_of(rubric.content_hash, given, self.model.answer_key, *settings)

    @property
    def num_asked(self) -> int:
        """Directives asked for per level without any."""
        return self.paraphrases * DIRECTOR_OVERSAMPLING

    def __call__(self, engine: Engine, run: RunDir, shard: str) -> None:
        """Makes one rubric's directives."""
        rubric, name = self.rubrics[shard], self.output(shard)
        missing = [level for level in rubric.levels if not level.directives]
        wanted = self.num_asked
        tally = Tally(wanted * len(missing))
        requests = [
            sampling_request(
                director_messages(rubric, level),
                self.model.sampling,
                f"{rubric.content_hash}/{level.name}/{number}",
                self.seed,
            )
            for level in missing
            for number in range(wanted)
        ]
        completions = engine.run(requests) if requests else []
        tally.add(completions)
        rows, rejects = self._choose(rubric, [level.name for level in missing for _ in range(wanted)], completions)
        for reject in rejects:
            tally.reject(reject.reason)
        run.write(self.table, name, rows, tally.close(len(rows)), (self.stage, rejects))

    def _choose(
        self, rubric: Rubric, levels: list[str], completions: list[Completion]
    ) -> tuple[list[Directive], list[Reject]]:
        texts: dict[str, list[str]] = {level.name: list(level.directives) for level in rubric.levels}
        owner = {wording_of(text): name for name, given in texts.items() for text in given}
        rejects = []
        for level_name, completion in zip(levels, completions, strict=True):
            text = " ".join(completion.text.split())
            error, detail = completion.error, completion.detail
            if not error and (leak := directive_leak(text, rubric)):
                error, detail = "leak", leak
            elif not error and (wording := wording_of(text)) in owner:
                error = "repeats another" if owner[wording] == level_name else "same as another level's"
            elif not error and len(texts[level_name]) >= self.paraphrases:
                error = "not needed"
            if error:
                rejects.append(
                    Reject(
                        stage=self.stage,
                        subject_id=content_id(text),
                        rubric_id=rubric.id,
                        level=level_name,
                        reason=error,
                        detail=detail or text,
                    )
                )
            else:
                owner[wording_of(text)] = level_name
                texts[level_name].append(text)
        for level in rubric.levels:
            if len(texts[level.name]) < 2:
                lost = [reject for reject in rejects if reject.level == level.name]
                counts = Counter(reject.reason for reject in lost)
                why = ", ".join(f"{count} {reason}" for reason, count in counts.items())
                example = f"; the director's were: {why}, for example {lost[0].detail!r}" if lost else ""
                raise UserError(
                    f"rubric {rubric.id}, level {level.name}: {len(texts[level.name])} usable directive(s), at least 2 "
                    f"are needed (one is held out){example}; give some under the level's `directives:` or use another "
                    "director"
                )
        rows = [row for level in rubric.levels for row in self._split(rubric, level.name, texts[level.name])]
        return rows, rejects

    def _split(self, rubric: Rubric, level: str, texts: list[str]) -> list[Directive]:
        given = set(rubric.level(level).directives)
        aside = num_held_out(len(texts), self.held_out)
        ordered = shuffled(texts, lambda text: (rubric.id, level, text))
        return [
            Directive(
                directive_id=content_id(rubric.id, level, text),
                rubric_id=rubric.id,
                level=level,
                text=text,
                split="held_out" if at < aside else "train",
                source="rubric" if text in given else self.model.model,
            )
            for at, text in enumerate(ordered)
        ]


def num_held_out(count: int, share: float) -> int:
    """Of a level's directives; at least one is held out, and one is not."""
    return min(count - 1, max(1, round(share * count)))
