"""`cpt steer evaluate`: every way of steering by choices, on the same held-out users, against none and an oracle.

Accuracy: the share of a user's other pairs that a method orders as the user does. Satisfaction: the mean utility of
the answers that it gives to the prompts of those pairs, by the user's true taste. All are [users, counts, seeds] here,
NaN where a method was not tried.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

from cpt_ray.console import progress, say
from cpt_ray.steering.actors import AdapterActor
from cpt_ray.steering.answers import Answer
from cpt_ray.steering.held_out_users import AnswerBank, HeldOutUsers, planned_answer
from cpt_ray.steering.inference import Candidates
from cpt_ray.steering.policy import RANK, ConditionalPolicy
from cpt_ray.steering.stage import NUM_QUESTIONS, Steering, fit
from cpt_ray.steering.summary import table_lines
from cpt_ray.steering.users import Floats, User
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import STEERING_RESULTS_FILE

RESAMPLES = 1000
POLICY_USERS, POLICY_PAIRS, POLICY_PROMPTS = 40, 10, 4
"""How many held-out users a conditional policy is run for, how many pairs of each it orders, and prompts it answers."""
PROMPT_HEAD = "The user compared pairs of answers. Answer in the way this user likes."
PROMPT_SAMPLES = 2
"""Answers of the policy that is shown the pairs."""


@contextlib.contextmanager
def _without_nan_warnings() -> Iterator[None]:
    """NaN without a warning, where a method was not tried or a user's rubric has no measure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN", RuntimeWarning)
        yield


@_without_nan_warnings()
def compare_rewards(steering: Steering) -> dict[str, Any]:
    """`fit`, then the reward models on held-out users; written and printed."""
    held_out = HeldOutUsers(steering, fit(steering))
    return _write(held_out, held_out.reward_accuracy(), {}, {})


@_without_nan_warnings()
def evaluate(steering: Steering) -> dict[str, Any]:
    """All methods; written and printed."""
    held_out = HeldOutUsers(steering, fit(steering))
    bank = AnswerBank(held_out)
    candidates, users, name = steering.candidates, held_out.users, "inferred directive"
    accuracies, satisfactions = held_out.reward_accuracy(), {"NP-BTL, best of n": bank.reranked()}
    values = candidates.values(steering.logprobs(steering.held_out_population.answers))
    chosen = [values[user.context[:, 0]] - values[user.context[:, 1]] for user in users]
    targets = [values[user.targets[:, 0]] - values[user.targets[:, 1]] for user in users]
    anothers = [chosen[at] for at in held_out.others.tolist()]
    of_asked = [_margins_of_asked(held_out, candidates, user, values) for user in users]
    accuracies[name] = _inferred_accuracy(held_out, candidates, chosen, targets)
    accuracies[f"{name}, another's choices"] = _inferred_accuracy(held_out, candidates, anothers, targets)
    satisfactions[name] = _inferred_satisfaction(bank, candidates, chosen)
    satisfactions[f"{name}, asked"] = _inferred_satisfaction(bank, candidates, of_asked)
    for policy in held_out.fitted.policies:
        name = f"NP-DPO {policy.form}"
        accuracies[name] = _policy_accuracy(held_out, policy)
        if policy.form == "gated_lora":
            satisfactions[name] = _policy_satisfaction(held_out, bank, policy)
    satisfactions["pairs in the prompt"] = _in_prompt(held_out, bank)
    satisfactions["static"] = bank.under(lambda at, count: None)
    satisfactions["random configuration"] = bank.random_satisfaction()
    favourite = bank.best_for_all()
    satisfactions["everybody's favourite"] = bank.under(lambda at, count: favourite)
    satisfactions["nearest configuration"] = bank.under(bank.nearest)
    satisfactions["oracle"] = bank.under(lambda at, count: bank.best(at))
    return _write(held_out, accuracies, satisfactions, _costs(held_out))


# ---------------------------------------------------------------- methods


def _inferred_accuracy(
    held_out: HeldOutUsers, candidates: Candidates, chosen: Sequence[Floats], targets: Sequence[Floats]
) -> Floats:
    """Accuracy on each user's target pairs, predicted from the margins of their choices."""
    return held_out.table_of(lambda at, count: _share(candidates.predict(chosen[at][:count], targets[at])))


def _inferred_satisfaction(bank: AnswerBank, candidates: Candidates, chosen: Sequence[Floats]) -> Floats:
    """Satisfaction under the configuration inferred from each user's choices."""
    return bank.under(lambda at, count: candidates.belief(chosen[at][:count]).configuration)


