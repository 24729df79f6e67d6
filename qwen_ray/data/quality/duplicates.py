"""Exact repeats by key, near repeats by MinHash and locality-sensitive hashing.

Broder, "On the resemblance and containment of documents", 1997; Leskovec, Rajaraman and Ullman, "Mining of
Massive Datasets", chapter 3.

Records made by one template about different things share most of their words. They are no repeats: two
records are told apart by a name, a number or a piece of code that only one of them has, and by rare words.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

from qwen_ray.data.quality import turns
from qwen_ray.data.records import Record

HASHES = 64
RECALL = 0.99
"""Chance that two texts as similar as the threshold meet in a band."""
SHINGLE = 3  # words

_MASK = 2**64 - 1
_BUCKET = 64  # a larger one is divided by further hashes: memory and time stay linear
_MARGIN = 0.15  # of an estimate from 64 hashes: three standard deviations at 0.8
_CHUNK = 2**16  # pairs compared at once
_CACHED = 4096  # texts

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_NAME = re.compile(r"(?<=[\w,;:)”] )[A-Z]\w*(?:['’]\w+)*")  # a capital that starts no sentence
_CODE = re.compile(r"\d|[\\/<>={}\[\]|^~$#%@&_*+`]|\.\.")  # in a number, a path, an identifier, a formula

Signatures = np.ndarray[Any, np.dtype[np.uint32]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
Shares = np.ndarray[Any, np.dtype[np.float64]]


class Text(NamedTuple):
    """What two records are compared by."""

    question: str
    answer: str


class Pair(NamedTuple):
    """``repeat`` nearly repeats ``kept``. ``similarity``: the Jaccard index of their shingles."""

    repeat: int
    kept: int
    similarity: float


def keys(record: Record) -> tuple[bytes, bytes]:
    """Keys, 16 bytes each, of question and answer: the same for texts that :func:`~.turns.normal` equates.

    The choices of a multiple-choice question are part of it, in any order; its answer is the choice's text.
    """
    question, answer = turns.question(record), turns.answer(record)
    if listed := turns.choices(question):
        picked = listed.picked(answer)
        question = "\n".join([turns.normal(listed.stem), *sorted(map(turns.normal, listed.texts))])
        answer = answer if picked is None else listed.texts[picked]
    return _key(question), _key(answer)


def signature(record: Record) -> Signatures:
    """MinHash ``[64]`` of the three-word shingles of question and answer, case and punctuation aside."""
    words = _words(f"{turns.question(record)}\n{turns.answer(record)}")
    hashes = np.fromiter(map(_hash, words), dtype=np.uint64, count=len(words))
    if len(hashes) > SHINGLE:
        hashes = sum(hashes[i : len(hashes) - SHINGLE + 1 + i] * _PLACES[i] for i in range(SHINGLE))
    else:
        hashes = (hashes * _PLACES[: len(hashes)]).sum(keepdims=True)
    # Multiply-shift (Dietzfelbinger et al., 1997): the upper half of a * x + b, modulo 2^64.
    least: Signatures = (((hashes >> _HALF) * _FACTORS + _TERMS) >> _HALF).min(axis=1).astype(np.uint32)
    return least


def text(line: bytes) -> Text:
    """What :func:`near_duplicates` asks for, of a line of Record JSONL."""
    record = Record.from_line(line)
    return Text(turns.question(record), turns.answer(record))


def near_duplicates(
    signatures: Signatures,
    *,
    threshold: float = 0.8,
    text_of: Callable[[int], Text] | None = None,
    ranks: Sequence[int] | None = None,
) -> list[Pair]:
    """Records that nearly repeat one that is kept, in order of rank; the lower rank (default: index) stays.

    ``signatures``: ``[N, 64]``. Candidates meet in a band; with ``text_of`` their shingles are compared
    exactly, and they must be about the same thing (the module's note): the same names, numbers and code, and
    question and answer each as similar as ``threshold`` with rare words counting more. Without it the share
    of equal hashes decides. Ranks, all different, make the result independent of the order of the input.
    """
    order = np.arange(len(signatures)) if ranks is None else np.argsort(np.asarray(ranks), kind="stable")
    least = threshold if text_of is None else max(threshold - _MARGIN, 0.0)
    later, earlier, estimates = _candidates(signatures[order], least, _rows(threshold))
    judge = _Judge(text_of, order, np.union1d(later, earlier), threshold) if text_of else None
    gone: set[int] = set()
    pairs = []
    for i, j, estimate in zip(later.tolist(), earlier.tolist(), estimates.tolist(), strict=True):
        if i in gone or j in gone:
            continue
        similarity = judge.similarity(i, j) if judge else estimate
        if similarity is not None and similarity >= threshold:
            gone.add(i)
            pairs.append(Pair(int(order[i]), int(order[j]), similarity))
    return pairs


# --- candidates ------------------------------------------------------------------------------------


def _candidates(signatures: Signatures, least: float, rows: int) -> tuple[Indices, Indices, Shares]:
    """Pairs (later, earlier) whose share of equal hashes is ``least`` or more, sorted, with that share."""
    count = len(signatures)
    found = np.empty(0, dtype=np.int64)
    for first in range(0, HASHES - rows + 1, rows):
        new = []
        for one, other in _meetings(*_buckets(signatures, first, rows)):
            near = _share(signatures, one, other) >= least
            new.append((np.maximum(one, other) * count + np.minimum(one, other))[near])
        found = np.unique(np.concatenate([found, *new]))
    later, earlier = np.divmod(found, max(1, count))
    shares = [_share(signatures, *part) for part in _chunks(later, earlier)]
    return later, earlier, np.concatenate([np.empty(0), *shares])


def _rows(threshold: float) -> int:
    """Most hashes a band may have for :data:`RECALL`: 5 at a threshold of 0.8."""
    rows = 1
    while rows < HASHES and 1 - (1 - threshold ** (rows + 1)) ** (HASHES // (rows + 1)) >= RECALL:
        rows += 1
    return rows


def _buckets(signatures: Signatures, first: int, rows: int) -> tuple[Indices, Indices]:
    """Members of the buckets of a band, ``rows`` hashes from ``first``, by bucket; and each one's bucket.

    A bucket of too many (a template's) is divided by the hashes after the band, one at a time: what is
    alike enough stays together.
    """
    key = np.zeros(len(signatures), dtype=np.uint64)
    for row in range(rows):
        key = key * _FACTORS[row, 0] + signatures[:, first + row]
    members = np.argsort(key, kind="stable")
    group = np.cumsum(np.diff(key[members], prepend=key[members[:1]]) != 0)
    for step in range(rows, HASHES + 1):
        sizes = np.bincount(group, minlength=1)[group]
        members, group, sizes = members[sizes > 1], group[sizes > 1], sizes[sizes > 1]
        if step == HASHES or not (large := sizes > _BUCKET).any():
            break
        column = np.where(large, signatures[members, (first + step) % HASHES], 0)
        order = np.lexsort((members, column, group))
        members, group, column = members[order], group[order], column[order]
        group = np.cumsum(
            (np.diff(group, prepend=group[:1]) != 0) | (np.diff(column, prepend=column[:1]) != 0)
        )
    return members, group


def _meetings(members: Indices, group: Indices) -> Iterator[tuple[Indices, Indices]]:
    """All pairs of each bucket. Of one still too large, whose hashes are all equal, also with its first."""
    for apart in range(1, _BUCKET):
        (at,) = np.nonzero(group[apart:] == group[:-apart])
        if len(at) == 0:
            return
        yield from _chunks(members[at], members[at + apart])
    first = np.searchsorted(group, group)
    far = np.arange(len(group)) - first >= _BUCKET
    yield from _chunks(members[far], members[first[far]])


def _share(signatures: Signatures, one: Indices, other: Indices) -> Shares:
    share: Shares = (signatures[one] == signatures[other]).mean(axis=1)
    return share


def _chunks(one: Indices, other: Indices) -> Iterator[tuple[Indices, Indices]]:
    for start in range(0, len(one), _CHUNK):
        yield one[start : start + _CHUNK], other[start : start + _CHUNK]


# --- what candidates are about ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Content:
    shingles: frozenset[tuple[str, ...]]
    question: frozenset[str]
    answer: frozenset[str]
    names: frozenset[str]
    codes: tuple[str, ...]
    """In their order: two flaws may each name the other."""

    @classmethod
    def of(cls, text: Text) -> _Content:
        whole = f"{text.question}\n{text.answer}"
        words = _words(whole)
        return cls(
            frozenset(tuple(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))),
            frozenset(_words(text.question)),
            frozenset(_words(text.answer)) or frozenset([turns.normal(text.answer)]),
            frozenset(name.casefold() for name in _NAME.findall(whole)),
            tuple(_bare(word) for word in whole.split() if _CODE.search(word)),
        )


class _Judge:
    """Compares candidates by their texts, which are read when needed."""

    def __init__(
        self, text_of: Callable[[int], Text], order: Indices, candidates: Indices, threshold: float
    ) -> None:
        self._content = lru_cache(maxsize=_CACHED)(lambda i: _Content.of(text_of(int(order[i]))))
        self._threshold = threshold
        self._count = len(candidates)
        self._frequency: Counter[str] = Counter()
        for i in candidates.tolist():
            content = self._content(i)
            self._frequency.update(content.question | content.answer)

    def similarity(self, i: int, j: int) -> float | None:
        """Jaccard index of the shingles; None if the two are about different things."""
        one, other = self._content(i), self._content(j)
        if one.codes != other.codes or one.names - _all(other) or other.names - _all(one):
            return None
        if (
            min(self._alike(one.question, other.question), self._alike(one.answer, other.answer))
            < self._threshold
        ):
            return None
        return len(one.shingles & other.shingles) / len(one.shingles | other.shingles)

    def _alike(self, one: frozenset[str], other: frozenset[str]) -> float:
        """Jaccard index of words; or, if lower, the same weighted by their rarity among the candidates.

        With weights, what only one of the two says counts as far as the other says something else instead: a
        copy with a few more words is about the same thing.
        """
        shared = self._weight(one & other)
        instead = min(self._weight(one - other), self._weight(other - one))
        plain = len(one & other) / len(one | other)
        return min(plain, shared / (shared + 2 * instead)) if shared else 0.0

    def _weight(self, words: frozenset[str]) -> float:
        # fsum: the same whatever the order of the set.
        return math.fsum(math.log1p(self._count / self._frequency[word]) for word in words)


def _all(content: _Content) -> frozenset[str]:
    return content.question | content.answer


# --- words and hashes ------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Its words; of a text without any, the text."""
    text = turns.normal(text)
    return _WORD.findall(text) or [text]


def _bare(word: str) -> str:
    """Without quotation marks and brackets around it, and the punctuation after it."""
    return re.sub(r"[.,;:!?]$", "", word.strip("\"'“”‘’()")).strip("\"'“”‘’()")


@lru_cache(maxsize=2**16)
def _hash(word: str) -> int:
    return zlib.crc32(word.encode()) * 0x9E3779B97F4A7C15 & _MASK


def _key(text: str) -> bytes:
    return blake2b(turns.normal(text).encode(), digest_size=16).digest()


def _constants(name: str, count: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """Odd 64-bit numbers that are the same everywhere and for ever."""
    digests = (blake2b(f"{name}/{i}".encode(), digest_size=8).digest() for i in range(count))
    return np.array([int.from_bytes(d, "little") | 1 for d in digests], dtype=np.uint64)


_HALF = np.uint64(32)
_FACTORS = _constants("factor", HASHES)[:, None]
_TERMS = _constants("term", HASHES)[:, None]
_PLACES = _constants("place", SHINGLE)
