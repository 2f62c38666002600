"""Near-duplicate texts, by MinHash of their words and numbers (characters, in scripts without spaces)."""

from __future__ import annotations

from cpt_ray.rubrics.measures import terms_of

NUM_PERMUTATIONS, NUM_BANDS = 128, 32
SHINGLE_WORDS = 3


def _shingles(text: str) -> list[str]:
    terms = terms_of(text)
    return [" ".join(terms[at : at + SHINGLE_WORDS]) for at in range(max(1, len(terms) - SHINGLE_WORDS + 1))]


class NearDuplicates:
    """Texts by name, each compared with those that came before."""

    def __init__(self, threshold: float):
        """`threshold`: least estimated Jaccard similarity of two texts' word triples that makes them the same."""
        from rensa import RMinHashLSH

        self._threshold = threshold
        self._index = RMinHashLSH(threshold=threshold, num_perm=NUM_PERMUTATIONS, num_bands=NUM_BANDS)
        self._names: list[str] = []
        self._hashes: list[object] = []

    def add(self, name: str, text: str) -> str:
        """The name of the first earlier text that this one nearly repeats, or "": then it is remembered."""
        from rensa import RMinHash

        sketch = RMinHash(num_perm=NUM_PERMUTATIONS, seed=0)
        sketch.update(_shingles(text))
        for at in sorted(self._index.query(sketch)):
            if sketch.jaccard(self._hashes[at]) >= self._threshold:
                return str(self._names[at])
        self._index.insert(len(self._names), sketch)
        self._names.append(name)
        self._hashes.append(sketch)
        return ""
