"""Simulated users and directive inference: logic, with a policy whose log-probabilities are known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cpt_ray.config import RunConfig
from cpt_ray.errors import UserError
from cpt_ray.rubrics.catalog import Catalog
from cpt_ray.steering.answers import Answer, make_answer
from cpt_ray.steering.choices import Choice, PreferenceState, Question, parse_choices
from cpt_ray.steering.inference import Candidates, make_candidates
from cpt_ray.steering.stage import read_choices
from cpt_ray.steering.users import KINDS, Population, draw_taste
from cpt_ray.tables.records import Directive
from tests.builders import LEVELS, make_directives, make_rubric

RUBRICS = [make_rubric(), make_rubric(id="mood", title="Mood")]
ANCHORS = np.array([10.0, 50.0, 90.0])


def catalog() -> Catalog:
    directives = make_directives()
    moods = [
        Directive(
            directive_id=f"mood-{one.directive_id}",
            rubric_id="mood",
            level=one.level,
            text=f"Mood: {one.text}",
            split="train",
            source="rubric",
        )
        for one in directives
    ]
    return Catalog.build(RUBRICS, [one for one in directives if one.rubric_id == "ornament"] + moods)


class KnownPolicy:
    """Finds an answer "orn mood" (two scores) the likelier, the nearer a directive's level is to it."""

    def __init__(self) -> None:
        self.asked = 0

    def logprobs(self, asked: Sequence[tuple[str | None, str, str]]) -> list[float]:
        self.asked += len(asked)
        return [self._logprob(directive, answer) for directive, _, answer in asked]

    def _logprob(self, directive: str | None, answer: str) -> float:
        assert directive is not None
        level = next(at for at, name in enumerate(LEVELS) if f" {name} " in directive)
        score = float(answer.split()[1 if directive.startswith("Mood") else 0])
        return -30.0 - abs(score - ANCHORS[level])


def answers(num_prompts: int = 20) -> list[Answer]:
    return [
        make_answer(f"p{at}", f"Write p{at}.", f"{one:g} {other:g}", {"ornament": one, "mood": other})
        for at in range(num_prompts)
        for one in (10.0, 30.0, 50.0, 70.0, 90.0)
        for other in (10.0, 50.0, 90.0)
    ]


def candidates(**changes: object) -> Candidates:
    return Candidates(catalog(), beta=0.1, **changes)  # type: ignore[arg-type]


