"""Questions that are like one of many, by their vectors and those of question and answer together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from qwen_ray.data.decontamination.embedders import Embedder
from qwen_ray.data.decontamination.wording import content, numbers

_ENOUGH = 3  # stems; with fewer a question is compared only with its answer
_LONGEST_QUESTION, _LONGEST_ANSWER = 80, 40  # words; a longer answer is an essay, and compared without


class Asked(NamedTuple):
    """A question and its answer; an empty one is not compared."""

    question: str
    answer: str

    @property
    def joined(self) -> str:
        """Both, where the answer is short enough to be one."""
        short = len(self.answer.split()) <= _LONGEST_ANSWER
        return f"{self.question} {self.answer}" if short else self.question


class Like(NamedTuple):
    """A question that is like an entry."""

    asked: int
    entry: int
    score: float


@dataclass(frozen=True, eq=False)
class Likeness:
    """The vectors of the entries that are searched for."""

    embedder: Embedder
    least: float
    matrix: Any
    """``[2 * width, entries]``: the question's vector above that of question and answer, weighted."""
    numbers: list[frozenset[str]]

    @staticmethod
    def build(entries: Sequence[Asked], embedder: Embedder, least: float) -> Likeness:
        """The likeness of a question to an entry is the mean of the two cosines, or the only one there is.

        Another question on the same subject has another answer, which lowers the mean.
        """
        from scipy.sparse import csr_matrix, issparse

        enough = _says_enough(entries)
        answered = np.array([bool(entry.answer) for entry in entries]) | ~enough
        share = 1 / (enough + answered.astype(np.float64))
        matrix = _vectors(embedder, entries, enough * share, answered * share).T
        if issparse(matrix):
            matrix = csr_matrix(matrix)  # by rows, or every product would turn it again
        return Likeness(embedder, least, matrix, [numbers(entry.question) for entry in entries])

    def search(self, asked: Sequence[Asked]) -> list[Like]:
        """Every pair of at least ``least``, the likest first."""
        from scipy.sparse import coo_matrix

        if not asked:
            return []
        table = coo_matrix(
            _vectors(self.embedder, asked, _says_enough(asked) * 1.0, np.ones(len(asked))) @ self.matrix
        )
        said = [numbers(one.question) for one in asked]
        at = np.flatnonzero(table.data >= self.least)
        pairs = zip(table.row[at].tolist(), table.col[at].tolist(), table.data[at].tolist(), strict=True)
        found = [Like(*pair) for pair in pairs if _may_agree(said[pair[0]], self.numbers[pair[1]])]
        return sorted(found, key=lambda like: (-like.score, like.asked, like.entry))


def questions_in(text: str) -> list[str]:
    """What of a turn may be its question: all of it unless it is long, and its last line."""
    both = dict.fromkeys([text, text.rstrip().rpartition("\n")[2]])
    return [one for one in both if one.strip() and len(one.split()) <= _LONGEST_QUESTION]


def _says_enough(asked: Sequence[Asked]) -> Any:
    return np.array([len(content(one.question)) >= _ENOUGH for one in asked])


def _vectors(embedder: Embedder, asked: Sequence[Asked], alone: Any, answered: Any) -> Any:
    """Rows of the question's vector and, right of it, that of question and answer, each times its weight."""
    from scipy.sparse import csr_matrix, diags_array, hstack, issparse

    left = embedder.embed([one.question for one in asked])
    right = embedder.embed([one.joined for one in asked])
    if issparse(left):
        return csr_matrix(
            hstack([diags_array(alone) @ left, diags_array(answered) @ right]), dtype=np.float32
        )
    return np.hstack([left * alone[:, None], right * answered[:, None]]).astype(np.float32)


def _may_agree(left: frozenset[str], right: frozenset[str]) -> bool:
    """With other numbers it is another problem of the same kind."""
    return left <= right or right <= left
