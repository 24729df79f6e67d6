"""The contract between the server and an engine: token ids in, log-probabilities and tokens out.

An engine knows adapters only as opaque keys of what was loaded into it. Names, versions and the registry
belong to :mod:`qwen_ray.serving.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

MAX_TOP = 20  # log-probabilities of at most so many alternatives a position

Alternatives = list[tuple[int, float]]
"""(token id, log-probability in nats) of the likeliest tokens at a position, likeliest first."""


@dataclass(frozen=True)
class ScoreItem:
    """One context and the continuations whose log-probabilities are wanted.

    ``context`` has at least one token. ``top``: alternatives wanted at each scored position.
    ``next_token``: also the alternatives (at least one) for the token that would follow; allowed with at
    most one continuation.
    """

    adapter: str | None
    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    top: int = 0
    next_token: bool = False


@dataclass
class ContinuationScore:
    """Log-probabilities in nats, one a token of the continuation; ``greedy``: each was the likeliest."""

    logprobs: list[float]
    greedy: bool
    top: list[Alternatives] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.logprobs)


@dataclass
class ScoreResult:
    """Scores in the order of the item's continuations. ``truncated``: the context lost tokens on its left."""

    continuations: list[ContinuationScore]
    truncated: bool = False
    next_token: Alternatives | None = None


@dataclass(frozen=True)
class GenerateRequest:
    """One prompt to continue. ``temperature`` 0 is greedy; ``logprobs`` None: none wanted, k: k alternatives.

    Generation ends at an end-of-text token, at one of the ``stop`` strings, after ``max_tokens`` or where
    the model's context is full.
    """

    adapter: str | None
    prompt: Sequence[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    logprobs: int | None = None


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. ``text`` is what may be shown now: it can lag behind (stop strings, UTF-8)."""

    id: int
    text: str
    logprob: float | None = None
    top: Alternatives | None = None
    finish_reason: str | None = None


@dataclass
class GenerateResult:
    """What was generated, the end-of-text token included in ``ids`` but not in ``text``."""

    ids: list[int]
    text: str
    finish_reason: str
    logprobs: list[float] = field(default_factory=list)
    top: list[Alternatives] = field(default_factory=list)


OnToken = Callable[[TokenEvent], None]


class Engine(Protocol):
    """What every engine offers to a caller in the same process. One thread at a time."""

    id: str
    fingerprint: str
    context_length: int

    def add_adapter(self, key: str, folder: Path, *, within: Path | None = None) -> int:
        """Load a PEFT folder under ``key``; returns its bytes. Raises ``UserError`` if refused."""

    def remove_adapter(self, key: str) -> None:
        """Unload; nothing happens if it is not loaded."""

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Score all items. :class:`~qwen_ray.errors.UserError` if any of them is invalid."""

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: Callable[[int, TokenEvent], None] | None = None
    ) -> list[GenerateResult]:
        """Continue all prompts together; ``on_token(i, event)`` as request i gets a token."""
