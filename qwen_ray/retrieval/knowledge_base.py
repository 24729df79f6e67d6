"""Search of knowledge bases by meaning, by words, and by both.

Both is reciprocal rank fusion (Cormack, Clarke and Buettcher, SIGIR 2009): a passage scores 1 / (60 + rank)
in each of the two lists.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.retrieval.store import Snapshot, Store
from qwen_ray.serving.assistant import Passage

log = logging.getLogger(__name__)

VECTOR, WORDS, HYBRID = "vector", "text", "hybrid"
WAYS = (VECTOR, WORDS, HYBRID)
_FUSION = 60
_DEPTH = 50  # passages of each list that are fused
_PROBES = 40  # lists of vectors that are looked through, where they are indexed
_FIELDS = ["id", "text", "title", "source", "license"]

Ranked = list[tuple[float, Passage]]
"""Passages with the score of one list, best first."""


class KnowledgeBases:
    """Readers of all knowledge bases under one root. Use it from one thread at a time.

    A new version, a rollback or a new knowledge base is seen within ``refresh_s`` seconds; one answer reads
    one version. While the storage cannot be reached the versions already open are kept.
    """

    def __init__(self, root: str | Path, *, refresh_s: float = 2.0) -> None:
        self.store = Store(root)
        self._refresh_s = refresh_s
        self._looked = float("-inf")
        self._open: dict[str, Snapshot] = {}

    def names(self) -> list[str]:
        """Sorted."""
        return list(self._current())

    def search(
        self, name: str | None, questions: Sequence[str], vectors: Any, k: int, *, by: str = HYBRID
    ) -> list[list[Passage]]:
        """The ``k`` best passages for each question, best first: of one knowledge base, or without a name of
        all of them. ``vectors``: the questions', ``float32 [len(questions), dimensions]``."""
        current = self._current()
        if name is not None and name not in current:
            raise UserError(f"no knowledge base '{name}'", fix=did_you_mean(name, current), status=404)
        read = [current[name]] if name is not None else list(current.values())
        if not questions:
            return []
        lists: list[list[Ranked]] = []
        try:
            with self.store.reading():
                if by in (VECTOR, HYBRID):
                    lists.append(_merged([_by_vector(one, vectors, max(k, _DEPTH)) for one in read]))
                if by in (WORDS, HYBRID):
                    lists.append(_merged([_by_words(one, questions, max(k, _DEPTH)) for one in read]))
        except UserError as e:
            log.warning("%s", e)  # a client is not told the reason
            raise
        return [_fused([ranked[i] for ranked in lists], k) for i in range(len(questions))]

    def embedder_name(self) -> str | None:
        """What loads the embedder of the first knowledge base; None where there is none."""
        return next((one.manifest.embedder_name for one in self._current().values()), None)

    def check_embedder(self, id: str) -> None:
        """Raise :class:`UserError` where a knowledge base was made with another model than this one."""
        for name, snapshot in self._current().items():
            if (made_with := snapshot.manifest.embedder) != id:
                raise UserError(
                    f"the knowledge base '{name}' was made with the embedder '{made_with}', not '{id}'",
                    where=self.store.root,
                    fix=f"use --embedder {snapshot.manifest.embedder_name}, or build it again",
                    status=503,
                )

    def describe(self) -> list[dict[str, Any]]:
        """Name, version, date, embedder, numbers and sources of each, for listings."""
        shown = ("name", "version", "created", "embedder", "documents", "chunks", "sources")
        return [
            {key: value for key, value in one.manifest.to_dict().items() if key in shown}
            for one in self._current().values()
        ]

    def _current(self) -> dict[str, Snapshot]:
        if time.monotonic() - self._looked < self._refresh_s:
            return self._open
        try:
            found = {}
            for name in self.store.names():
                held = self._open.get(name)
                same = held is not None and held.state == self.store.current(name)
                found[name] = held if held is not None and same else self.store.open(name)
            self._open = found
        except UserError as e:
            if not self._open:
                raise
            log.warning("knowledge bases stay as they were read last: %s", e)
        self._looked = time.monotonic()
        return self._open


def _by_vector(one: Snapshot, vectors: Any, depth: int) -> list[Ranked]:
    """All questions in one scan. The score is the cosine."""
    query = one.table.search([list(map(float, row)) for row in vectors]).distance_type("cosine")
    found: list[Ranked] = [[] for _ in vectors]
    for row in query.nprobes(_PROBES).limit(depth).select([*_FIELDS, "_distance"]).to_list():
        found[row.get("query_index", 0)].append((1 - row["_distance"], _passage(one, row)))
    return found


def _by_words(one: Snapshot, questions: Sequence[str], depth: int) -> list[Ranked]:
    """Okapi BM25 over stems."""
    from lancedb.query import MatchQuery

    def rows(question: str) -> list[dict[str, Any]]:
        query = one.table.search(MatchQuery(question, "searched"), query_type="fts")
        return list(query.limit(depth).select([*_FIELDS, "_score"]).to_list()) if question.strip() else []

    return [[(row["_score"], _passage(one, row)) for row in rows(question)] for question in questions]


def _passage(one: Snapshot, row: dict[str, Any]) -> Passage:
    facts = {key: row[key] for key in _FIELDS}
    return Passage(**facts, score=0.0, knowledge_base=one.manifest.name, version=one.manifest.version)


def _merged(by_base: Sequence[list[Ranked]]) -> list[Ranked]:
    """The lists of several knowledge bases as one for each question. Equal scores: by id."""
    key: Callable[[tuple[float, Passage]], tuple[float, str]] = lambda hit: (-hit[0], hit[1].id)  # noqa: E731
    return [
        sorted((hit for ranked in lists for hit in ranked), key=key) for lists in zip(*by_base, strict=True)
    ]


def _fused(lists: Sequence[Ranked], k: int) -> list[Passage]:
    scores: dict[tuple[str, str], float] = {}
    passages: dict[tuple[str, str], Passage] = {}
    for ranked in lists:
        for rank, (_, passage) in enumerate(ranked[: max(k, _DEPTH)], start=1):
            key = (passage.knowledge_base, passage.id)
            scores[key] = scores.get(key, 0.0) + 1 / (_FUSION + rank)
            passages[key] = passage
    best = sorted(scores, key=lambda key: (-scores[key], key))[:k]
    return [Passage(**{**vars(passages[key]), "score": round(scores[key], 6)}) for key in best]
