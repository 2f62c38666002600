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

from cpt_ray.console import say
from cpt_ray.steering.actors import AdapterActor
from cpt_ray.steering.answers import Answer
from cpt_ray.steering.arena import Arena, Bank, planned_answer
from cpt_ray.steering.fitting import reference_logps
from cpt_ray.steering.inference import Candidates
from cpt_ray.steering.policy import ConditionalPolicy
from cpt_ray.steering.stage import NUM_QUESTIONS, Steering, fit, policy_texts
from cpt_ray.steering.summary import table_lines
from cpt_ray.steering.users import Floats, Taste, User
from cpt_ray.tables.records import content_id
from cpt_ray.tables.rundir import STEERING_RESULTS

RESAMPLES = 1000
FORETOLD_USERS, POLICY_PAIRS = 100, 10
"""How many held-out users, and pairs of each, a conditional policy foretells: it is run for each of them."""
POLICY_USERS, POLICY_PROMPTS = 40, 4
"""How many held-out users, and prompts of each, it answers."""
PROMPT_HEAD = "The user compared pairs of answers. Answer in the way this user likes."


def pairs_in_prompt(choices: Sequence[tuple[Answer, Answer]]) -> str:
    """A system prompt that shows (chosen, rejected) pairs: the baseline that needs no training."""
    shown = [f"{one.prompt}\nLiked: {one.text}\nNot liked: {other.text}" for one, other in choices]
    return "\n\n".join([PROMPT_HEAD, *shown])


