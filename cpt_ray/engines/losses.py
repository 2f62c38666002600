"""Why answers were lost, and what to change."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cpt_ray.chat.thoughts import DETAILS, NOT_ENDED, UNCLEAR
from cpt_ray.config import ModelConfig
from cpt_ray.tables.records import Reject
from cpt_ray.tables.rundir import RunDir
from cpt_ray.tables.shard import rejects_of

REJECTED = "rejected: "
"""In front of the reason, in the counts of a shard."""
OF_PAIRS = ("control has the level", "length ratio")
"""Reasons for which a pair is dropped, not an answer."""
NO_LOSS = ("not needed",)
"""Reasons that ask for no change."""
LEAST_SHARE = 0.05
"""Share of the answers below which a reason is not mentioned."""
MOST_REASONS = 2
"""Mentioned of a stage."""

MOST_CUT = 0.2
"""Share of answers that may be cut at max_tokens without a note."""
LEAST_ENDS = 10
"""Answers that must have ended in the upper half of the tokens for an extrapolation from them."""
FARTHEST = 4
"""Times max_tokens that an extrapolation may reach."""

_THINK_LESS = "turn thinking off ({role}.chat_template_kwargs, or the server's own setting)"
_CHANGES = {
    "cut off": "were cut off at {max_tokens} tokens: raise {role}.sampling.max_tokens",
    "too long": "were too long ({detail}): lower {role}.sampling.max_tokens, or give the model more context",
    "control token": "hold a control token of the model in their prompt ({detail}): mend the prompts",
    "refused": "were refused: {detail}",
    "filtered": "were filtered ({detail}): use another {role} or other prompts",
    "tool call": "were calls of tools instead of texts: use another {role}",
    "empty answer": "were empty ({detail})",
    NOT_ENDED: "were thoughts without an answer: raise {role}.sampling.max_tokens (and give no stop: thoughts end "
    f"there as well), or {_THINK_LESS}",
    UNCLEAR: f"have a mark of thoughts in their middle: {_THINK_LESS}",
    "ungraded": "have no grade: {detail}",
    "between two levels": "are graded between two levels ({detail}): lower synthesis.margin",
    "same text": "have the text of another answer to their prompt: raise {role}.sampling.temperature",
    "unbalanced": "are in grids that were left out, so that on average a rubric's pairs differ in nothing else: raise "
    "synthesis.samples, or set synthesis.balance to false",
    "near duplicate": "nearly repeat an earlier answer: raise synthesis.near_duplicates",
    "no partner": "have no answer at another level to be compared with ({detail}): the {role} does not reach other "
    "levels, or the judge does not see it; raise synthesis.samples or {role}.sampling.temperature",
    "control has the level": "{detail}: lower synthesis.control",
    "length ratio": "differ too much in length ({detail}): raise synthesis.max_length_ratio",
}


def tokens_to_hold(finished: Sequence[int], num_cut: int, max_tokens: int) -> int | None:
    """The max_tokens that would hold nine of ten of a stage's answers.

    Beyond max_tokens it is an extrapolation: answers are taken to end at the same rate per token as between a half and
    all of max_tokens, which is the maximum-likelihood estimate of an exponential tail from censored lengths. Real
    answers have somewhat heavier tails (SmolLM2-135M: 70% to 95% of what is needed where 20% to 50% are cut); for
    answers of about one length it is too much.

    Args:
        finished: generated tokens of each answer that ended by itself.
        num_cut: how many did not, after max_tokens.

    Returns:
        Exactly the quantile where so many have ended, else the estimate rounded up to tens; None where most answers
        are cut, too few have ended late enough, or the estimate is far away.
    """
    total = len(finished) + num_cut
    if num_cut <= total // 10:
        return sorted(finished)[total - total // 10 - 1] if total else None
    half = max_tokens / 2
    ends = [length - half for length in finished if length > half]
    if 2 * num_cut > total or len(ends) < LEAST_ENDS:
        return None
    rate = len(ends) / (sum(ends) + num_cut * (max_tokens - half))
    estimate = max_tokens + math.log(10 * num_cut / total) / rate
    return math.ceil(estimate / 10) * 10 if estimate <= FARTHEST * max_tokens else None


def cut_note(role: str, finished: Sequence[int], num_cut: int, max_tokens: int) -> str:
    """What to set where more than `MOST_CUT` of a stage's answers were cut; "" where not. Arguments as above."""
    total = len(finished) + num_cut
    if not total or num_cut / total <= MOST_CUT:
        return ""
    enough = tokens_to_hold(finished, num_cut, max_tokens)
    advice = "more would be needed, how many cannot be estimated from so few that ended"
    if enough is not None:
        advice = f"nine of ten would need at least {enough} (extrapolated)"
    return f"{num_cut / total:.0%} are cut at {max_tokens} tokens; {advice}: raise {role}.sampling.max_tokens"


@dataclass(frozen=True)
class StageShards:
    """A stage's shards: in which table they are, and which role's answers they hold or are made of."""

    name: str
    table: str
    shards: Sequence[str]
    role: str
    model: ModelConfig

    def losses(self, run: RunDir, entry: Mapping[str, Any], total: int) -> list[str]:
        """The largest reasons of its ledger entry, with their number, of `total` answers, and what to change."""
        rejected = Counter({reason: count for reason, count in entry["rejected"].items() if reason not in NO_LOSS})
        largest = rejected.most_common(MOST_REASONS)
        return [self._text(run, reason, count, total) for reason, count in largest if count >= LEAST_SHARE * total]

    def _text(self, run: RunDir, reason: str, count: int, total: int) -> str:
        detail = self._detail(run, reason)
        change = _CHANGES.get(reason, f"were lost: {reason} ({{detail}})")
        if reason == "cut off" and DETAILS[NOT_ENDED] in detail:
            change += f", or {_THINK_LESS}"
        text = change.format(role=self.role, max_tokens=self.model.sampling.max_tokens, detail=detail)
        return f"{count} pairs {text}" if reason in OF_PAIRS else f"{count} of {total} answers {text}"

    def _detail(self, run: RunDir, reason: str) -> str:
        """The most frequent one of this reason in the first shard that has any."""
        for shard in self.shards:
            if run.counts(self.table, shard).get(f"{REJECTED}{reason}"):
                rows = run.read("rejects", [rejects_of(self.name, shard)], Reject)
                return Counter(row.detail for row in rows if row.reason == reason).most_common(1)[0][0]
        return ""


def reasons(rejects: Iterable[Reject]) -> dict[str, int]:
    """How many rejects there are of each reason, for the ledger."""
    return dict(Counter(reject.reason for reject in rejects))