def choose(count: int, liked: float = 90, disliked: float = 10) -> list[Choice]:
    """Choices of someone who likes one ornament, whatever the mood."""
    moods = (10, 50, 90)
    return [
        Choice(prompt=f"p{at}", chosen=f"{liked:g} {moods[at % 3]}", rejected=f"{disliked:g} {moods[(at // 3) % 3]}")
        for at in range(count)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_context_and_targets_are_disjoint_by_prompt_and_mostly_conflicting(kind: str) -> None:
    crowd = Population(answers(), RUBRICS, seed=0)
    rng = np.random.default_rng(0)
    conflicting = {tuple(pair) for pair in crowd.pairs[crowd.conflicting]}
    conflicting |= {(other, one) for one, other in conflicting}
    for _ in range(20):
        user = crowd.user(rng, draw_taste(rng, RUBRICS, kind), 8, 20, conflicting=0.8)
        prompts = [{crowd.answers[at].prompt_id for at in part.flatten()} for part in (user.context, user.targets)]
        assert not prompts[0] & prompts[1]
        for part in (user.context, user.targets):
            assert np.mean([tuple(pair) in conflicting for pair in part]) >= 0.75
        liked = crowd.utilities(user.taste)[user.targets]
        assert (liked[:, 0] > liked[:, 1]).all()


def test_a_twin_chooses_the_other_way_everywhere() -> None:
    crowd = Population(answers(), RUBRICS, seed=0)
    rng = np.random.default_rng(0)
    user = crowd.user(rng, draw_taste(rng, RUBRICS, "mixture"), 8, 20, conflicting=0.8)
    twin = user.twin()
    assert (twin.targets == user.targets[:, ::-1]).all()
    assert (twin.context == user.context[:, ::-1]).all()
    liked = crowd.utilities(twin.taste)[twin.targets]
    assert (liked[:, 0] > liked[:, 1]).all()


def test_noisy_users_err_in_the_context_only_and_as_often_as_said() -> None:
    crowd = Population(answers(), RUBRICS, seed=0)
    rng = np.random.default_rng(0)
    wrong = []
    for _ in range(50):
        user = crowd.user(rng, draw_taste(rng, RUBRICS, "noisy"), 10, 5, conflicting=0.8)
        liked = crowd.utilities(user.taste)
        wrong.append(np.mean(liked[user.context[:, 0]] < liked[user.context[:, 1]]))
        assert (liked[user.targets[:, 0]] > liked[user.targets[:, 1]]).all()
    assert np.mean(wrong) == pytest.approx(0.2, abs=0.05)


def test_users_need_answers_that_differ() -> None:
    with pytest.raises(UserError, match="two prompts"):
        Population(answers(1)[:1], RUBRICS, seed=0)


@pytest.mark.parametrize(("liked", "disliked", "level"), [(90, 10, "high"), (10, 90, "low")])
def test_a_taste_is_known_after_a_few_choices(liked: float, disliked: float, level: str) -> None:
    one, state = candidates(), PreferenceState()
    beliefs = [one.belief(state.margins)]
    for choice in choose(6, liked, disliked):
        one.add(state, [choice], KnownPolicy())
        beliefs.append(one.belief(state.margins))
    assert beliefs[0].configuration is None
    assert beliefs[0].directive is None
    assert beliefs[-1].configuration == {"ornament": level}
    assert beliefs[-1].directive == catalog().resolve({"ornament": level}).directive
    masses = [belief.probabilities["ornament"][level] for belief in beliefs]
    assert masses[-1] > 0.5 > masses[1] > masses[0]


def test_a_taste_for_the_middle_is_found() -> None:
    middle = [Choice(prompt=f"p{at}", chosen="50 50", rejected=f"{(10, 90)[at % 2]} 50") for at in range(8)]
    one, state = candidates(), PreferenceState()
    one.add(state, middle, KnownPolicy())
    assert one.belief(state.margins).configuration == {"ornament": "mid"}


def test_two_rubrics_are_combined() -> None:
    both = [Choice(prompt=f"p{at}", chosen="90 10", rejected=("10 10", "90 90")[at % 2]) for at in range(12)]
    one, state = candidates(), PreferenceState()
    one.add(state, both, KnownPolicy())
    assert one.belief(state.margins).configuration == {"ornament": "high", "mood": "low"}


def test_contradictory_choices_leave_it_unknown() -> None:
    one, state = candidates(), PreferenceState()
    one.add(state, [*choose(10), *choose(10, 10, 90)], KnownPolicy())
    assert one.belief(state.margins).configuration is None


def test_one_choice_more_or_less_can_only_move_the_odds_so_far() -> None:
    one, state = candidates(lapse=0.1), PreferenceState()
    one.add(state, choose(5), KnownPolicy())
    margins = np.array(state.margins)
    hostile = np.vstack([margins, -1e6 * np.sign(margins[:1])])
    before, after = one.posterior(margins), one.posterior(hostile)
    shift = np.abs((np.log(after) - np.log(before)) - (np.log(after) - np.log(before))[0])
    assert shift.max() <= np.log(0.95 / 0.05) + 1e-9


def test_a_prior_is_followed_while_nothing_is_known() -> None:
    fond = candidates(prior={"mood": 9.0}).belief([]).probabilities
    assert sum(fond["mood"].values()) > 2 * sum(fond["ornament"].values())


def test_a_prior_about_an_unknown_rubric_is_refused_with_the_nearest_name() -> None:
    data = {
        "name": "a",
        "rubrics": ["a"],
        "prompts": {"source": "a"},
        "writer": {"model": "a"},
        "policy": {"model": "a"},
    }
    config = RunConfig.model_validate(data | {"steer": {"prior": {"moods": 2}}})
    with pytest.raises(UserError, match=r"steer.prior: no rubric 'moods' .did you mean .mood."):
        make_candidates(config, candidates().catalog, config.policy)


def test_the_next_question_is_the_one_that_says_most() -> None:
    one = candidates()
    rows = one.score(KnownPolicy(), [*choose(1), Choice(prompt="same", chosen="50 50", rejected="50 50")])
    clear, dull = (
        Question(prompt=prompt, first="a", second="b", margins=tuple(margins))
        for prompt, margins in zip(("clear", "same"), rows, strict=True)
    )
    state = PreferenceState()
    assert one.next_question(state, [dull, clear]) is clear
    gains = one.information_gain(np.zeros((0, 6)), rows)
    assert gains[0] > 0.01 > abs(gains[1])
    state.choices.append(Choice(prompt="clear", chosen="a", rejected="b"))
    state.margins.append(clear.margins)
    assert one.next_question(state, [dull, clear]) is dull
    assert one.next_question(state, [clear]) is None


def test_answers_to_known_questions_cost_nothing_and_twice_the_same_answer_is_scored_once() -> None:
    one, policy, state = candidates(), KnownPolicy(), PreferenceState()
    question = Question(prompt="p", first="90 50", second="10 50", margins=(-8, 0, 8, 0, 0, 0))
    one.add(state, [Choice(prompt="p", chosen="10 50", rejected="90 50")], policy, [question])
    assert policy.asked == 0
    assert state.margins == [(8, 0, -8, 0, 0, 0)]
    one.add(state, [Choice(prompt="q", chosen="90 50", rejected=text) for text in ("10 50", "50 50")], policy)
    assert policy.asked == 3 * 6


def test_a_state_survives_json_and_is_scored_again_for_another_policy() -> None:
    one, policy, state = candidates(policy="a"), KnownPolicy(), PreferenceState()
    one.add(state, choose(4), policy)
    back = PreferenceState.from_json(json.loads(json.dumps(state.to_json())))
    assert back == state
    assert one.belief(back.margins) == one.belief(state.margins)
    json.dumps(one.belief(back.margins).to_json())
    other = candidates(policy="b")
    before = policy.asked
    other.add(back, choose(5)[4:], policy)
    assert policy.asked > before
    assert len(back.margins) == len(back.choices) == 5
    twice = {name: state.to_json()[name] * 2 for name in ("choices", "margins")}  # as earlier versions kept them
    assert PreferenceState.from_json({**twice, "key": state.key}) == state
    with pytest.raises(UserError, match="not a saved state"):
        PreferenceState.from_json({"choices": [], "margins": [[1.0]], "key": ""})
    with pytest.raises(UserError, match="not a saved state"):
        PreferenceState.from_json([1])


GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def test_choices_are_parsed() -> None:
    assert parse_choices([GOOD] * 64) == [Choice(**GOOD)] * 64


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        {},
        GOOD,
        [],
        [GOOD] * 65,
        [None],
        [[]],
        [{"prompt": "p"}],
        [GOOD | {"more": 1}],
        [GOOD | {"chosen": 1}],
        [GOOD | {"chosen": ""}],
        [GOOD | {"prompt": " \n"}],
        [GOOD | {"chosen": "b"}],
        [GOOD | {"rejected": "x" * 20_001}],
        [GOOD | {"prompt": "half a character: \ud83d"}],
        [GOOD, GOOD | {"chosen": {"$ne": 1}}],
    ],
)
def test_whatever_is_no_list_of_choices_is_refused_in_one_short_line(wrong: object) -> None:
    with pytest.raises(UserError, match=r"^choices") as caught:
        parse_choices(wrong)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 200


def test_random_choices_seldom_become_a_setting() -> None:
    """Choices by the toss of a coin: nothing is set for most, where consistent ones are all known."""
    one, rng, known = candidates(), np.random.default_rng(0), []
    for _ in range(40):
        tossed = [choice if rng.random() < 0.5 else choice.swapped() for choice in choose(10)]
        state = PreferenceState()
        one.add(state, tossed, KnownPolicy())
        known.append(one.belief(state.margins).configuration is not None)
    assert np.mean(known) < 0.4


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "choices.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n{"prompt": }\n')
    with pytest.raises(UserError, match=r"choices.jsonl:3: not JSON"):
        read_choices(tmp_path / "choices.jsonl")