@contextlib.contextmanager
def _nothing_has_no_mean() -> Iterator[None]:
    """NaN without a warning, where a method was not tried or a user's rubric has no measure."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Mean of empty slice|All-NaN", RuntimeWarning)
        yield


@_nothing_has_no_mean()
def compare_rewards(steering: Steering) -> dict[str, Any]:
    """`fit`, then the reward models on held-out users; written and printed."""
    arena = Arena(steering, fit(steering))
    return _write(arena, arena.reward_accuracy(), {}, {})


@_nothing_has_no_mean()
def evaluate(steering: Steering) -> dict[str, Any]:
    """All methods; written and printed."""
    arena = Arena(steering, fit(steering))
    bank = Bank(arena)
    crowd, users = steering.held_out, arena.users
    accuracies, satisfactions = arena.reward_accuracy(), {"NP-BTL, best of n": bank.reranked()}
    logprobs = steering.logprobs(crowd.answers)
    candidates, name = steering.candidates, "inferred directive"
    values = candidates.values(logprobs)
    told = [values[one.context[:, 0]] - values[one.context[:, 1]] for one in users]
    others = [values[one.targets[:, 0]] - values[one.targets[:, 1]] for one in users]
    strangers = [told[at] for at in arena.others.tolist()]
    asked = [_interview(arena, candidates, one, values) for one in users]
    accuracies[name] = _foretold(arena, candidates, told, others)
    accuracies[f"{name}, another's choices"] = _foretold(arena, candidates, strangers, others)
    satisfactions[name] = _steered(bank, candidates, told)
    satisfactions[f"{name}, asked"] = _steered(bank, candidates, asked)
    for policy in arena.fitted.policies:
        name = f"NP-DPO {policy.form}"
        accuracies[name] = _policy_accuracy(arena, policy)
        if policy.form == "gated_lora":
            satisfactions[name] = _policy_satisfaction(arena, bank, policy)
    satisfactions["pairs in the prompt"] = _in_prompt(arena, bank)
    satisfactions["static"] = bank.under(lambda at, count: None)
    satisfactions["random configuration"] = bank.by_chance()
    favourite = bank.everybodys()
    satisfactions["everybody's favourite"] = bank.under(lambda at, count: favourite)
    satisfactions["nearest configuration"] = bank.under(bank.nearest)
    satisfactions["oracle"] = bank.under(lambda at, count: bank.best(at))
    return _write(arena, accuracies, satisfactions, _costs(arena))


def _costs(arena: Arena) -> dict[str, dict[str, int]]:
    """Per method, with all choices told: policy tokens per user once, more of them per answer, bytes kept per user."""
    steering, fitted = arena.steering, arena.fitted
    size, best_of, count = steering.config.size, steering.config.best_of, max(arena.counts)
    texts = policy_texts(steering, steering.held_out.answers)
    whole = float(np.mean([len(ids) for ids, _ in texts]))
    answer = float(np.mean([len(ids) - start for ids, start in texts]))
    tokenizer = AutoTokenizer.from_pretrained(steering.policy.path)
    told_what = [len(tokenizer(one)["input_ids"]) for one in steering.candidates.directives]
    directives, directive = len(told_what), float(np.mean(told_what))
    shown = [[steering.held_out.answers[at] for at in one.context.flatten()] for one in arena.users]
    kept = float(np.mean([sum(len(one.text) + len(one.prompt) / 2 for one in answers) for answers in shown]))
    told = 2 * count * whole
    found: dict[str, tuple[float, float, float]] = {
        "NP-BTL, best of n": (told, (best_of - 1) * answer + best_of * whole, 4 * size),
        "inferred directive": (told * directives, directive, 8 * count * directives),
        "inferred directive, asked": (0, directive, 8 * count * directives),
        "pairs in the prompt": (0, told, kept),
    } | {f"NP-DPO {one.form}": (told, 0, 4 * size) for one in fitted.policies}
    names = ("tokens_once", "tokens_per_answer", "bytes")
    return {name: {part: round(value) for part, value in zip(names, one, strict=True)} for name, one in found.items()}


def _foretold(arena: Arena, candidates: Candidates, told: Sequence[Floats], others: Sequence[Floats]) -> Floats:
    """Accuracy on the margins `others` after the margins `told`, per user."""
    return arena.filled(lambda at, count: _share(candidates.predict(told[at][:count], others[at])))


def _steered(bank: Bank, candidates: Candidates, told: Sequence[Floats]) -> Floats:
    """Satisfaction under what is inferred from the margins `told`."""
    return bank.under(lambda at, count: candidates.belief(told[at][:count]).configuration)


def _kind(taste: Taste) -> str:
    return f"{taste.kind}, flipped" if taste.flipped else taste.kind


def _share(margins: Floats) -> float:
    return float(np.mean(margins > 0) + 0.5 * np.mean(margins == 0))


def _interview(arena: Arena, candidates: Candidates, user: User, values: Floats) -> Floats:
    """Margins of the choices that the user makes when each question is the one that says most, [count, directives]."""
    crowd = arena.steering.held_out
    liked = crowd.utilities(user.taste)
    avoided = {crowd.answers[at].prompt_id for at in user.targets.flatten()}
    inside = np.array([one.prompt_id not in avoided for one in crowd.answers])
    pool = crowd.pairs[inside[crowd.pairs].all(axis=1)]
    rng = np.random.default_rng(0)
    pool = pool[rng.permutation(len(pool))[:NUM_QUESTIONS]]
    offered = values[pool[:, 0]] - values[pool[:, 1]]
    told: list[Floats] = []
    for _ in range(max(arena.counts)):
        gains = candidates.information_gain(np.array(told), offered)
        best = int(np.argmax(gains))
        first, second = pool[best]
        is_first = (liked[first] > liked[second]) != (rng.random() < user.taste.noise)
        told.append(offered[best] if is_first else -offered[best])
        pool, offered = np.delete(pool, best, axis=0), np.delete(offered, best, axis=0)
    return np.array(told)


def _in_prompt(arena: Arena, bank: Bank) -> Floats:
    """Satisfaction where the policy is shown the pairs themselves; NaN where they do not fit."""
    crowd, samples = arena.steering.held_out, range(2)
    planned = []
    for at, user in enumerate(arena.users):
        for count in arena.counts:
            pairs = [(crowd.answers[one], crowd.answers[other]) for one, other in user.context[:count].tolist()]
            prompt = bank.prompts[bank.tested[at][0]]
            planned += [planned_answer(pairs_in_prompt(pairs), prompt, sample) for sample in samples]
    rows = iter(arena.answered(planned))
    return arena.filled(
        lambda at, count: arena.liking(at, [one.text for one in (next(rows) for _ in samples) if one.text])
    )


@torch.no_grad()
def _policy_accuracy(arena: Arena, policy: ConditionalPolicy) -> Floats:
    """Implicit accuracy."""
    texts = policy_texts(arena.steering, arena.steering.held_out.answers)
    pairs = arena.tried.targets[:FORETOLD_USERS, :POLICY_PAIRS]
    places = sorted(set(pairs.flatten().tolist()))
    reference = torch.zeros(len(texts))
    reference[places] = reference_logps(policy, [texts[at] for at in places])

    def value(at: int, count: int) -> float:
        context = arena.tried.tasks(slice(at, at + 1), count).context
        rewards = policy.rewards(context, [pairs[at].flatten().tolist()], texts, reference).double()
        chosen, rejected = rewards.view(-1, 2).numpy().T
        return _share(chosen - rejected)

    return arena.filled(value, len(pairs))


@torch.no_grad()
def _policy_satisfaction(arena: Arena, bank: Bank, policy: ConditionalPolicy) -> Floats:
    """With answers under the users' own adapters, by vLLM."""
    steering = arena.steering
    folder = steering.run.path.absolute() / "steering" / "adapters"
    weights = content_id(*(float(one.double().sum()) for one in policy.own_state().values()))
    planned = []
    for at in range(len(arena.users))[:POLICY_USERS]:
        for count in arena.counts:
            z = policy.encoder(arena.tried.tasks(slice(at, at + 1), count).context)[0]
            name = f"user-{content_id(weights, z.tolist())}"
            policy.fold(z, folder / name, steering.policy.path)
            prompts = [bank.prompts[one] for one in bank.tested[at][:POLICY_PROMPTS]]
            planned += [planned_answer(name, one, 0) for one in prompts]
    made_of = {"folder": folder, "rank": policy.rank, "seed": steering.plan.config.seed}
    rows = iter(steering.table("steering_answers", planned, AdapterActor, steering.policy, **made_of))

    def value(at: int, count: int) -> float:
        return arena.liking(at, [next(rows).text for _ in bank.tested[at][:POLICY_PROMPTS]])

    return arena.filled(value, POLICY_USERS)


