"""Hashes of how conversations are laid out: of what is rendered for a made-up rubric, prompt and answer.

Ids and shards' names depend on them, so that no answer is used again that was written, graded or paired in other words,
whatever code those words come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cpt_ray.chat import conversations
from cpt_ray.rubrics.catalog import compose_directives
from cpt_ray.rubrics.rubric import Rubric
from cpt_ray.tables.records import content_id


def _rubric(title: str) -> Rubric:
    names = ("dim", "dusky", "bright")
    levels = [{"name": name, "score": score} for name, score in zip(names, (5, 47.5, 95), strict=True)]
    criteria: list[dict[str, Any]] = [
        {"name": name, "weight": weight, "descriptors": {level: f"{title} {level} {name}." for level in names}}
        for name, weight in (("lamps", 62.5), ("shutters", 37.5))
    ]
    criteria[1]["measure"] = {"name": "exclamation_density", "values": dict(zip(names, (0, 0.5, 1), strict=True))}
    probe = {"id": title.lower(), "version": 1, "title": title, "objective": f"How {title} it is."}
    return Rubric.model_validate(
        probe | {"principles": ["Look up.", "Squint."], "levels": levels, "criteria": criteria}
    )


_RUBRIC, _OTHER = _rubric("Violet"), _rubric("Amber")
_LEVEL, _CRITERION = _RUBRIC.levels[1], _RUBRIC.criteria[0]
_PROMPT, _ANSWER = "Which kettle sang?", "Seven copper owls."
_DIRECTIVES = ["Hum a little.", "Keep the lanterns low."]
_CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": _PROMPT}]
# Looked up in the module at each call, so that a test can patch a function and see its hash change.
PROBES: dict[str, Callable[[], Any]] = {
    "write": lambda: conversations.writer_messages(_RUBRIC, _LEVEL, _PROMPT),
    "write jointly": lambda: conversations.joint_writer_messages(
        [(_RUBRIC, _LEVEL), (_OTHER, _OTHER.levels[0])], _PROMPT
    ),
    "direct": lambda: conversations.director_messages(_RUBRIC, _LEVEL),
    "logprobs": lambda: (
        conversations.judge_messages(_RUBRIC, _CRITERION, _PROMPT, _ANSWER),
        conversations.level_labels(_RUBRIC),
    ),
    "rationale": lambda: (
        conversations.rationale_messages(_RUBRIC, _PROMPT, _ANSWER),
        conversations.rationale_schema(_RUBRIC),
    ),
    "policy": lambda: [
        conversations.policy_messages(directive, messages)
        for directive in (None, _DIRECTIVES[0], compose_directives(_DIRECTIVES))
        for messages in (_PROMPT, _CHAT)
    ],
}
"""Renders a conversation of each kind; the judge's two kinds have the names of its modes."""


def layout_hash(probe: str) -> str:
    """Changes with any word of such a conversation that is not the rubric's, the prompt's or the answer's."""
    return content_id(PROBES[probe]())