def _share(margins: Floats) -> float:
    return float(np.mean(margins > 0) + 0.5 * np.mean(margins == 0))


def _margins_of_asked(held_out: HeldOutUsers, candidates: Candidates, user: User, values: Floats) -> Floats:
    """Margins of a user's choices, each on the most informative question after those before, [count, directives]."""
    population = held_out.steering.held_out_population
    liked = population.utilities(user.taste)
    avoided = {population.answers[at].prompt_id for at in user.targets.flatten()}
    inside = np.array([answer.prompt_id not in avoided for answer in population.answers])
    pool = population.pairs[inside[population.pairs].all(axis=1)]
    rng = np.random.default_rng(0)
    pool = pool[rng.permutation(len(pool))[:NUM_QUESTIONS]]
    offered = values[pool[:, 0]] - values[pool[:, 1]]
    margins: list[Floats] = []
    for _ in range(max(held_out.counts)):
        best = int(np.argmax(candidates.information_gain(np.array(margins), offered)))
        first, second = pool[best]
        takes_first = (liked[first] > liked[second]) != (rng.random() < user.taste.noise)
        margins.append(offered[best] if takes_first else -offered[best])
        pool, offered = np.delete(pool, best, axis=0), np.delete(offered, best, axis=0)
    return np.array(margins)


def pairs_in_prompt(choices: Sequence[tuple[Answer, Answer]]) -> str:
    """A system prompt that shows (chosen, rejected) pairs: the baseline that needs no training."""
    shown = [f"{liked.prompt}\nLiked: {liked.text}\nNot liked: {other.text}" for liked, other in choices]
    return "\n\n".join([PROMPT_HEAD, *shown])


def _in_prompt(held_out: HeldOutUsers, bank: AnswerBank) -> Floats:
    """Satisfaction where the policy is shown the pairs themselves; NaN where they do not fit."""
    answers, planned = held_out.steering.held_out_population.answers, {}
    for at, user in enumerate(held_out.users):
        prompt = bank.tested_prompts(at)[0]
        for count in held_out.counts:
            pairs = [(answers[chosen], answers[rejected]) for chosen, rejected in user.context[:count]]
            system = pairs_in_prompt(pairs)
            planned[at, count] = [planned_answer(system, prompt, sample) for sample in range(PROMPT_SAMPLES)]
    return held_out.liking_by_count(planned)


@torch.no_grad()
def _policy_accuracy(held_out: HeldOutUsers, policy: ConditionalPolicy) -> Floats:
    """Accuracy of the implicit rewards of a conditional policy."""
    tokens = held_out.steering.answer_tokens(held_out.steering.held_out_population.answers)
    pairs = held_out.tensors.targets[:POLICY_USERS, :POLICY_PAIRS]
    places = sorted(set(pairs.flatten().tolist()))
    reference = torch.zeros(len(tokens))
    reference[places] = policy.reference([tokens[at] for at in places])

    with progress("steer policy", len(pairs) * len(held_out.counts), "predictions") as advance:

        def value(at: int, count: int) -> float:
            context = held_out.tensors.tasks(slice(at, at + 1), count).context
            rewards = policy.rewards(context, [pairs[at].flatten().tolist()], tokens, reference).double()
            advance(1, policy.form)
            chosen, rejected = rewards.view(-1, 2).numpy().T
            return _share(chosen - rejected)

        return held_out.table_of(value, len(pairs))


@torch.no_grad()
def _policy_satisfaction(held_out: HeldOutUsers, bank: AnswerBank, policy: ConditionalPolicy) -> Floats:
    """Satisfaction with vLLM's answers under the users' own adapters."""
    folder = held_out.steering.folder / "adapters"
    weights = content_id(*(float(tensor.double().sum()) for tensor in policy.own_state().values()))
    planned = {}
    for at in range(len(held_out.users))[:POLICY_USERS]:
        for count in held_out.counts:
            z = policy.encoder(held_out.tensors.tasks(slice(at, at + 1), count).context)[0]
            name = f"user-{content_id(weights, z.tolist())}"
            policy.fold(z, folder / name, held_out.steering.policy.path)
            planned[at, count] = [
                planned_answer(name, prompt, 0) for prompt in bank.tested_prompts(at)[:POLICY_PROMPTS]
            ]
    return held_out.liking_by_count(planned, AdapterActor, folder=folder, rank=RANK)


