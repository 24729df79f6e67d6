"""What one request may ask for, and how many requests there may be at once and a minute.

Rates are token buckets: a key that has rested may send a minute's worth at once, then as much as flows in.
Tokens are known only when an answer is complete, so they are taken from the bucket afterwards; a bucket
that was overdrawn admits nothing until it has filled up again. All of it is counted by one ingress process.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, Field

from qwen_ray.config import Section
from qwen_ray.errors import UserError
from qwen_ray.serving.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    ScoreRequest,
    TokenizeRequest,
)

Positive = Annotated[int, Field(ge=1)]
_BYTES_A_TOKEN = 4  # of text, where only the model's tokenizer knows; English has about so many
_BUSY_SECONDS = 1.0  # after which a place may be free


class Rates(Section):
    """What one key may use. None: as the server's limits say, and without any there."""

    page: ClassVar[str] = "docs/serving-security.md"
    requests_per_minute: Positive | None = None
    """Requests a minute; so many may come at once."""
    tokens_per_minute: Positive | None = None
    """Tokens a minute, of prompts and of answers."""
    concurrent: Positive | None = None
    """Requests at one time."""


class Limits(Rates):
    """Of one server. The rates hold for every key that has none of its own."""

    body_bytes: Positive = 8 * 2**20
    """Size of a request's body. Parsed JSON takes up to 30 times as much memory."""
    prompts_per_request: Positive = 4096
    """Prompts, texts to embed or score items of one request."""
    tokens_per_request: Positive = 1_000_000
    """Tokens that one request may give and ask for. Text is counted as a token for every 4 bytes."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0
    """After which a request is given up and its work cancelled."""
    in_flight: Positive = 256
    """Requests at one time, of all keys together."""

    def check(self, body: BaseModel) -> None:
        """:class:`UserError` (413) if one request asks for too much."""
        prompts, tokens = request_size(body)
        for what, count, limit in (
            ("prompts", prompts, self.prompts_per_request),
            ("tokens", tokens, self.tokens_per_request),
        ):
            if count > limit:
                raise UserError(
                    f"the request has {count} {what}, and this server takes {limit} at once",
                    fix="send it in parts",
                    status=413,
                )


def request_size(body: BaseModel) -> tuple[int, int]:
    """(prompts, tokens) that a request gives and asks for. Tokens of text are an estimate."""
    prompts: Sequence[str | Sequence[int]] = []
    asked = 0
    match body:
        case ScoreRequest():
            each = [len(item.context) + sum(map(len, item.continuations)) for item in body.items]
            return len(each), sum(each) * max(1, len(body.models))
        case CompletionRequest():
            prompts = _listed(body.prompt)
            asked = len(prompts) * body.n * body.max_tokens
        case ChatRequest():
            prompts = ["".join(message.content for message in body.messages)]
            asked = body.n * (body.max_completion_tokens or body.max_tokens or 0)
        case EmbeddingsRequest():
            prompts = _listed(body.input)
        case TokenizeRequest():
            prompts = _listed(body.prompt)
        case DetokenizeRequest():
            prompts = [body.tokens]
    return len(prompts), sum(map(_tokens, prompts)) + asked


def _listed(given: Any) -> Sequence[str | Sequence[int]]:
    """One prompt may come without a list around it, as text or as token ids."""
    return [given] if isinstance(given, str) or (given and isinstance(given[0], int)) else given


def _tokens(prompt: str | Sequence[int]) -> int:
    return len(prompt.encode()) // _BYTES_A_TOKEN if isinstance(prompt, str) else len(prompt)


class Bucket:
    """Fills up at a rate, to a minute's worth. More may be taken than it holds."""

    def __init__(self) -> None:
        self._level: float | None = None  # None: full
        self._at = 0.0

    def wait(self, per_minute: int, now: float, *, needed: float = 1.0) -> float:
        """Seconds until it holds ``needed``; 0 if it does."""
        if self._level is None:
            self._level = float(per_minute)
        filled = self._level + (now - self._at) * per_minute / 60
        self._level, self._at = min(float(per_minute), filled), now
        return max(0.0, (needed - self._level) * 60 / per_minute)

    def take(self, amount: float) -> None:
        """``amount`` out; nothing to do while no rate has been asked for."""
        if self._level is not None:
            self._level -= amount


@dataclass
class _Account:
    """Of one key."""

    running: int = 0
    requests: Bucket = field(default_factory=Bucket)
    tokens: Bucket = field(default_factory=Bucket)


@dataclass(frozen=True)
class Refusal:
    """``reason``: the limit's name, for metrics."""

    reason: str
    message: str
    retry_after: float = _BUSY_SECONDS


class Admission:
    """Counts what runs and what each key uses. All methods belong to one event loop."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock``: seconds, from any start."""
        self._limits, self._clock = limits, clock
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self.running = 0

    def enter(self, name: str, own: Rates) -> Refusal | None:
        """Let a request of the key ``name`` in, or say why not. What was let in must :meth:`leave`."""
        account, rates = self._accounts[name], self._rates(own)
        if self.running >= self._limits.in_flight:
            return Refusal("in_flight", "the server has as many requests as it takes at once")
        if rates.concurrent and account.running >= rates.concurrent:
            return Refusal("concurrent", f"this key may have {rates.concurrent} requests at a time")
        now = self._clock()
        for reason, rate, bucket in (
            ("tokens_per_minute", rates.tokens_per_minute, account.tokens),
            ("requests_per_minute", rates.requests_per_minute, account.requests),
        ):
            if rate and (wait := bucket.wait(rate, now)) > 0:
                unit = reason.partition("_")[0]
                return Refusal(reason, f"this key may use {rate} {unit} a minute", wait)
        account.requests.take(1)
        account.running += 1
        self.running += 1
        return None

    def leave(self, name: str, tokens: float) -> None:
        """A request has ended and used so many tokens."""
        self.running -= 1
        account = self._accounts[name]
        account.running -= 1
        account.tokens.take(tokens)

    def _rates(self, own: Rates) -> Rates:
        """Those of the key, where it has some, else those of the server."""
        names = Rates.model_fields
        return Rates(**{name: getattr(own, name) or getattr(self._limits, name) for name in names})
