"""Runs of words that a text shares with any of many others.

The first words of every n-gram are hashed to 64 bits; a hash that is met is checked against the words.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

SHORTEST = 8  # words; fewer are a common phrase, and no n-gram (the least of GPT-3's appendix C)
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Run(NamedTuple):
    """Words that a text and a segment share."""

    text: int
    first: int
    """Its first word in the text."""
    length: int
    segment: int
    share: float
    """Of the segment's words; 1: the whole segment stands in the text."""


@dataclass(frozen=True, eq=False)
class Ngrams:
    """The n-grams of segments, which are lists of words. A segment shorter than ``n`` is one n-gram."""

    n: int
    vocabulary: dict[str, int]
    tokens: Any
    """Numbers of the words of all segments, one after the other."""
    bounds: Any
    """Where in ``tokens`` each segment begins, and the end."""
    hashes: Any
    places: Any
    """Sorted hashes of the first words of each n-gram, and where in ``tokens`` it begins."""

    @staticmethod
    def build(segments: Sequence[Sequence[str]], n: int) -> Ngrams:
        """Index ``segments``, each of at least ``min(n, SHORTEST)`` words."""
        vocabulary: dict[str, int] = {}
        tokens = [vocabulary.setdefault(word, len(vocabulary)) for words in segments for word in words]
        ids = np.array(tokens, np.int32)
        bounds = np.cumsum([0, *map(len, segments)])
        hashes, _ = _hashes(ids, min(n, SHORTEST))
        places = [np.arange(start, max(start, end - n) + 1) for start, end in pairwise(bounds.tolist())]
        at = np.concatenate([*places, np.zeros(0, np.int64)]).astype(np.int64)
        order = np.argsort(hashes[at], kind="stable")
        return Ngrams(n, vocabulary, ids, bounds, hashes[at][order], at[order])

    def runs(self, texts: Sequence[Sequence[str]]) -> Iterator[Run]:
        """Every run of at least ``n`` words, or of a whole shorter segment, in the order of the texts."""
        get = self.vocabulary.get
        # -1 is a word of no segment, and stands between two texts.
        ids = np.array([i for words in texts for i in (*(get(word, -1) for word in words), -1)], np.int32)
        begins = np.cumsum([0, *(len(words) + 1 for words in texts)])
        hashes, known = _hashes(ids, min(self.n, SHORTEST))
        low = np.searchsorted(self.hashes, hashes, "left")
        high = np.searchsorted(self.hashes, hashes, "right")
        covered: dict[tuple[int, int], int] = {}  # (segment, shift against it): where its last run ended
        for at in np.flatnonzero((high > low) & known).tolist():
            for place in self.places[low[at] : high[at]].tolist():
                segment = int(np.searchsorted(self.bounds, place, "right")) - 1
                start, end = self.bounds[segment : segment + 2].tolist()
                if covered.get((segment, at - place), -1) > at:
                    continue
                length = _same(ids[at : at + end - place], self.tokens[place:end])
                if length >= min(self.n, end - start):
                    covered[segment, at - place] = at + length
                    text = int(np.searchsorted(begins, at, "right")) - 1
                    yield Run(text, at - int(begins[text]), length, segment, length / (end - start))


def _hashes(ids: Any, width: int) -> tuple[Any, Any]:
    """64-bit hash of the ``width`` words from each place on, and whether all of them are known words."""
    count = max(0, len(ids) - width + 1)
    hashes, known = np.zeros(count, np.uint64), np.ones(count, bool)
    for i in range(width):
        window = ids[i : i + count]
        known &= window >= 0
        hashes = hashes * _MULTIPLIER + window.astype(np.uint64)
    return hashes, known


def _same(left: Any, right: Any) -> int:
    """How many words are the same from the beginning on."""
    length = min(len(left), len(right))
    differ = np.flatnonzero(left[:length] != right[:length])
    return int(differ[0]) if len(differ) else length
