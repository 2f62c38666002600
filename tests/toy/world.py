"""The made-up world that the toy model knows: texts and directives, drawn from small grammars.

A text is a few sentences about the prompt's topic. Every sentence has one slot per rubric, filled from the
`words` (high) or the `against` (low) of that rubric's measure, so a text's level is what the measure says.
The lexicons and prompts are read from `rubrics/`; nothing in the loop reads this module.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from cpt_ray.rubrics.rubric import Criterion, Rubric

SENTENCES = 4
"""Slots per rubric in a usual text: with five levels, level k has k of four slots filled from `words`."""

_PROMPT = re.compile(r"Write about the (\w+) (.+)\.")

OPENINGS = (
    "{setting} the {ornament} {topic} feels {mood}.",
    "{setting} a {mood} wind crosses the {ornament} {topic}.",
    "{setting} the {mood} {topic} shows {ornament} {things}.",
)
MIDDLES = (
    "A {mood} {one} passes {ornament} {things}.",
    "The {ornament} {one} has a {mood} air.",
    "Here {mood} people touch the {ornament} {topic}.",
    "One {ornament} {one} makes the {topic} {mood}.",
    "Beyond the {ornament} {things} waits a {mood} {one}.",
)
ONES = ("bell", "bird", "child", "shadow", "dog", "cloud", "voice", "boat", "stranger", "flag", "lamp")
THINGS = ("walls", "windows", "stones", "doors", "roofs", "trees", "steps", "fences", "gates", "curtains")


@dataclass(frozen=True)
class Voice:
    """How directives speak of one rubric; shares no word with its lexicons, id or title."""

    low: tuple[str, ...]
    high: tuple[str, ...]
    nouns: tuple[str, ...]


VOICES = {
    "ornament": Voice(
        low=("simple", "basic", "everyday", "unadorned"),
        high=("fancy", "lavish", "decorated", "flowery"),
        nouns=("words", "terms", "phrases"),
    ),
    "mood": Voice(
        low=("sad", "dark", "grim", "unhappy"),
        high=("happy", "bright", "sunny", "cheery"),
        nouns=("feelings", "notes", "tones"),
    ),
}

ONLY = (
    ("{use} {only} {most} {noun}.", "{avoid} {any} {least} {noun}."),
    {
        "use": ("Use", "Choose", "Pick", "Take", "Employ"),
        "only": ("only", "nothing but", "purely", "exclusively"),
        "avoid": ("Avoid", "Skip", "Leave out", "Drop", "Never use"),
        "any": ("any", "all", "every kind of"),
    },
)
MOSTLY = (
    ("{use} {mostly} {most} {noun}.", "{allow} {few} {least} {noun}."),
    {
        "use": ("Use", "Choose", "Pick", "Take", "Employ"),
        "mostly": ("mostly", "mainly", "largely", "chiefly"),
        "allow": ("Allow", "Add", "Slip in", "Let in", "Include"),
        "few": ("a few", "some", "a handful of"),
    },
)
EVEN = (
    ("{mix} {most} and {least} {noun} {evenly}.", "{neither}."),
    {
        "mix": ("Mix", "Blend", "Combine", "Balance", "Alternate"),
        "evenly": ("evenly", "equally", "in equal parts", "half and half"),
        "neither": (
            "Let neither side lead",
            "Give both the same room",
            "Keep the two in step",
            "Favor neither of them",
        ),
    },
)


def _fill(rng: Random, template: str, choices: Mapping[str, Sequence[str]]) -> str:
    return template.format(**{slot: rng.choice(options) for slot, options in choices.items()})


def topic_and_setting(prompt: str) -> tuple[str, str]:
    """What a prompt of this world asks for, e.g. ("harbor", "at dawn")."""
    match = _PROMPT.fullmatch(prompt)
    assert match, f"no prompt of this world: {prompt!r}"
    return match[1], match[2]


def lexicon_of(rubric: Rubric) -> Criterion:
    """The measured criterion, whose `words` and `against` fill the rubric's slots."""
    return rubric.measured[0]


def interchangeable(rubrics: Sequence[Rubric]) -> list[tuple[str, ...]]:
    """Groups of words that the texts draw from evenly, whatever the context."""
    specs = [one.measure for one in map(lexicon_of, rubrics) if one.measure]
    return [ONES, THINGS, *(words for spec in specs for words in (spec.words, spec.against))]


def text(rng: Random, rubrics: Sequence[Rubric], prompt: str, highs: Mapping[str, Sequence[bool]]) -> str:
    """A text on the prompt; `highs` says per rubric id and sentence whether the slot is a high word."""
    topic, setting = topic_and_setting(prompt)
    words: dict[str, list[str]] = {}
    for rubric in rubrics:
        spec = lexicon_of(rubric).measure
        assert spec is not None
        words[rubric.id] = [rng.choice(spec.words if high else spec.against) for high in highs[rubric.id]]
    count = len(highs[rubrics[0].id])
    middles = [rng.choice(MIDDLES) for _ in range(count - 1)]
    sentences = []
    for number, template in enumerate([rng.choice(OPENINGS), *middles]):
        slots = {name: found[number] for name, found in words.items()}
        slots |= {"topic": topic, "setting": setting.capitalize()}
        sentences.append(template.format(**slots, one=rng.choice(ONES), things=rng.choice(THINGS)))
    return " ".join(sentences)


def highs_of_level(rng: Random, number: int) -> list[bool]:
    """Slots of a text of level `number` (1 to SENTENCES + 1): the high ones come first or last."""
    highs = [slot < number - 1 for slot in range(SENTENCES)]
    return highs if rng.random() < 0.5 else highs[::-1]


def level_text(rng: Random, rubrics: Sequence[Rubric], prompt: str, levels: Mapping[str, int]) -> str:
    """A text whose level number is as asked for the rubrics in `levels`, random for the others."""
    numbers = {one.id: levels.get(one.id) or rng.randint(1, len(one.levels)) for one in rubrics}
    return text(rng, rubrics, prompt, {name: highs_of_level(rng, number) for name, number in numbers.items()})


def noisy_text(rng: Random, rubrics: Sequence[Rubric], prompt: str) -> str:
    """A text of one to five sentences with independent slots: its shares need not be those of a level."""
    count = rng.randint(1, SENTENCES + 1)
    highs = {}
    for rubric in rubrics:
        share = rng.random()
        highs[rubric.id] = [rng.random() < share for _ in range(count)]
    return text(rng, rubrics, prompt, highs)


def directive(rng: Random, rubric_id: str, number: int) -> str:
    """One of some thousand paraphrases of (rubric, level number 1 to 5): two short sentences."""
    voice = VOICES[rubric_id]
    templates, choices = {1: ONLY, 2: MOSTLY, 3: EVEN, 4: MOSTLY, 5: ONLY}[number]
    flip = number > 3 or (number == 3 and rng.random() < 0.5)
    most, least = (voice.high, voice.low) if flip else (voice.low, voice.high)
    slots = {**choices, "most": most, "least": least, "noun": voice.nouns}
    sentences = [_fill(rng, one, slots) for one in templates]
    if rng.random() < 0.3:
        sentences.reverse()
    return " ".join(sentences)
