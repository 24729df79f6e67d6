"""The adapters of a pack's lanes, and what training needs of them.

The values of a lane are a row, A of every layer and then B of every layer, and the rows lie end to end in one
tensor. Where products are made lane by lane (CPU), a row has its trial's own rank and layers. Where they are
batched over lanes (GPU), rows are zero-padded to one rank and one set of layers. What is padded stays exactly
zero: with A's row and B's column both zero, so is the gradient of each, for it is a product with the other.
The same holds for a layer that a lane does not adapt at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

Pair = tuple[torch.Tensor, torch.Tensor]
_RANK_STEP = 8
"""Padded ranks are a multiple: matrix units of a GPU take 16 bytes at a time."""


class Lane(NamedTuple):
    """What a lane's adapter is like."""

    rank: int
    scale: float
    """What its update is multiplied by."""
    layers: frozenset[str]
    """Those it adapts."""


@dataclass(frozen=True)
class Layout:
    """Where each layer's A and B lie in a lane's row: all A, then all B."""

    shapes: Mapping[str, tuple[int, int]]
    """Layer -> (inputs, outputs)."""
    rank: int

    @cached_property
    def split(self) -> int:
        """Columns of A; those of B follow."""
        return self.rank * sum(inputs for inputs, _ in self.shapes.values())

    @cached_property
    def columns(self) -> int:
        return self.split + self.rank * sum(outputs for _, outputs in self.shapes.values())

    def views(self, rows: torch.Tensor) -> dict[str, Pair]:
        """A ``[..., R, in]`` and B ``[..., out, R]`` of each layer in rows ``[..., P]``."""
        views, a, b = {}, 0, self.split
        for name, (inputs, outputs) in self.shapes.items():
            to_a, to_b = a + self.rank * inputs, b + self.rank * outputs
            views[name] = (
                rows[..., a:to_a].unflatten(-1, (self.rank, inputs)),
                rows[..., b:to_b].unflatten(-1, (outputs, self.rank)),
            )
            a, b = to_a, to_b
        return views


@torch.no_grad()
def move(row: torch.Tensor, layout: Layout, target: torch.Tensor, to: Layout) -> None:
    """Copy a lane's row ``[P]`` into one of another layout, which has room for what is not zero."""
    if layout == to:
        target.copy_(row)
        return
    rank, theirs = min(layout.rank, to.rank), to.views(target)
    for name, (a, b) in layout.views(row).items():
        if name in theirs:
            theirs[name][0][:rank].copy_(a[:rank])
            theirs[name][1][:, :rank].copy_(b[:, :rank])


class Rows:
    """A row ``[P]`` of each lane, by its number, in one tensor."""

    def __init__(self, whole: torch.Tensor, layouts: Sequence[Layout]) -> None:
        self.whole = whole
        self._rows = whole.split([layout.columns for layout in layouts])

    def __getitem__(self, lane: int) -> torch.Tensor:
        return self._rows[lane]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._rows)


class Factors(NamedTuple):
    """A lane's adapter of one layer: A ``[r, in]``, B ``[out, r]``, both transposed too, and their scale."""

    a: torch.Tensor
    a_t: torch.Tensor
    b: torch.Tensor
    b_t: torch.Tensor
    scale: float
    grads: Pair | None
    """Of A and B, where the lane is trained."""


class Bank:
    """The adapters of K lanes, a copy in the format of matrix products, and what training needs of them."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        lanes: Sequence[Lane],
        *,
        padded: bool,
        device: torch.device,
        dtype: torch.dtype,
        compute: torch.dtype,
        trains: bool = False,
        old: tuple[Bank, Sequence[int | None]] | None = None,
    ) -> None:
        """``shapes``: (inputs, outputs) of each layer that can be adapted.

        All values are zero, but for lanes that come from an ``old`` bank: it, and of each lane which one it
        was there. The old bank is used up: its tensors go one by one as the new are made.
        """
        self.lanes, self.padded = list(lanes), padded
        self.layouts = layouts = _layouts(shapes, self.lanes, padded=padded)
        """Of each lane's row."""
        was, kept = ([], {}) if old is None else old[0].give()
        sources: Sequence[int | None] = () if old is None else old[1]

        def rows(name: str) -> Rows:
            columns = sum(layout.columns for layout in layouts)
            fresh = Rows(torch.zeros(columns, dtype=dtype, device=device), layouts)
            before = kept.pop(name, None)
            for lane, source in enumerate(sources):
                if before is not None and source is not None:
                    move(before[source], was[source], fresh[lane], layouts[lane])
            return fresh

        self.values = rows("values")
        # The values themselves where the format is the same.
        self._copy = Rows(self.values.whole.to(compute), layouts)
        self.moments: dict[str, Rows] = {}
        """AdamW's, under its names for them."""
        self.trains = trains
        if trains:
            self.moments = {name: rows(name) for name in ("exp_avg", "exp_avg_sq")}
            self.grads = rows("grads")
        self.scale = torch.tensor([lane.scale for lane in lanes], device=device, dtype=compute)[:, None, None]
        self.stacked: dict[str, Pair] = {}
        """Padded: A ``[K, R, in]`` and B ``[K, out, R]`` of each layer."""
        self.stacked_grads: dict[str, Pair] = {}
        """Padded, and trained."""
        self.factors: dict[str, dict[int, Factors]] = {}
        """Not padded: layer -> lane -> its adapter."""
        if padded:
            size = len(layouts), layouts[0].columns
            self.stacked = layouts[0].views(self._copy.whole.view(size))
            self.stacked_grads = layouts[0].views(self.grads.whole.view(size)) if trains else {}
        else:
            for lane in range(len(layouts)):
                self._add_factors(lane)

    def _add_factors(self, lane: int) -> None:
        layout = self.layouts[lane]
        grads = layout.views(self.grads[lane]) if self.trains else {}
        for name, (a, b) in layout.views(self._copy[lane]).items():
            self.factors.setdefault(name, {})[lane] = Factors(
                a, a.t(), b, b.t(), self.lanes[lane].scale, grads.get(name)
            )

    def give(self) -> tuple[list[Layout], dict[str, Rows]]:
        """Hand over what is kept of the lanes. The bank cannot be used any more."""
        given = self.layouts, {"values": self.values, **self.moments}
        vars(self).clear()  # its views would keep the tensors alive
        return given

    def refresh(self) -> None:
        """To be called when values have changed."""
        if self._copy.whole is not self.values.whole:
            self._copy.whole.copy_(self.values.whole)

    def halves(self, rows: Rows, lane: int) -> Pair:
        """All A and all B of a lane, each ``[1, columns]``, in ``values`` or what is laid out like them."""
        row, split = rows[lane][None], self.layouts[lane].split
        return row[:, :split], row[:, split:]


def _layouts(shapes: Mapping[str, tuple[int, int]], lanes: Sequence[Lane], *, padded: bool) -> list[Layout]:
    if not padded:
        return [
            Layout({name: shape for name, shape in shapes.items() if name in lane.layers}, lane.rank)
            for lane in lanes
        ]
    every = frozenset[str]().union(*(lane.layers for lane in lanes))
    rank = -(-max(lane.rank for lane in lanes) // _RANK_STEP) * _RANK_STEP
    return [Layout({name: shape for name, shape in shapes.items() if name in every}, rank)] * len(lanes)
