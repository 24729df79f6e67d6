"""The assistant that has its parts in this process: an embedder, and a router and knowledge bases over it."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.retrieval.knowledge_base import KnowledgeBases
from qwen_ray.routing.questions import ending
from qwen_ray.serving.assistant import Assistant, Embedded, NoAssistant, Passage, Route

if TYPE_CHECKING:
    from qwen_ray.routing.router import Router

PASSAGES = 4
"""Passages that a question gets."""
_AT_ONCE = 32  # texts embedded for one client before others' questions have their turn
_REMEMBERED = 4096  # questions whose vectors are kept: a benchmark asks each of them of many models

T = TypeVar("T")


class LocalAssistant(Assistant):
    """All work is done by one thread of its own, in the order of the calls; the event loop stays free."""

    def __init__(
        self,
        embedder: Embedder,
        *,
        router: Router | None = None,
        knowledge: KnowledgeBases | None = None,
        passages: int = PASSAGES,
    ) -> None:
        """Raises :class:`UserError` where router or knowledge bases were made with another embedder."""
        if router is not None and router.embedder != embedder.id:
            raise UserError(
                f"the router was trained with the embedder '{router.embedder}', not '{embedder.id}'",
                where="--router",
                fix="use that embedder, or train the router again",
            )
        if knowledge is not None:
            knowledge.check_embedder(embedder.id)
        self._embedder, self._router, self._knowledge = embedder, router, knowledge
        self._passages = passages
        self._vectors: OrderedDict[str, Any] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="assistant")
        self._none = NoAssistant()

    @classmethod
    def load(
        cls,
        *,
        embedder: str | None = None,
        router: str | None = None,
        knowledge: str | None = None,
        passages: int = PASSAGES,
    ) -> LocalAssistant:
        """From an embedder's name, a router's folder and the root of knowledge bases, each if given.

        Without an embedder's name: the one that router or knowledge bases were made with.
        """
        chooses, bases = None, KnowledgeBases(knowledge) if knowledge else None
        if router:
            from qwen_ray.routing.router import Router

            chooses = Router.load(Path(router))
        if embedder is None and chooses is not None:
            embedder = chooses.embedder_name
        if embedder is None and bases is not None:
            embedder = bases.embedder_name()
        return cls(Embedder.load(embedder), router=chooses, knowledge=bases, passages=passages)

    async def embed(self, texts: Sequence[str]) -> Embedded:
        def work(part: Sequence[str]) -> tuple[list[list[float]], int]:
            return self._embedder.embed(part).tolist(), self._embedder.tokens(part)

        whole = Embedded([], 0)
        for start in range(0, len(texts), _AT_ONCE):
            vectors, tokens = await self._do(partial(work, texts[start : start + _AT_ONCE]))
            whole = Embedded([*whole.vectors, *vectors], whole.tokens + tokens)
        return whole

    async def route(self, questions: Sequence[str]) -> list[Route]:
        router = self._router
        if router is None:
            return await self._none.route(questions)
        return await self._do(lambda: router.route(self._embedded(questions)))

    async def retrieve(
        self, questions: Sequence[str], domain: str | None = None, *, only: bool = False
    ) -> list[list[Passage]]:
        knowledge = self._knowledge
        if knowledge is None:
            return await self._none.retrieve(questions, domain, only=only)

        def work() -> list[list[Passage]]:
            name = domain if domain in knowledge.names() else None
            if name is None and only:
                return [[] for _ in questions]
            knowledge.check_embedder(self._embedder.id)  # a version made with another may have come since
            return knowledge.search(name, questions, self._embedded(questions), self._passages)

        return await self._do(work)

    async def describe(self) -> dict[str, Any]:
        def work() -> dict[str, Any]:
            return {
                "embedder": self._embedder.id,
                "router": self._router.describe() if self._router else None,
                "knowledge_bases": self._knowledge.describe() if self._knowledge else None,
            }

        return await self._do(work)

    def stop(self) -> None:
        """End the thread."""
        self._thread.shutdown(cancel_futures=True)

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _embedded(self, questions: Sequence[str]) -> Any:
        """The vectors of what each question asks at its end; those of late ones are remembered."""
        questions = [ending(question) for question in questions]
        new = list(dict.fromkeys(question for question in questions if question not in self._vectors))
        self._vectors.update(zip(new, self._embedder.embed(new), strict=True))
        for question in questions:
            self._vectors.move_to_end(question)
        found = [self._vectors[question] for question in questions]
        while len(self._vectors) > _REMEMBERED:
            self._vectors.popitem(last=False)
        return np.stack(found) if found else np.zeros((0, self._embedder.dimensions), np.float32)
