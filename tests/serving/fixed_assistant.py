"""An assistant that gives the answers it was made with: the service's part is tested without an embedder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qwen_ray.serving.assistant import Embedded, Passage, Route


def passage(text: str, base: str = "rivers") -> Passage:
    return Passage(text, 0.9, f"{base}/1", base, 3, source="A book", license="CC BY 4.0", title="Chapter 1")


ABSTAINS = Route(None, 0.1, "geo", abstains=True)


class FixedAssistant:
    """``routes``: by a word of the question, else it abstains. ``passages``: by knowledge base."""

    def __init__(self, routes: Mapping[str, Route], passages: Mapping[str, Sequence[Passage]]) -> None:
        self.routes, self.passages = routes, passages
        self.asked: list[tuple[str, str | None]] = []

    async def embed(self, texts: Sequence[str]) -> Embedded:
        return Embedded([[1.0, float(len(text))] for text in texts], sum(map(len, texts)))

    async def route(self, questions: Sequence[str]) -> list[Route]:
        return [
            next((route for word, route in self.routes.items() if word in question), ABSTAINS)
            for question in questions
        ]

    async def retrieve(
        self, questions: Sequence[str], domain: str | None = None, *, only: bool = False
    ) -> list[list[Passage]]:
        self.asked += [(question, domain) for question in questions]
        every = [p for passages in self.passages.values() for p in passages]
        found = list(self.passages.get(domain or "", [] if only else every))
        return [found for _ in questions]

    async def describe(self) -> dict[str, Any]:
        bases = [{"name": name, "version": 3} for name in self.passages]
        return {"embedder": "fixed", "router": {"domains": sorted(self.routes)}, "knowledge_bases": bases}
