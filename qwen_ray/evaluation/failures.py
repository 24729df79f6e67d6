"""Which wrong answers to look at: few that stand for many."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MOST = 2000
"""Of more texts than these, as many are looked at, evenly spread: the work grows with their square."""

_WORD = re.compile(r"\w+")


def representatives(texts: Sequence[str], count: int) -> list[tuple[int, int]]:
    """At most ``count`` of ``texts`` that stand for all: ``(index, how many it stands for)``.

    Each in turn is the one that brings the others nearest to something chosen: facility location by greedy
    choice (Nemhauser, Wolsey and Fisher, Mathematical Programming 14:265, 1978). So the first is the most
    typical, and no two are alike while something else is left out. Near means the same words, rare ones
    counting more (cosine of TF-IDF). Deterministic: of equals the first in order.
    """
    places = _spread(len(texts))
    if not places or count < 1:
        return []
    near = _similarity([texts[i] for i in places])
    chosen: list[int] = []
    reached = np.zeros(len(places), dtype=near.dtype)
    for _ in range(min(count, len(places))):
        gain = np.maximum(near, reached).sum(axis=1)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        reached = np.maximum(reached, near[best])
    nearest = Counter(near[chosen].argmax(axis=0).tolist())
    return [(places[index], nearest[order]) for order, index in enumerate(chosen)]


def _spread(count: int) -> list[int]:
    """All places, or MOST of them at even distances."""
    if count <= MOST:
        return list(range(count))
    return [i * count // MOST for i in range(MOST)]


def _similarity(texts: Iterable[str]) -> Any:
    """Cosine of TF-IDF vectors, ``[n, n]`` float32; an empty text is like nothing but itself."""
    from scipy.sparse import csr_matrix

    counts = [Counter(_WORD.findall(text.lower())) for text in texts]
    frequency = Counter(word for words in counts for word in words)
    columns = {word: i for i, word in enumerate(frequency)}
    rarity = {word: np.log((1 + len(counts)) / (1 + n)) + 1 for word, n in frequency.items()}
    entries = [
        (row, columns[word], n * rarity[word])
        for row, words in enumerate(counts)
        for word, n in words.items()
    ]
    rows, places, values = zip(*entries, strict=True) if entries else ((), (), ())
    matrix = csr_matrix(
        (np.array(values, dtype=np.float32), (rows, places)), shape=(len(counts), max(1, len(columns)))
    )
    norms = np.sqrt(matrix.multiply(matrix).sum(axis=1)).A1
    near = (matrix @ matrix.T).toarray() / np.maximum(np.outer(norms, norms), 1e-12)
    np.fill_diagonal(near, 1.0)
    return near