def _costs(held_out: HeldOutUsers) -> dict[str, dict[str, int]]:
    """Per method, after all choices: policy tokens per user once, more of them per answer, bytes kept per user."""
    steering, answers = held_out.steering, held_out.steering.held_out_population.answers
    size, best_of, count = steering.config.size, steering.config.best_of, max(held_out.counts)
    tokens = steering.answer_tokens(answers)
    whole = float(np.mean([len(ids) for ids, _ in tokens]))
    own = float(np.mean([len(ids) - start for ids, start in tokens]))
    tokenizer = AutoTokenizer.from_pretrained(steering.policy.path)
    directives = [len(tokenizer(directive)["input_ids"]) for directive in steering.candidates.directives]
    directive = float(np.mean(directives))
    shown = [[answers[at] for at in user.context.flatten()] for user in held_out.users]
    chars = float(np.mean([sum(len(answer.text) + len(answer.prompt) / 2 for answer in pairs) for pairs in shown]))
    choices, margins = 2 * count * whole, 8 * count * len(directives)
    costs: dict[str, tuple[float, float, float]] = {
        "NP-BTL, best of n": (choices, (best_of - 1) * own + best_of * whole, 4 * size),
        "inferred directive": (choices * len(directives), directive, margins),
        "inferred directive, asked": (0, directive, margins),
        "pairs in the prompt": (0, choices, chars),
    } | {f"NP-DPO {policy.form}": (choices, 0, 4 * size) for policy in held_out.fitted.policies}
    names = ("tokens_once", "tokens_per_answer", "bytes")
    return {method: dict(zip(names, map(round, parts), strict=True)) for method, parts in costs.items()}


# ---------------------------------------------------------------- results


def _write(
    held_out: HeldOutUsers,
    accuracies: dict[str, Floats],
    satisfactions: dict[str, Floats],
    costs: dict[str, dict[str, int]],
) -> dict[str, Any]:
    """Means with intervals, saved and printed."""
    groups = {
        "per_kind": np.array([user.taste.kind + ", flipped" * user.taste.flipped for user in held_out.users]),
        "per_rubric": np.array(["+".join(sorted(user.taste.liked_scores)) for user in held_out.users]),
    }
    steering, rng = held_out.steering, np.random.default_rng(held_out.steering.plan.config.seed)
    results: dict[str, Any] = {"counts": held_out.counts, "num_users": len(held_out.users), "costs": costs}
    results["policy"] = steering.policy.identity
    for metric, methods in (("accuracy", accuracies), ("satisfaction", satisfactions)):
        results[metric] = {}
        for name, values in methods.items():
            entry: dict[str, Any] = {"mean": _means(values), "ci": _interval(values, rng)}
            for title, group in groups.items():
                entry[title] = {str(member): _means(values[group == member]) for member in np.unique(group)}
            if metric == "satisfaction":  # own context less the flipped one's, for a twin likes what its user dislikes
                entry["steer_gap"] = [None if mean is None else 2 * mean - 1 for mean in entry["mean"]]
                entry["steer_gap_ci"] = [ends and [2 * end - 1 for end in ends] for ends in entry["ci"]]
            results[metric][name] = entry
    written = steering.run.write_json(STEERING_RESULTS_FILE, results)
    say("\n".join(table_lines(results)))
    say(f"results      {written}")
    used = ["questions"] * (steering.shards is not None)
    used += ["serve.preferences=gated_lora"] * ("gated_lora" in steering.config.forms)
    if used:
        say(f"for serving  {', '.join(used)}: from the next start of `cpt serve` on")
    return results


def _means(values: Floats) -> list[float | None]:
    """Per count, over users and seeds."""
    return [None if np.isnan(part).all() else float(np.nanmean(part)) for part in values.transpose(1, 0, 2)]


def _interval(values: Floats, rng: np.random.Generator) -> list[list[float] | None]:
    """95% per count: users and seeds are drawn again, each with replacement; a user and its twin go together."""
    twins = values.reshape(len(values) // 2, 2, *values.shape[1:])
    twins = twins[~np.isnan(twins).all(axis=(1, 2, 3))]
    if not len(twins):
        return [None] * values.shape[1]
    means = []
    for _ in range(RESAMPLES):
        drawn = twins[rng.integers(len(twins), size=len(twins))]
        drawn = drawn[..., rng.integers(values.shape[2], size=values.shape[2])]
        means.append(np.nanmean(drawn, axis=(0, 1, 3)))
    ends = np.percentile(means, [2.5, 97.5], axis=0).T
    return [None if np.isnan(pair).any() else pair.tolist() for pair in ends]
