"""Selection by hash: even, and the same whatever else there is."""

from __future__ import annotations

from collections import Counter

from cpt_ray.tables.by_hash import fraction, picked, shuffled
from cpt_ray.tables.records import content_id


def test_a_share_of_all_hashes_is_below_it() -> None:
    drawn = [fraction(content_id(at)) for at in range(2000)]
    assert min(drawn) >= 0.0
    assert max(drawn) < 1.0
    assert 0.27 < sum(one < 0.3 for one in drawn) / len(drawn) < 0.33
    assert (fraction("0"), fraction("8"), fraction("80")) == (0.0, 0.5, 0.5)


def test_each_choice_is_picked_about_as_often() -> None:
    counts = Counter(picked("abc", "cell", at) for at in range(3000))
    assert all(900 < counts[name] < 1100 for name in "abc")


def test_an_order_by_hash_is_kept_when_others_are_added() -> None:
    few, many = (shuffled(range(count), lambda at: ("salt", at)) for count in (10, 100))
    assert [at for at in many if at < 10] == few
    assert shuffled(range(10), lambda at: ("other salt", at)) != few != list(range(10))
