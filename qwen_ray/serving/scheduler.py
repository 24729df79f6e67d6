"""One thread that owns the model and shares it fairly between requests.

Requests are gathered for a few milliseconds and run together whatever their adapters. Scoring forwards and
decode steps take turns, so a long generation does not hold up a score request nor the other way round. A
request is checked alone before it joins a batch, and if a batch fails its requests run again one by one:
only the culprit gets the error.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.serving.backlog import Backlog, Place
from qwen_ray.serving.engines.base import GenerateRequest, GenerateResult, OnTokenOf, ScoreItem, ScoreResult
from qwen_ray.serving.engines.decode import DecodeBatch, DecodeRow
from qwen_ray.serving.engines.torch import MAX_ROWS

if TYPE_CHECKING:
    from qwen_ray.serving.engines.packing import ScoreBatch
    from qwen_ray.serving.engines.torch import TorchEngine

log = logging.getLogger(__name__)

GATHER_SECONDS = 0.004  # waited for company after the first request of an idle moment
_MAX_BATCHES = 4  # generation batches decoded in turn; further requests wait for one to end
_SCORE_WINDOW = 512  # score items planned together, so that those that begin alike or are as long meet


@dataclass
class _Score:
    items: Sequence[ScoreItem]
    future: Future[list[ScoreResult]]
    tokens: int
    place: Place
    results: list[ScoreResult] = field(default_factory=list)
    missing: int = 0  # batches still to run


@dataclass
class _Row:
    row: DecodeRow
    future: Future[GenerateResult]
    place: Place


@dataclass
class _Window:
    """Score requests planned together. ``owner``: for each item, its request and its place in it."""

    requests: list[_Score]
    items: list[ScoreItem]
    owner: list[tuple[_Score, int]]
    batches: deque[ScoreBatch]


class Generation:
    """A running generation: cancel it, or wait for its result."""

    def __init__(self, row: DecodeRow | None, future: Future[GenerateResult]) -> None:
        self._row, self.future = row, future

    def cancel(self) -> None:
        """Stop generating; the future then holds what there is, with finish reason ``cancelled``."""
        if self._row is not None:
            self._row.cancelled = True


class Scheduler:
    """Queues in front of a :class:`~qwen_ray.serving.engines.torch.TorchEngine`. Thread-safe."""

    def __init__(
        self,
        engine: TorchEngine,
        *,
        gather_seconds: float = GATHER_SECONDS,
        max_waiting_tokens: int | None = None,
    ) -> None:
        """``max_waiting_tokens``: see :class:`~qwen_ray.serving.backlog.Backlog`."""
        self.engine, self._gather = engine, gather_seconds
        self._backlog = Backlog(max_waiting_tokens)
        self._condition = threading.Condition()
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._scores: deque[_Score] = deque()
        self._rows: deque[_Row] = deque()
        self._window: _Window | None = None
        self._batches: deque[DecodeBatch] = deque()
        self._running: dict[DecodeRow, _Row] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        self._thread.start()

    # -- for callers, any thread

    def score(self, items: Sequence[ScoreItem]) -> Future[list[ScoreResult]]:
        """Queue a score request; its future raises :class:`UserError` if an item is invalid or if too much
        waits (429)."""
        future: Future[list[ScoreResult]] = Future()
        try:
            for item in items:
                self.engine.check_score(item)
            tokens = sum(len(item.context) + sum(map(len, item.continuations)) for item in items)
            place = self._backlog.enter(tokens)
            self._put(self._scores, _Score(items, future, tokens, place, self.engine.blank_results(items)))
        except UserError as e:
            future.set_exception(e)
        return future

    def generate(
        self, requests: Sequence[GenerateRequest], on_token: OnTokenOf | None = None
    ) -> list[Generation]:
        """Queue the generations of one client's request: all of them or, if one is invalid or too much waits
        (429), none. ``on_token`` runs on the model's thread, so it must be quick."""
        futures: list[Future[GenerateResult]] = [Future() for _ in requests]
        try:
            rows, places = DecodeRow.enter(self.engine, requests, on_token, self._backlog)
        except UserError as e:
            for future in futures:
                future.set_exception(e)
            return [Generation(None, future) for future in futures]
        self._put(self._rows, *map(_Row, rows, futures, places))
        return [Generation(row, future) for row, future in zip(rows, futures, strict=True)]

    def call(self, function: Callable[[], Any]) -> Any:
        """Run ``function`` on the model's thread, between forwards, and return what it returns."""
        if threading.current_thread() is self._thread:
            return function()
        future: Future[Any] = Future()
        self._put(self._calls, (function, future))
        return future.result()

    def stop(self) -> None:
        """End the thread; what is queued or running is cancelled."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def load(self) -> dict[str, int]:
        """How much is queued, running and kept (for health and metrics)."""
        prefixes = self.engine.prefixes
        return {
            "score_requests": len(self._scores) + (len(self._window.requests) if self._window else 0),
            "waiting": len(self._rows),
            "generating": sum(len(batch.rows) for batch in list(self._batches)),
            "waiting_tokens": self._backlog.waiting,
            "max_waiting_tokens": self._backlog.most,
            "tokens_per_second": round(self._backlog.speed),
            "prefix_bytes": 0 if prefixes is None else prefixes.nbytes,
            "max_prefix_bytes": 0 if prefixes is None else prefixes.max_bytes,
        }

    def _put(self, queue: deque[Any], *entries: Any) -> None:
        with self._condition:
            if self._stopping:
                raise RuntimeError("the scheduler has stopped")
            queue.extend(entries)
            self._condition.notify()

    # -- the model's thread

    def _run(self) -> None:
        try:
            while True:
                with self._condition:
                    idle = not (self._window or self._batches)
                    while idle and not (self._calls or self._scores or self._rows or self._stopping):
                        self._condition.wait()
                    if self._stopping:
                        break
                if idle and (self._scores or self._rows):
                    time.sleep(self._gather)
                self._turn()
        finally:  # also where a turn failed: nobody waits for what never comes
            with self._condition:
                self._stopping = True
            self._abandon()

    def _turn(self) -> None:
        """One round: pending calls, one scoring forward, one step of one generation batch."""
        while self._calls:
            function, future = self._calls.popleft()
            _settle(future, function)
        self._score_one()
        self._admit()
        if self._batches:
            batch = self._batches[0]
            self._batches.rotate(-1)
            self._step(batch)

    def _score_one(self) -> None:
        if self._window is None:
            self._window = self._open_window()
        window = self._window
        if window is None:
            return
        batch = window.batches.popleft()
        owners = {id(window.owner[i][0]): window.owner[i][0] for i in batch.items}
        wanted = any(not request.future.done() for request in owners.values())
        if wanted:
            scratch = [request.results[place] for request, place in window.owner]
            try:
                self.engine.run_score(batch, scratch)
            except Exception as e:
                self._score_alone(list(owners.values()), e)
            else:
                for request in owners.values():
                    request.missing -= 1
                    if request.missing == 0:
                        self._backlog.work(request.tokens)
                        request.place.leave()  # first: its client may send the next at once
                        _give(request.future, request.results)
        if not window.batches:
            for request in window.requests:
                request.place.leave()
            self._window = None

    def _open_window(self) -> _Window | None:
        requests: list[_Score] = []
        items: list[ScoreItem] = []
        owner: list[tuple[_Score, int]] = []
        while self._scores and (not requests or len(items) < _SCORE_WINDOW):
            request = self._scores.popleft()
            if request.future.cancelled():
                request.place.leave()
                continue
            requests.append(request)
            owner.extend((request, place) for place in range(len(request.items)))
            items.extend(request.items)
        if not requests:
            return None
        try:
            batches = deque(self.engine.plan_score(items))
        except Exception as e:
            self._score_alone(requests, e)
            return None
        for batch in batches:
            for request in {id(owner[i][0]): owner[i][0] for i in batch.items}.values():
                request.missing += 1
        for request in requests:
            if request.missing == 0:  # nothing but empty continuations
                request.place.leave()
                _give(request.future, request.results)
        return _Window(requests, items, owner, batches) if batches else None

    def _score_alone(self, requests: Sequence[_Score], error: Exception) -> None:
        """A shared plan or forward failed: run each request by itself, whole, and settle it here."""
        log.warning("scoring %d requests failed (%s); running them one by one", len(requests), error)
        for request in requests:
            if not request.future.done():
                request.place.leave()
                _settle(request.future, partial(self.engine.score, request.items))

    def _admit(self) -> None:
        while self._rows and len(self._batches) < _MAX_BATCHES:
            free = _MAX_BATCHES - len(self._batches)
            waiting = {
                entry.row: entry
                for entry in (self._rows.popleft() for _ in range(min(len(self._rows), free * MAX_ROWS)))
            }
            # First the group of the one that waits longest, or short prompts would never pass longer ones.
            order = {row: place for place, row in enumerate(waiting)}
            groups = sorted(
                self.engine.group_rows(list(waiting)), key=lambda group: min(order[row] for row in group)
            )[:free]
            for row in (row for group in groups for row in group):
                self._running[row] = waiting.pop(row)
                self._running[row].place.start()
            # To the front: the next batches to be stepped are the new ones' prefills.
            self._batches.extendleft(DecodeBatch(self.engine, group) for group in reversed(groups))
            self._rows.extendleft(reversed(waiting.values()))

    def _step(self, batch: DecodeBatch) -> None:
        rows = list(batch.rows)
        read = sum(len(row.request.prompt) for row in rows if not row.result.ids)
        before = sum(len(row.result.ids) for row in rows)
        try:
            batch.step()
        except Exception as e:
            self._batches.remove(batch)
            if len(rows) == 1:
                rows[0].error = e
            else:
                log.warning("a generation batch of %d failed (%s); running its rows one by one", len(rows), e)
                # A row is its tokens: each goes on alone from where it was.
                self._batches.extend(DecodeBatch(self.engine, [row]) for row in rows if not row.done)
        else:
            self._merge(batch)
            self._backlog.work(read + sum(len(row.result.ids) for row in rows) - before)
        for row in rows:
            if row.done:
                entry = self._running.pop(row)
                entry.place.leave()
                if row.error is not None:
                    _settle(entry.future, _raiser(row.error))
                else:
                    _give(entry.future, row.result)

    def _merge(self, batch: DecodeBatch) -> None:
        """Let a batch go when it is empty, or when another can take its rows (continuous batching)."""
        others = [other for other in self._batches if other is not batch]
        if not batch.rows or any(other.absorb(batch, most=MAX_ROWS) for other in others):
            self._batches.remove(batch)

    def _abandon(self) -> None:
        futures: list[Future[Any]] = [future for _, future in self._calls]
        scores = [*self._scores, *(self._window.requests if self._window else [])]
        futures += [request.future for request in scores]
        futures += [entry.future for entry in [*self._rows, *self._running.values()]]
        for future in futures:
            with contextlib.suppress(InvalidStateError):
                future.set_exception(RuntimeError("the server is stopping"))


def _give(future: Future[Any], value: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # its waiter has given up
        future.set_result(value)


def _settle(future: Future[Any], function: Callable[[], Any]) -> None:
    try:
        value = function()
    except Exception as e:
        with contextlib.suppress(InvalidStateError):
            future.set_exception(e)
    else:
        _give(future, value)


def _raiser(error: Exception) -> Callable[[], Any]:
    def fail() -> None:
        raise error

    return fail
