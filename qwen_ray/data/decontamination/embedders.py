"""Texts as vectors, for the search of questions that say the same in other words.

The embedded one needs no download. It is blind to synonyms; a neural one, where installed, is not.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from qwen_ray.data.decontamination.wording import content

_BUCKETS = 1 << 18  # of words; as many again for what words are spelled with
_SPELLING = 3  # characters
_WORD_SHARE = 0.6  # of the cosine; the rest is spelling, which a typo or an ending changes little


class Embedder(Protocol):
    """Turns texts into rows of unit length, so that ``a @ b.T`` is the cosine. Must pickle."""

    def embed(self, texts: Sequence[str]) -> Any:
        """A matrix of shape ``[len(texts), width]``, dense or sparse."""
        ...


class LexicalEmbedder:
    """TF-IDF of stems and of their character trigrams, hashed; each of the two has its share of the cosine.

    Rarity is counted in ``texts`` alone (the benchmark's), so every worker weighs alike whatever it reads.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        frequency = np.zeros(2 * _BUCKETS, np.float32)
        for text in texts:
            if stems := content(text):
                frequency[np.unique(np.concatenate([_buckets(stem) for stem in stems]))] += 1
        self._rarity = np.log((1 + len(texts)) / (1 + frequency)).astype(np.float32) + 1

    def embed(self, texts: Sequence[str]) -> Any:
        """A sparse matrix; the row of a text without content is zero."""
        from scipy.sparse import csr_matrix

        rows = [[_buckets(stem) for stem in content(text)] for text in texts]
        columns = np.concatenate([np.zeros(0, np.int32), *(part for row in rows for part in row)])
        starts = np.cumsum([0, *(sum(map(len, row)) for row in rows)])
        shape = (len(texts), 2 * _BUCKETS)
        matrix = csr_matrix((self._rarity[columns], columns, starts), shape=shape, dtype=np.float32)
        matrix.sum_duplicates()
        # One length for the stems of a text and one for their spelling: the halves keep their shares.
        spelling = matrix.indices >= _BUCKETS
        half = 2 * np.repeat(np.arange(len(texts)), np.diff(matrix.indptr)) + spelling
        square = np.bincount(half, matrix.data**2, minlength=2 * len(texts))
        share = np.where(spelling, 1 - _WORD_SHARE, _WORD_SHARE)
        matrix.data *= np.sqrt(share / square[half]).astype(np.float32)
        return matrix


@lru_cache(maxsize=1 << 16)
def _buckets(stem: str) -> Any:
    """The columns of a stem: its own, then those of its character n-grams."""
    padded = f"_{stem}_"
    grams = {padded[i : i + _SPELLING] for i in range(len(padded) - _SPELLING + 1)}
    columns = [zlib.crc32(stem.encode()) % _BUCKETS]
    columns += sorted(_BUCKETS + zlib.crc32(gram.encode()) % _BUCKETS for gram in grams)
    return np.array(columns, np.int32)


class NeuralEmbedder:
    """A sentence-transformers model by its name or folder."""

    def __init__(self, model: str) -> None:
        self.model = model
        self._encoder: Any = None

    def embed(self, texts: Sequence[str]) -> Any:
        """A dense ``float32`` matrix."""
        if self._encoder is None:
            from qwen_ray.embedder import Embedder as Loaded

            self._encoder = Loaded.load(self.model, where="decontaminate.embedder")
        return self._encoder.embed(texts)

    def __getstate__(self) -> dict[str, Any]:
        # Every worker loads the model itself: the pickle stays small.
        return {**self.__dict__, "_encoder": None}
