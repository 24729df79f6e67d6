"""The contract between the server and an engine: token ids in, log-probabilities and tokens out.

An engine knows adapters only as opaque keys of what was loaded into it. Names, versions and the registry
belong to :mod:`qwen_ray.serving.adapters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from qwen_ray.serving.lora_weights import LoraWeights

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
OnTokenOf = Callable[[int, TokenEvent], None]
"""The same for one of several requests, by its number."""


def prompt_item(
    adapter: str | None, ids: Sequence[int], *, top: int = 0, prefix: Sequence[int] = ()
) -> ScoreItem:
    """The item that asks for the log-probabilities of a whole prompt and of the token after it.

    ``prefix``: what the model reads before, whose log-probabilities are not wanted."""
    rest = (tuple(ids[1:]),) if len(ids) > 1 else ()
    return ScoreItem(adapter, (*prefix, *ids[:1]), rest, top=top, next_token=True)


class Engine(Protocol):
    """What every engine offers to a caller in the same process. One thread at a time."""

    id: str
    fingerprint: str
    context_length: int

    def score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        """Score all items. :class:`~qwen_ray.errors.UserError` if any of them is invalid."""

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: Callable[[int, TokenEvent], None] | None = None
    ) -> list[GenerateResult]:
        """Continue all prompts together; ``on_token(i, event)`` as request i gets a token."""


class ServedEngine(Protocol):
    """What the server asks of an engine itself, from any thread; forwards go through its queue.

    ``read_adapter``, ``check_lineage``, ``add_adapter`` and ``remove_adapter`` are those of
    :class:`qwen_ray.serving.adapters.Host`; the last two are called on the queue's thread.
    """

    id: str
    fingerprint: str
    context_length: int
    vocabulary: int
    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]

    def queue(self, *, max_waiting_tokens: int | None = None) -> EngineQueue:
        """What puts requests in front of it."""

    def check_score(self, item: ScoreItem) -> None:
        """Raise ``UserError`` for an item that cannot be scored."""

    def check_generate(self, request: GenerateRequest) -> None:
        """Raise ``UserError`` for a request that cannot be generated from."""

    def read_adapter(self, folder: Path, *, within: Path | None = None) -> LoraWeights:
        """Read a PEFT folder; ``UserError`` if it is damaged or leaves ``within``."""

    def check_lineage(self, folder: Path) -> None:
        """``UserError`` (409) if the folder says that it was trained on another base model."""

    def add_adapter(self, key: str, folder: LoraWeights) -> int:
        """Load under ``key``; returns its bytes. ``UserError`` if refused."""

    def remove_adapter(self, key: str) -> None:
        """Unload; nothing happens if it is not loaded."""


class Running(Protocol):
    """A generation that was queued: wait for its result, or cancel it."""

    future: Future[GenerateResult]

    def cancel(self) -> None:
        """Stop generating; the future then holds what there is, with finish reason ``cancelled``."""


class EngineQueue(Protocol):
    """Requests of many threads in front of one engine. Bad requests and refusals (429) come by the future."""

    def score(self, items: Sequence[ScoreItem]) -> Future[list[ScoreResult]]:
        """Scores of all items, in order."""

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: OnTokenOf | None = None
    ) -> Sequence[Running]:
        """Continue the prompts of one client's request: all of them are taken or all refused. ``on_token``
        runs on the engine's thread, so it must be quick."""

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` where the engine may be changed, between forwards, and return what it returns."""

    def stop(self) -> None:
        """End; what is queued or running fails."""

    @property
    def alive(self) -> bool:
        """Whether requests are still worked off."""

    @property
    def load(self) -> dict[str, int]:
        """Counts for health, metrics and routing: ``score_requests``, ``waiting`` and ``generating``
        requests, ``waiting_tokens``, ``max_waiting_tokens``, ``tokens_per_second``; of an engine that keeps
        prompts' beginnings itself ``prefix_bytes`` and ``max_prefix_bytes``."""
