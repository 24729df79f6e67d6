"""The calls of :class:`~qwen_ray.serving.scheduler.Scheduler` over vLLM, which has a scheduler of its own."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from qwen_ray.errors import UserError
from qwen_ray.serving.backlog import Backlog, Place
from qwen_ray.serving.engines.base import (
    Alternatives,
    ContinuationScore,
    GenerateRequest,
    GenerateResult,
    OnTokenOf,
    ScoreItem,
    ScoreResult,
)
from qwen_ray.serving.engines.decode import DecodeRow
from qwen_ray.serving.engines.packing import truncated

if TYPE_CHECKING:
    from qwen_ray.serving.engines.vllm import VllmEngine
    from qwen_ray.serving.engines.vllm_core import Core

T = TypeVar("T")


class _Row(DecodeRow):
    """A request's text, stops and limits, for tokens that vLLM chooses."""

    reading: asyncio.Task[None] | None = None
    _next: tuple[int, float | None, Alternatives | None]

    @property
    def limit(self) -> int:
        """Tokens that may be generated."""
        return self._limit

    def take(self, token: int, logprob: float | None, top: Alternatives | None) -> None:
        """The next token and what is told about it."""
        self._next = (token, logprob, top)
        self.accept(torch.empty(0))

    def _choose(self, logits: torch.Tensor) -> int:
        return self._next[0]

    def _describe(self, logits: torch.Tensor, token: int) -> tuple[float | None, Alternatives | None]:
        return self._next[1:]

    def abort(self) -> None:
        """On vLLM's loop, after ``cancelled`` was set."""
        if self.reading is not None:
            self.reading.cancel()


class VllmGeneration:
    """A running generation: cancel it, or wait for its result."""

    def __init__(self, row: _Row | None, future: Future[GenerateResult], core: Core) -> None:
        self._row, self.future, self._core = row, future, core

    def cancel(self) -> None:
        """Stop generating; the future then holds what there is, with finish reason ``cancelled``."""
        if self._row is not None and not self.future.done():
            self._row.cancelled = True
            self._core.soon(self._row.abort)