def _write(
    arena: Arena, accuracies: dict[str, Floats], satisfactions: dict[str, Floats], costs: dict[str, dict[str, int]]
) -> dict[str, Any]:
    """Means with intervals, saved and printed."""
    groups = {
        "per_kind": np.array([_kind(one.taste) for one in arena.users]),
        "per_rubric": np.array(["+".join(sorted(one.taste.targets)) for one in arena.users]),
    }
    rng = np.random.default_rng(arena.steering.plan.config.seed)
    results: dict[str, Any] = {"counts": arena.counts, "num_users": len(arena.users), "costs": costs}
    results["policy"] = arena.steering.policy.identity
    for metric, methods in (("accuracy", accuracies), ("satisfaction", satisfactions)):
        results[metric] = {}
        for name, values in methods.items():
            entry: dict[str, Any] = {"mean": _means(values), "ci": _interval(values, rng)}
            for title, group in groups.items():
                entry[title] = {str(one): _means(values[group == one]) for one in np.unique(group)}
            if metric == "satisfaction":  # own context less the flipped one's, for a twin likes what its user dislikes
                entry["steer_gap"] = [None if one is None else 2 * one - 1 for one in entry["mean"]]
                entry["steer_gap_ci"] = [one and [2 * end - 1 for end in one] for one in entry["ci"]]
            results[metric][name] = entry
    written = arena.steering.run.write_json(STEERING_RESULTS, results)
    say("\n".join(table_lines(results)))
    say(f"results      {written}")
    steering = arena.steering
    used = ["questions"] * (steering.shards is not None) + [f"serve.preferences={one}" for one in steering.config.forms]
    if used:
        say(f"for serving  {', '.join(used)}: from the next start of `cpt serve` on")
    return results


def _means(values: Floats) -> list[float | None]:
    """Per count, over users and seeds."""
    return [float(np.nanmean(one)) if not np.isnan(one).all() else None for one in values.transpose(1, 0, 2)]


def _interval(values: Floats, rng: np.random.Generator) -> list[list[float] | None]:
    """95% per count: users and seeds are drawn again, each with replacement; a user and its twin go together."""
    pairs = values.reshape(len(values) // 2, 2, *values.shape[1:])
    pairs = pairs[~np.isnan(pairs).all(axis=(1, 2, 3))]
    if not len(pairs):
        return [None] * values.shape[1]
    means = np.array(
        [
            np.nanmean(
                pairs[rng.integers(len(pairs), size=len(pairs))][
                    ..., rng.integers(values.shape[2], size=values.shape[2])
                ],
                axis=(0, 1, 3),
            )
            for _ in range(RESAMPLES)
        ]
    )
    ends = [np.percentile(one, [2.5, 97.5]) if not np.isnan(one).any() else None for one in means.T]
    return [None if one is None else one.tolist() for one in ends]
