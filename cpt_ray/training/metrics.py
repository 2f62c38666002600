"""What is measured on held-out rows: whether the policy reads its directive, and how far it has moved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from cpt_ray.logprobs.rows import Row


def held_out_metrics(rows: Sequence[Row], logps_of_rows: Sequence[Sequence[float]]) -> dict[str, float]:
    """Measures of whether the policy reads its directive, from log-probabilities (nats) of each row's answers.

    A pair is right if the policy raised its chosen answer above its rejected one, against the reference.

    Returns:
        pair_accuracy, and accuracy/RUBRIC/LEVEL by the directive's.
        twin_accuracy: over the pairs whose twin is there; 0.5 means that the directive is ignored.
        swap_gap: nats per token by which an answer is likelier under its own directive than under its twin's.
        drift: nats per token by which the answers became unlikelier than under the reference (the divergence
            KL(reference || policy), were they drawn from the reference).
        length_drift: share of pairs whose longer answer is preferred, less the share whose longer answer is chosen.
    """
    right: dict[str, list[float]] = defaultdict(list)
    swaps: dict[tuple[str, str, str], tuple[float, bool]] = {}
    own: dict[tuple[str, str], tuple[float, int]] = {}
    longer: list[float] = []
    lost, tokens = 0.0, 0
    for row, logps in zip(rows, logps_of_rows, strict=True):
        lengths = [len(answer) for answer in row["answers"]]
        gains = [new - old for new, old in zip(logps, row["ref_logps"], strict=True)]
        lost, tokens = lost - sum(gains), tokens + sum(lengths)
        for chosen, rejected in zip(row["chosen"], row["rejected"], strict=True):
            is_right = gains[chosen] > gains[rejected]
            right["pair_accuracy"].append(is_right)
            if lengths[chosen] != lengths[rejected]:
                chosen_is_longer = lengths[chosen] > lengths[rejected]
                longer.append((chosen_is_longer == is_right) - chosen_is_longer)
            if row["rubric_id"]:
                right[f"accuracy/{row['rubric_id']}/{row['level']}"].append(is_right)
                swaps[row["cell_id"], row["level"], row["levels"][rejected]] = (logps[rejected], is_right)
                own[row["cell_id"], row["level"]] = (logps[chosen], lengths[chosen])
    gaps = []
    for (cell, level, other), (_, is_right) in swaps.items():
        if twin := swaps.get((cell, other, level)):
            right["twin_accuracy"].append(is_right)
            logp, length = own[cell, level]
            gaps.append((logp - twin[0]) / length)
    means = {name: sum(values) / len(values) for name, values in right.items()}
    means |= {"swap_gap": sum(gaps) / len(gaps)} if gaps else {}
    return means | {"drift": lost / tokens, "length_drift": sum(longer) / len(longer) if longer else 0.0}
