"""What is asked about a question before the model gets it: which adapter, and which passages to read.

The service knows its assistant by :class:`Assistant` only: a deployment of its own on Ray Serve, which all
replicas share, or an object in this process.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from qwen_ray.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOTES = "Use these notes where they help.\n{passages}\n\n"
"""What the model reads before a question, with the retrieved passages in it."""


@dataclass(frozen=True)
class Route:
    """The router's choice for one question. ``adapter`` None: the base answers, as the domain has no adapter
    or as the router ``abstains``.

    ``domain``: the nearest, chosen or not. ``score``: how much nearer it is than everything else (a
    difference of cosines); from the router's threshold on, it is chosen.
    """

    adapter: str | None
    score: float
    domain: str | None = None
    abstains: bool = False


@dataclass(frozen=True)
class Passage:
    """A passage of a knowledge base. ``score``: higher is nearer; only comparable within one answer."""

    text: str
    score: float
    id: str
    knowledge_base: str
    version: int
    source: str = ""
    license: str = ""
    title: str = ""

    def citation(self) -> dict[str, Any]:
        """The passage as it is cited in a response."""
        return asdict(self)


@dataclass(frozen=True)
class Embedded:
    """Unit vectors ``[n, dimensions]``, and how many tokens were read."""

    vectors: list[list[float]]
    tokens: int


class Assistant(Protocol):
    """Router, knowledge bases and the embedder they share. A part that is not there refuses with 400."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        """A unit vector of each text."""

    async def route(self, questions: Sequence[str]) -> list[Route]:
        """The adapter for each question."""

    async def retrieve(
        self, questions: Sequence[str], domain: str | None = None, *, only: bool = False
    ) -> list[list[Passage]]:
        """The best passages for each question, best first. ``domain``: from the knowledge base of that name;
        where there is none, from all of them, or with ``only`` from none."""

    async def describe(self) -> dict[str, Any]:
        """``embedder`` (id, or None), ``router`` and ``knowledge_bases`` (facts, or None), for listings."""


class NoAssistant:
    """A server without router, knowledge bases and embedder."""

    async def embed(self, texts: Sequence[str]) -> Embedded:
        raise UserError("this server has no embedding model", fix="start it with --embedder")

    async def route(self, questions: Sequence[str]) -> list[Route]:
        raise UserError("this server has no router", fix="name an adapter; GET /v1/models lists them")

    async def retrieve(
        self, questions: Sequence[str], domain: str | None = None, *, only: bool = False
    ) -> list[list[Passage]]:
        raise UserError("this server has no knowledge base", fix="leave out '+rag'")

    async def describe(self) -> dict[str, Any]:
        return {"embedder": None, "router": None, "knowledge_bases": None}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what the tokenizer reads as a token of control wherever it stands in a text, such as the marks
    of a chat template."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    longest_first = sorted(added | set(tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def question_of(prompt: str) -> str:
    """The last question of a prompt that may hold instructions and solved examples before it.

    Blocks are separated by blank lines, as benchmarks lay them out; the last one that says anything counts.
    """
    blocks = [block.strip() for block in prompt.split("\n\n")]
    return next((block for block in reversed(blocks) if block), prompt.strip())
