"""How well the embedded domains' held-out questions find their facts, and the arithmetic of the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.retrieval import build as kb
from qwen_ray.retrieval.chunks import Chunk
from qwen_ray.retrieval.documents import Origin, Question, embedded_questions
from qwen_ray.retrieval.evaluate import evaluate, table
from qwen_ray.retrieval.knowledge_base import KnowledgeBases
from qwen_ray.retrieval.store import Store
from qwen_ray.tiny.facts import DOMAINS


@pytest.fixture(scope="module")
def domains(embedder: Embedder, tmp_path_factory: pytest.TempPathFactory) -> KnowledgeBases:
    store = Store(tmp_path_factory.mktemp("knowledge"))
    for domain in DOMAINS:
        kb.build(store, domain, [Origin("embedded", domain)], embedder)
    return KnowledgeBases(store.root)


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_questions_find_their_facts(
    domains: KnowledgeBases, domain: str, embedder: Embedder
) -> None:
    """A third of them, to save time; docs/retrieval.md has all."""
    questions = embedded_questions(domain)[::3]
    for quality in evaluate(domains, domain, questions, embedder):
        assert quality.n == len(questions) > 100
        assert quality.recall[5][1] >= 0.9, quality  # the lower end of the interval


def test_they_find_them_among_all_domains_too(domains: KnowledgeBases, embedder: Embedder) -> None:
    questions = [question for domain in DOMAINS for question in embedded_questions(domain)[::12]]
    for quality in evaluate(domains, None, questions, embedder):
        assert quality.recall[5][0] >= 0.9, quality


def test_an_index_of_vectors_finds_them_too(
    domains: KnowledgeBases, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above a number of passages vectors are not all compared; what is added later is found as well."""
    monkeypatch.setattr(kb, "INDEXED", 300)
    tables = [domains.store.open(domain).table.to_arrow().to_pylist() for domain in DOMAINS]
    vectors = {row["id"]: row["vector"] for table in tables for row in table}

    def known(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        yield missing, np.array([vectors[chunk.id] for chunk in missing], np.float32)

    store, origins = Store(tmp_path / "knowledge"), [Origin("embedded", domain) for domain in DOMAINS]
    kb.build(store, "facts", origins[:2], embedder, embed=known)
    kb.update(store, "facts", embedder, origins=origins, embed=known)
    indices = {index.columns[0]: index for index in store.open("facts").table.list_indices()}
    assert sorted(indices) == ["searched", "vector"]
    assert indices["vector"].num_unindexed_rows == indices["searched"].num_unindexed_rows == 0
    questions = [question for domain in DOMAINS for question in embedded_questions(domain)[::12]]
    by_vector = evaluate(KnowledgeBases(store.root), "facts", questions, embedder)[0]
    assert by_vector.recall[5][0] >= 0.9


def test_ranks_become_recall_and_mean_reciprocal_rank(
    notes: Path, tmp_path: Path, embedder: Embedder
) -> None:
    store = Store(tmp_path / "knowledge")
    kb.build(store, "nature", [Origin("text", str(notes))], embedder)
    asked = "Where do swifts sleep?"
    bases = KnowledgeBases(store.root)
    (ranked,) = bases.search("nature", [asked], embedder.embed([asked]), 4, by="vector")
    second, last = ranked[1].id, ranked[3].id
    questions = [
        Question(asked, (second, last)),
        Question(asked, (last,)),
        Question(asked, ("no/such/document",)),
        Question(asked, ("notes/birds/swift/the-common-swift",)),
    ]
    quality = evaluate(bases, "nature", questions, embedder)[0]
    assert quality.by == "vector"
    assert {k: value for k, (value, _, _) in quality.recall.items()} == {1: 0.25, 5: 0.75, 10: 0.75}
    assert quality.mrr[0] == pytest.approx((1 / 2 + 1 / 4 + 0 + 1) / 4)
    assert quality.mrr[1] < quality.mrr[0] < quality.mrr[2]
    assert quality.to_dict()["recall@5"]["value"] == 0.75
    assert "0.250 (0.046-0.699)" in table([quality])


def test_no_questions(domains: KnowledgeBases, embedder: Embedder) -> None:
    with pytest.raises(UserError, match="no questions"):
        evaluate(domains, None, [], embedder)
