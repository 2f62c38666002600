"""Shards' names: what is written is read, and a new hash keeps the rest."""

from __future__ import annotations

import pytest

from cpt_ray.tables.records import content_id
from cpt_ray.tables.shard import ShardName

HASH = "0123456789ab"
NAMES = {
    f"00042-{HASH}": ShardName("", 42, "", HASH),
    f"control-00042-{HASH}": ShardName("control", 42, "", HASH),
    f"ornament-{HASH}": ShardName("ornament", None, "", HASH),
    f"two-words-2-123456-tuned-{HASH}": ShardName("two-words-2", 123456, "tuned", HASH),
    f"{HASH}-{HASH}": ShardName(HASH, None, "", HASH),
}


@pytest.mark.parametrize(("text", "name"), NAMES.items(), ids=str)
def test_a_name_is_read_as_it_is_written(text: str, name: ShardName) -> None:
    assert ShardName.parse(text) == name
    assert str(name) == text


@pytest.mark.parametrize("label", ["a-00012", "a-000012", "a-00012-b", "control"])
@pytest.mark.parametrize("number", [None, 7, 1234567])
def test_whatever_a_rubric_is_called_its_shards_names_come_back(label: str, number: int | None) -> None:
    name = ShardName(label, number).keyed(content_id(label))
    assert str(ShardName.parse(name)) == name


@pytest.mark.parametrize("text", ["", "first", "ornament-0", f"{HASH}-", f"ornament-00042{HASH}"])
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not the name of a shard"):
        ShardName.parse(text)


def test_what_is_made_of_a_shard_differs_in_the_hash_alone() -> None:
    name = ShardName.parse(f"control-00042-{HASH}")
    made = [ShardName.parse(text) for text in (name.made_of("judge", 1), name.made_of("judge", 2))]
    assert {(one.label, one.number, one.is_control) for one in made} == {("control", 42, True)}
    assert len({HASH, *(one.digest for one in made)}) == 3
