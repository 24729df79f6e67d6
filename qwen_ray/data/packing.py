"""Rows: several examples side by side in one sequence, isolated from one another; and batches of rows.

Isolation is by document: a token attends only to tokens of its own document, and positions start at 0 in
each, so packed and unpacked give the same logits. A batch has no padding and no row borders: all its
documents lie end to end, and :attr:`Batch.offsets` says where each starts.
"""

from __future__ import annotations

import dataclasses
import random
from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from qwen_ray.data.mixture import Mixture, UsedUp
from qwen_ray.data.order import NEIGHBOURHOOD
from qwen_ray.data.tokenise import IGNORE, Example

if TYPE_CHECKING:
    import torch


PLANNING_ROUNDS = 3
"""How often a run of so many rows is laid out to see what they hold: it moves the stages, and so the rows."""
LEAST_SHARE = 1 / 8
"""A window of less than this part of its rows does not end with a pass or phase: half a row stays empty."""


@dataclass(frozen=True, slots=True)
class Row:
    """Examples laid end to end."""

    examples: tuple[Example, ...]

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids of the records in the row."""
        return tuple(e.id for e in self.examples)

    @property
    def tokens(self) -> int:
        return sum(len(e.ids) for e in self.examples)

    @property
    def supervised(self) -> int:
        """Number of tokens that carry loss."""
        return sum(e.supervised for e in self.examples)


class RowStream:
    """A resumable stream of rows drawn from a mixture; it ends where the mixture is used up.

    With packing, examples are drawn in the mixture's order until no more fit into ``window`` rows, packed by
    best fit (:func:`pack`), and given out in a shuffled order, so that a row's size does not depend on when
    it comes. Every example drawn is in exactly one row. A window ends with a pass and with a phase of the
    mixture, but for a few rows, and is small beside a pass that a curriculum orders: else a small data set's
    passes, stages or whole curriculum would be one window, in any order. The state is the mixture's at the
    start of the window and the number of rows given out since; the window is made anew from it.

    Without packing a row is one example, and there is no window.

    Rows are laid out by the ``lengths`` of examples (tokens; those of ``examples`` if not given); an example
    itself is looked up when its row is given out.
    """

    def __init__(
        self,
        examples: Mapping[str, Sequence[Example]],
        mixture: Mixture,
        *,
        max_length: int,
        packing: bool,
        window: int = 64,
        lengths: Mapping[str, Sequence[int]] | None = None,
    ) -> None:
        self._examples, self.mixture = examples, mixture
        self._lengths = lengths_of(examples) if lengths is None else lengths
        self._max_length, self._packing, self._window = max_length, packing, window
        self._end: int | None = None
        """The draw at which the planned run ends: a window never reaches beyond it."""
        self._start = mixture.state()
        self._served = 0
        self._rows: list[tuple[list[tuple[str, int]], int]] = []
        """Draws of each row of the window with what they cost in the mixture's unit; ``_given`` are out."""
        self._given = 0

    def plan(self, *, rows: int | None = None, passes: float = 1.0) -> int:
        """Fix the length of the run: ``rows`` rows, else ``passes`` passes. Returns its number of rows,
        which is smaller where the mixture is used up before.

        That decides where the mixture's stages change, and where the last window is cut: the rows of a run
        of n whole passes hold every example of the domain that limits a pass n times or more. To be called
        once, before the first row or before :meth:`load_state`. The stream goes on after the run's end.
        """
        mixture = self.mixture
        state = self.state()
        self._end = None
        if rows is None:
            self._end = mixture.plan_passes(passes)
            self._rewind()
            rows = 0
            while rows == 0 or mixture.drawn < self._end or self._given < len(self._rows):
                self._next_draws()
                rows += 1
        else:
            if mixture.needs_length:
                mixture.plan(rows / self._rows_a_cost)
                for _ in range(PLANNING_ROUNDS):  # rows are not quite full; how full shows when they are made
                    self._skip(rows)
                    mixture.plan(self._served)
            if mixture.limits:
                rows = self._skip(rows)
        self.load_state(state)
        return rows

    def rows_in(self, passes: float) -> int:
        """How many rows ``passes`` passes over the mixture make; the stream and its plan stay as they are."""
        end, total, state = self._end, self.mixture.total, self.state()
        rows = self.plan(passes=passes)
        self._end = end
        self.mixture.plan(total)
        self.load_state(state)
        return rows

    @property
    def served(self) -> int:
        """Cost of the rows given out so far, in the mixture's unit."""
        return self._served

    @property
    def passes(self) -> float:
        """Passes over the mixture given out so far."""
        return self.mixture.passes(self._served)

    def next_row(self) -> Row:
        """The next row; never longer than ``max_length`` tokens, as no example is. Raises
        :class:`~qwen_ray.data.mixture.UsedUp` after the last."""
        return Row(tuple(self._examples[domain][index] for domain, index in self._next_draws()))

    def _next_draws(self) -> list[tuple[str, int]]:
        """What the next row holds."""
        if not self._packing:
            draw = self.mixture.draw()
            self._served = self.mixture.served
            return [draw]
        if self._given == len(self._rows):
            self._open_window()
        draws, cost = self._rows[self._given]
        self._given += 1
        self._served += cost
        return draws

    def state(self) -> dict[str, Any]:
        """Where the stream stands; JSON."""
        if not self._packing:
            return self.mixture.state()
        if self._given == len(self._rows):
            return {**self.mixture.state(), "given": 0}
        return {**self._start, "given": self._given}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved :meth:`state` of a stream over the same data with the same plan."""
        self.mixture.load_state(state)
        self._rows, self._given, self._served = [], 0, self.mixture.served
        for _ in range(state.get("given", 0)):
            self._next_draws()

    @cached_property
    def _rows_a_cost(self) -> float:
        """Rows that a unit of cost makes over the whole run, if they are full."""
        mixture, total = self.mixture, 0.0
        for domain, share in mixture.shares.items():
            lengths = self._lengths[domain]
            rows = sum(lengths) / self._max_length if self._packing else len(lengths)
            total += share * rows / mixture.costs[domain]
        return total

    def _rewind(self) -> None:
        self.mixture.rewind()
        self._rows, self._given, self._served = [], 0, 0

    def _skip(self, rows: int) -> int:
        """Go through the first ``rows`` rows without making them; returns how many there are."""
        self._rewind()
        for n in range(rows):
            try:
                self._next_draws()
            except UsedUp:
                return n
        return rows

    def _window_rows(self) -> int:
        """Rows of a window. Beside a pass in a curriculum's order it moves examples no further than that."""
        mixture = self.mixture
        if mixture.curriculum == "shuffled":
            return self._window
        rows = min(mixture.pass_length, mixture.total) * self._rows_a_cost
        return max(1, min(self._window, int(NEIGHBOURHOOD * rows)))

    def _open_window(self) -> None:
        """Draw and pack the longest run of examples of one part that fits into the window's rows."""
        mixture, window = self.mixture, self._window_rows()
        if mixture.used_up:
            raise UsedUp
        self._start, first, part = mixture.state(), mixture.drawn, mixture.part
        room = window * self._max_length
        few = room - int(room * LEAST_SHARE)  # room that is left while a window is too small to end early
        drawn: list[tuple[str, int]] = []
        lengths: list[int] = []
        while not mixture.used_up and (self._end is None or first >= self._end or mixture.drawn < self._end):
            domain, index = mixture.peek()
            length = self._lengths[domain][index]
            if drawn and (length > room or (room <= few and mixture.part != part)):
                break
            room -= length
            drawn.append(mixture.draw())
            lengths.append(length)
        bins = best_fit(lengths, self._max_length)
        while len(bins) > window:
            # A row too many, mostly of a few tokens. It would be nearly empty, so about as many tokens as it
            # holds go back to the mixture, last drawn first.
            over = sorted(sum(lengths[i] for i in b) for b in bins)[: len(bins) - window]
            excess = sum(over)
            while excess > 0:
                excess -= lengths.pop()
                mixture.undraw(*drawn.pop())
            bins = best_fit(lengths, self._max_length)
        random.Random(f"{mixture.seed}/rows/{first}").shuffle(bins)
        self._rows = [([drawn[i] for i in b], sum(mixture.cost(*drawn[i]) for i in b)) for b in bins]
        self._given = 0


