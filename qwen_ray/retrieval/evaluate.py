"""How often a knowledge base finds what answers a question, before any model answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.evaluation.statistics import wilson
from qwen_ray.retrieval.documents import Question
from qwen_ray.retrieval.knowledge_base import WAYS, KnowledgeBases

CUTS = (1, 5, 10)
_AT_ONCE = 256


@dataclass(frozen=True)
class Quality:
    """One way of searching, over ``n`` questions: each share with its 95% interval (Wilson).

    ``recall[k]``: of questions with an answering passage among the first k. ``mrr``: mean reciprocal rank of
    the first one within the first 10, else 0; its interval is the binomial one, which is no narrower than the
    true one.
    """

    by: str
    n: int
    recall: dict[int, tuple[float, float, float]]
    mrr: tuple[float, float, float]

    def to_dict(self) -> dict[str, Any]:
        shown = {f"recall@{k}": value for k, value in self.recall.items()} | {"mrr": self.mrr}
        named = {key: dict(zip(("value", "lo", "hi"), value, strict=True)) for key, value in shown.items()}
        return {"by": self.by, "n": self.n, **named}


def evaluate(
    bases: KnowledgeBases, name: str | None, questions: Sequence[Question], embedder: Embedder
) -> list[Quality]:
    """The quality of each way of searching, of one knowledge base or, without a name, of all together."""
    if not questions:
        raise UserError("no questions to ask", fix="give at least one")
    bases.check_embedder(embedder.id)
    ranks: dict[str, list[int]] = {by: [] for by in WAYS}
    for start in range(0, len(questions), _AT_ONCE):
        asked = questions[start : start + _AT_ONCE]
        texts = [question.text for question in asked]
        vectors = embedder.embed(texts)
        for by in WAYS:
            found = bases.search(name, texts, vectors, max(CUTS), by=by)
            for question, passages in zip(asked, found, strict=True):
                right = [question.answered_by(passage.id) for passage in passages]
                ranks[by].append(right.index(True) + 1 if True in right else 0)
    return [_quality(by, ranks[by]) for by in WAYS]


def table(qualities: Sequence[Quality]) -> str:
    """As text, one way a line."""
    columns = [f"recall@{k}" for k in CUTS] + ["mrr"]
    lines = [f"{qualities[0].n} questions".ljust(18) + "".join(column.ljust(22) for column in columns)]
    for quality in qualities:
        shown = [*(quality.recall[k] for k in CUTS), quality.mrr]
        cells = [f"{value:.3f} ({lo:.3f}-{hi:.3f})".ljust(22) for value, lo, hi in shown]
        lines.append(quality.by.ljust(18) + "".join(cells))
    return "\n".join(line.rstrip() for line in lines)


def _quality(by: str, ranks: Sequence[int]) -> Quality:
    n = len(ranks)

    def share(total: float) -> tuple[float, float, float]:
        lo, hi = wilson(total, n)
        return total / n, lo, hi

    recall = {k: share(sum(0 < rank <= k for rank in ranks)) for k in CUTS}
    return Quality(by, n, recall, share(sum(1 / rank for rank in ranks if rank)))