class VllmQueue:
    """Hands requests to vLLM as they come; it batches them whatever their adapters. Thread-safe."""

    def __init__(self, engine: VllmEngine, *, max_waiting_tokens: int | None = None) -> None:
        """``max_waiting_tokens``: see :class:`~qwen_ray.serving.backlog.Backlog`."""
        self.engine = engine
        self.backlog = Backlog(max_waiting_tokens)
        self._scoring = 0
        self._rows: dict[int, _Row] = {}

    def score(self, items: Sequence[ScoreItem]) -> Future[list[ScoreResult]]:
        """Log-probabilities of each item's continuations. The future raises :class:`UserError` if an item is
        invalid or if too much waits (429)."""
        try:
            for item in items:
                self.engine.check_score(item)
            place = self.backlog.enter(sum(map(_cost, items)))
        except UserError as e:
            return _failed(e)
        return self._run(partial(self._score, items), place)

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: OnTokenOf | None = None
    ) -> list[VllmGeneration]:
        """Continue the prompts of one client's request: all of them or, if one is invalid or too much waits
        (429), none. ``on_token`` runs on vLLM's loop, so it must be quick."""
        core = self.engine.core
        try:
            rows, places = _Row.enter(self.engine, requests, on_token, self.backlog)  # type: ignore[arg-type]
        except UserError as e:
            return [VllmGeneration(None, _failed(e), core) for _ in requests]
        return [
            VllmGeneration(row, self._run(partial(self._generate, row, place), place), core)
            for row, place in zip(rows, places, strict=True)
        ]

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` here: vLLM itself changes its adapters between two steps."""
        return function()

    def stop(self) -> None:
        """End vLLM; what is queued or running fails."""
        self.engine.close()

    @property
    def alive(self) -> bool:
        return self.engine.core.alive

    @property
    def load(self) -> dict[str, int]:
        """How much is running or waiting in vLLM (for health and metrics)."""
        started = [bool(row.result.ids) for row in list(self._rows.values())]
        return {
            "score_requests": self._scoring,
            "waiting": started.count(False),
            "generating": started.count(True),
            "waiting_tokens": self.backlog.waiting,
            "max_waiting_tokens": self.backlog.most,
            "tokens_per_second": round(self.backlog.speed),
        }

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]], place: Place) -> Future[T]:
        async def guarded() -> T:
            try:
                return await work()
            except asyncio.CancelledError:  # of the loop as a whole: a caller who gives up does not listen
                raise RuntimeError("the server is stopping") from None

        future = self.engine.core.run(guarded())
        # Not in the coroutine: one that is cancelled before its first step never runs.
        future.add_done_callback(lambda _: place.leave())
        return future

    # -- on vLLM's loop

    async def _score(self, items: Sequence[ScoreItem]) -> list[ScoreResult]:
        self._scoring += 1
        try:
            return list(await asyncio.gather(*map(self._score_item, items)))
        finally:
            self._scoring -= 1

    async def _score_item(self, item: ScoreItem) -> ScoreResult:
        """Every continuation is a request of its own: vLLM does not share a context between them."""
        length = self.engine.context_length
        continuations = item.continuations or ((),)
        parts = await asyncio.gather(
            *(self._read(item, item.context[-(length + 1 - len(c)) :], c) for c in continuations)
        )
        self.backlog.work(_cost(item))
        return ScoreResult(
            [score for score, _ in parts][: len(item.continuations)],
            truncated=truncated(item, context_length=length),
            next_token=parts[0][1] if item.next_token else None,
        )

    async def _read(
        self, item: ScoreItem, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[ContinuationScore, Alternatives]:
        """The continuation's scores, and the likeliest tokens after it."""
        from vllm import SamplingParams

        score = ContinuationScore([], True)
        following: Alternatives = []
        if not continuation and not item.next_token:
            return score, following
        # With prompt log-probabilities vLLM leaves its prefix cache unread, or they would be wrong.
        params = SamplingParams(
            temperature=0.0,
            max_tokens=1,
            prompt_logprobs=item.top if continuation else None,
            logprobs=max(1, item.top) if item.next_token else None,
            ignore_eos=True,
            detokenize=False,
        )
        prompt = [*context, *continuation]
        async for output in self.engine.core.outputs(prompt, params, self.engine.lora(item.adapter)):
            for target, entries in zip(
                continuation, (output.prompt_logprobs or [])[len(context) :], strict=True
            ):
                own = entries[target]
                score.logprobs.append(_number(own.logprob))
                score.greedy = score.greedy and own.rank == 1
                if item.top:
                    score.top.append(_likeliest(entries, item.top))
            if item.next_token:
                following = _likeliest(output.outputs[0].logprobs[0], max(1, item.top))
        return score, following

    async def _generate(self, row: _Row, place: Place) -> GenerateResult:
        self._rows[id(row)] = row
        try:
            if not row.cancelled:
                row.reading = asyncio.ensure_future(self._tokens(row, place))
                await row.reading
        except asyncio.CancelledError:
            if not row.cancelled:
                raise
        finally:
            del self._rows[id(row)]
        if not row.done:
            row.result.finish_reason = "cancelled"
        return row.result

    async def _tokens(self, row: _Row, place: Place) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        request = row.request
        params = SamplingParams(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            max_tokens=row.limit,
            logprobs=request.logprobs,
            stop_token_ids=sorted(self.engine.eos_ids),
            detokenize=False,  # the text and its stop strings are ours, the same with every engine
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self.engine.core.outputs(request.prompt, params, self.engine.lora(request.adapter))
        try:
            async for output in outputs:
                part = output.outputs[0]
                if part.token_ids and not row.result.ids:
                    place.start()
                    self.backlog.work(len(request.prompt))
                self.backlog.work(len(part.token_ids))
                for i, token in enumerate(part.token_ids):
                    if request.logprobs is None:
                        row.take(token, None, None)
                    else:
                        entries = part.logprobs[i]
                        own = _number(entries[token].logprob)
                        row.take(token, own, _likeliest(entries, request.logprobs))
                    if row.done:
                        return
        finally:
            await outputs.aclose()


def _cost(item: ScoreItem) -> int:
    """Tokens that vLLM reads for it."""
    continuations = item.continuations or ((),)
    return sum(len(item.context) + len(tokens) for tokens in continuations)


def _likeliest(entries: Mapping[int, Any], count: int) -> Alternatives:
    """The first ``count`` of vLLM's entries by rank; the token itself may be one more than asked for."""
    ranked = sorted(entries.items(), key=lambda entry: entry[1].rank)
    return [(token, _number(entry.logprob)) for token, entry in ranked[:count]]


def _number(logprob: float) -> float:
    if math.isnan(logprob):
        raise FloatingPointError("the model's output is not a number")
    return float(logprob)


def _failed(error: Exception) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future
