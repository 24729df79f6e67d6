"""Many texts to embed share the assistant's one thread with the questions of others."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from qwen_ray.serving.assistants import LocalAssistant

TEXTS = ["a" * i for i in range(1, 101)]


class Lengths:
    """An embedder whose vectors are lengths. The first texts take until ``go`` is set."""

    id, dimensions = "lengths", 2

    def __init__(self) -> None:
        self.begun, self.go, self.read = threading.Event(), threading.Event(), 0

    def embed(self, texts: Sequence[str]) -> Any:
        self.begun.set()
        assert self.go.wait(30)
        self.read += len(texts)
        return np.array([[len(text), 1] for text in texts], np.float32)

    def tokens(self, texts: Sequence[str]) -> int:
        return sum(map(len, texts))


@pytest.fixture
def embedder() -> Lengths:
    return Lengths()


@pytest.fixture
def assistant(embedder: Lengths) -> Iterator[LocalAssistant]:
    assistant = LocalAssistant(embedder)  # type: ignore[arg-type]
    yield assistant
    embedder.go.set()
    assistant.stop()


def test_others_have_their_turn_and_the_order_stays(assistant: LocalAssistant, embedder: Lengths) -> None:
    async def ask() -> int:
        many = asyncio.create_task(assistant.embed(TEXTS))
        await asyncio.to_thread(embedder.begun.wait, 30)
        other = asyncio.create_task(assistant.describe())
        await asyncio.sleep(0)
        embedder.go.set()
        await other
        before = embedder.read
        got = await many
        assert [vector[0] for vector in got.vectors] == [len(text) for text in TEXTS]
        assert got.tokens == sum(map(len, TEXTS))
        return before

    assert asyncio.run(ask()) < len(TEXTS)


def test_what_nobody_waits_for_is_not_embedded(assistant: LocalAssistant, embedder: Lengths) -> None:
    async def leave() -> None:
        many = asyncio.create_task(assistant.embed(TEXTS))
        await asyncio.to_thread(embedder.begun.wait, 30)
        many.cancel()
        await asyncio.gather(many, return_exceptions=True)
        embedder.go.set()
        await assistant.describe()  # behind all that was begun

    asyncio.run(leave())
    assert 0 < embedder.read < len(TEXTS)