def lengths_of(examples: Mapping[str, Iterable[Example]]) -> dict[str, Sequence[int]]:
    """Tokens of each example, by domain; 4 bytes each."""
    return {domain: array("I", (len(e.ids) for e in members)) for domain, members in examples.items()}


def best_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack lengths into bins of ``max_length`` by best fit decreasing; returns the indices in each bin.

    Longest first, each into the fullest bin that has room, else into a new one (Ding et al., "Fewer
    Truncations Improve Language Modeling", arXiv 2404.10830). Bins are kept sorted by their room, so the
    best is found by bisection. The same lengths always give the same bins.
    """
    bins: list[list[int]] = []
    open_bins: list[tuple[int, int]] = []  # (room, bin), ascending
    if not lengths:
        return bins
    shortest = min(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(open_bins, (lengths[i], 0))
        if at < len(open_bins):
            room, b = open_bins.pop(at)
            bins[b].append(i)
        else:
            room, b = max_length, len(bins)
            bins.append([i])
        room -= lengths[i]
        if room >= shortest:
            insort(open_bins, (room, b))
    return bins


def pack(examples: Iterable[Example], *, max_length: int, packing: bool) -> list[Row]:
    """Rows of a fixed list of examples (validation data), by best fit; without packing one each."""
    examples = list(examples)
    if not packing:
        return [Row((example,)) for example in examples]
    bins = best_fit([len(e.ids) for e in examples], max_length)
    return [Row(tuple(examples[i] for i in b)) for b in bins]


@dataclass(frozen=True, slots=True)
class Batch:
    """Documents of some rows laid end to end: T tokens in D documents, S of them predicted."""

    input_ids: torch.Tensor
    """[1, T] int64."""
    position_ids: torch.Tensor
    """[1, T] int64, from 0 in each document."""
    offsets: torch.Tensor
    """[D + 1] int32: the start of each document, then T. Kernels call it cu_seqlens."""
    lengths: tuple[int, ...]
    """Length of each document, on the host, so that nothing waits for the device."""
    where: torch.Tensor
    """[S] int64: positions whose hidden state predicts a token that carries loss, the one after."""
    targets: torch.Tensor
    """[S] int64: the tokens they predict."""
    domains: torch.Tensor
    """[S] int64: the number of the domain that each of these tokens is of."""
    tokens: int
    """Number of tokens without padding."""
    supervised: int
    """S."""

    def to(self, device: torch.device | str) -> Batch:
        """A copy on ``device``. To a GPU it goes through pinned memory and is not waited for."""
        import torch

        device = torch.device(device)

        def move(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                tensor = tensor.pin_memory()
            return tensor.to(device, non_blocking=True)

        return dataclasses.replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            offsets=move(self.offsets),
            where=move(self.where),
            targets=move(self.targets),
            domains=move(self.domains),
        )


def collate(
    rows: Sequence[Row],
    pad_id: int,
    *,
    pad_to: int | None = None,
    domains: Mapping[str, int] | None = None,
) -> Batch:
    """Make a :class:`Batch` of rows, on the CPU.

    ``pad_to`` fixes T: the rest is documents of ``pad_id`` without loss, none longer than the longest real
    one. Without any row the batch is one token of padding. ``domains`` numbers the domains; without it all
    are 0. Raises ValueError if the rows are longer.
    """
    import numpy as np
    import torch

    documents = [e for row in rows for e in row.examples]
    lengths = [len(e.ids) for e in documents]
    tokens = sum(lengths)
    total = max(1, tokens) if pad_to is None else pad_to
    if tokens > total:
        raise ValueError(f"{tokens} tokens do not fit into a batch of {total}")
    longest = max(lengths, default=total)
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, longest))

    input_ids = np.full(total, pad_id, dtype=np.int64)
    labels = np.full(total, IGNORE, dtype=np.int64)
    input_ids[:tokens] = [token for e in documents for token in e.ids]
    labels[:tokens] = [label for e in documents for label in e.labels]
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    labels[offsets[:-1]] = IGNORE  # nothing predicts the first token of a document
    (predicted,) = np.nonzero(labels != IGNORE)
    position_ids = np.arange(total) - np.repeat(offsets[:-1], lengths)
    numbers = np.array([(domains or {}).get(e.domain, 0) for e in documents], dtype=np.int64)
    return Batch(
        input_ids=torch.from_numpy(input_ids)[None],
        position_ids=torch.from_numpy(position_ids)[None],
        offsets=torch.from_numpy(offsets),
        lengths=tuple(lengths),
        where=torch.from_numpy(predicted - 1),
        targets=torch.from_numpy(labels[predicted]),
        domains=torch.from_numpy(np.repeat(numbers, [e.supervised for e in documents])),
        tokens=tokens,
        supervised=len(predicted),
    )
