"""The rows of each step, this worker's share of them, laid out while the step before is computed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_ray.data.mixture import UsedUp
from qwen_ray.data.packing import Batch, Row, RowStream, collate
from qwen_ray.data.tokenise import IGNORE, Example
from qwen_ray.training.throughput import attended_length


@dataclass(frozen=True)
class Step:
    """One step's data. Counts are of the global batch, ``batches`` and ``ids`` are this worker's."""

    batches: list[Batch]
    ids: list[str]
    tokens: int
    supervised: int
    supervised_of: dict[str, int]
    """Supervised tokens of each domain that has any."""
    padded: int
    """Tokens that are computed, padding among them; this worker's times the number of workers."""
    attended: float
    """Length of the document that a token is in, on average."""
    state: dict[str, Any]
    """Of the stream, after this step's rows."""
    passes: float
    """Passes over the mixture by the end of this step."""


@dataclass(frozen=True)
class Feed:
    """How a worker lays out rows. Every worker draws the whole stream, so none need ask another."""

    rank: int
    world_size: int
    batch_size: int
    pad_id: int
    pad_to: int | None = None
    """Length of a row of fixed-size batches; without it batches are as long as their documents."""
    domains: Mapping[str, int] = field(default_factory=dict)
    """The number of each domain, by which a batch names it."""

    def batches(self, rows: Sequence[Row]) -> list[Batch]:
        """This rank's share of ``rows``; every rank gets equally many batches."""
        own = list(rows[self.rank :: self.world_size])
        blank = Row((Example("", "", [self.pad_id], [IGNORE]),))
        own += [blank] * (-(-len(rows) // self.world_size) - len(own))
        length = self.pad_to and self.pad_to * self.batch_size
        return [
            collate(own[i : i + self.batch_size], self.pad_id, pad_to=length, domains=self.domains)
            for i in range(0, len(own), self.batch_size)
        ]

    def steps(self, stream: RowStream, *, rows: int, count: int) -> Generator[Step, None, None]:
        """``count`` steps of ``rows`` rows each, one ahead of what is asked for. The last may be smaller,
        where the stream ends. Close it where not all are taken."""
        ready: queue.Queue[Step | BaseException] = queue.Queue(maxsize=1)
        stopped = threading.Event()

        def put(item: Step | BaseException) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.1)
                    return

        def draw() -> None:
            try:
                for _ in range(count):
                    if stopped.is_set():
                        return
                    put(self._step(stream, rows))
            except BaseException as e:
                put(e)

        thread = threading.Thread(target=draw, name="feed", daemon=True)
        thread.start()
        try:
            for _ in range(count):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()  # a thread in a tensor operation while the interpreter ends aborts the process

    def _step(self, stream: RowStream, rows: int) -> Step:
        drawn: list[Row] = []
        with contextlib.suppress(UsedUp):
            while len(drawn) < rows:
                drawn.append(stream.next_row())
        supervised = Counter[str]()
        for row in drawn:
            for e in row.examples:
                supervised[e.domain] += e.supervised
        batches = self.batches(drawn)
        return Step(
            batches=batches,
            ids=[e.id for row in drawn[self.rank :: self.world_size] for e in row.examples],
            tokens=sum(row.tokens for row in drawn),
            supervised=max(1, supervised.total()),
            supervised_of={domain: n for domain, n in sorted(supervised.items()) if n},
            padded=sum(batch.input_ids.numel() for batch in batches) * self.world_size,
            attended=attended_length(len(e.ids) for row in drawn for e in row.examples),
            state=stream.state(),
            passes=stream.passes,
        )
