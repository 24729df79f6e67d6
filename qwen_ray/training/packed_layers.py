"""Linear layers that add another adapter's update to each segment of one sequence.

Lanes, each with an adapter of its own, lie end to end in a sequence ``[1, T]``. The frozen product is made
once for all of them; the update s B A x is made lane by lane, in one of two ways: small products over the
lanes' tokens (CPU, where a call is cheap), or batched products over lanes padded to the longest (GPU, where
it is not). A lane's numbers never meet another's: padding is zeros and is dropped again.

The adapters of all lanes are rows of one tensor ``[K, P]`` (:class:`Bank`), zero-padded to one rank and one
set of layers. What is padded stays exactly zero: with A's row and B's column both zero, so is the gradient
of each, for it is a product with the other. The same holds for a layer that a lane does not adapt at all.

Gradients are added to the bank's in the backward pass itself, not through autograd: no copy of the pack's
size is made, and a lane that sits out a pass is not touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (A ``[r, in]``, B ``[out, r]``), the scale folded into B."""

Pair = tuple[torch.Tensor, torch.Tensor]
_RANK_STEP = 8
"""Ranks are padded to a multiple: matrix units of a GPU take 16 bytes at a time."""


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


class Bank:
    """The adapters of K lanes, a copy in the format of matrix products, and what training needs of them."""

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        lanes: Sequence[tuple[int, float, frozenset[str]]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        compute: torch.dtype,
        trains: bool = False,
        old: tuple[Bank, Sequence[int | None]] | None = None,
    ) -> None:
        """``lanes``: rank, scale and adapted layers of each; ``shapes``: (inputs, outputs) of these layers.

        All values are zero, but for lanes that come from an ``old`` bank: it, and of each lane which one it
        was there. The old bank is used up: its tensors go one by one as the new are made.
        """
        self.ranks = [rank for rank, _, _ in lanes]
        self.scales = [scale for _, scale, _ in lanes]
        self.layers = [layers for _, _, layers in lanes]
        self.layout = layout = Layout(shapes, -(-max(self.ranks) // _RANK_STEP) * _RANK_STEP)
        self.scale = torch.tensor(self.scales, device=device, dtype=compute)[:, None, None]
        was, kept = (layout, {}) if old is None else old[0].give()
        sources = () if old is None else old[1]

        def rows(name: str) -> torch.Tensor:
            fresh = torch.zeros(len(lanes), layout.columns, dtype=dtype, device=device)
            if name in kept:
                before = kept.pop(name)
                for lane, source in enumerate(sources):
                    if source is not None:
                        move(before[source], was, fresh[lane], layout)
            return fresh

        self.values = rows("values")
        self._copy = self.values.to(compute)  # the values themselves where the format is the same
        self.weights = layout.views(self._copy)
        self.moments: dict[str, torch.Tensor] = {}
        """AdamW's, under its names for them."""
        if trains:
            self.moments = {name: rows(name) for name in ("exp_avg", "exp_avg_sq")}
            self.grads = rows("grads")
            self.gradients = layout.views(self.grads)

    def give(self) -> tuple[Layout, dict[str, torch.Tensor]]:
        """Hand over what is kept of the lanes. The bank cannot be used any more."""
        given = self.layout, {"values": self.values, **self.moments}
        vars(self).clear()  # its views would keep the tensors alive
        return given

    def refresh(self) -> None:
        """To be called when values have changed."""
        if self._copy is not self.values:
            self._copy.copy_(self.values)

    def halves(self, rows: torch.Tensor, lane: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All A and all B of a lane, each ``[1, columns]``, in ``values`` or what is laid out like them."""
        row = rows[lane : lane + 1]
        return row[:, : self.layout.split], row[:, self.layout.split :]


@dataclass(eq=False)
class Pass:
    """Whose tokens lie where in one forward pass."""

    bank: Bank
    spans: list[tuple[int, int, int]]
    """(lane, first token, token after the last), in order; every lane at most once."""
    batched: bool
    dropout: Mapping[int, tuple[float, torch.Generator]] = field(default_factory=dict)
    """Lane -> (rate, generator), where there is any."""
    _drawn: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Layer -> the generators' states before its masks were drawn."""

    def lanes(self, layer: str) -> list[tuple[int, int, int]]:
        """The spans whose lanes adapt ``layer``."""
        return [span for span in self.spans if layer in self.bank.layers[span[0]]]

    @cached_property
    def window(self) -> slice:
        """The lanes from the first to the last that takes part."""
        return slice(self.spans[0][0], self.spans[-1][0] + 1)

    @cached_property
    def longest(self) -> int:
        return max(end - start for _, start, end in self.spans)

    @cached_property
    def places(self) -> torch.Tensor | None:
        """Each token's place among lanes padded to the longest, int64 ``[T]``; None: it is its own."""
        first, longest = self.window.start, self.longest
        if self.spans[-1][2] == (self.window.stop - first) * longest:
            return None
        places = [
            torch.arange((lane - first) * longest, (lane - first) * longest + end - start)
            for lane, start, end in self.spans
        ]
        return torch.cat(places).to(self.bank.values.device)

    def pad(self, states: torch.Tensor) -> torch.Tensor:
        """``[T, d]`` as ``[K, longest, d]``, K lanes of the window."""
        lanes = self.window.stop - self.window.start
        if self.places is not None:
            padded = states.new_zeros(lanes * self.longest, states.shape[1])
            states = padded.index_copy_(0, self.places, states)
        return states.view(lanes, self.longest, -1)

    def unpad(self, padded: torch.Tensor) -> torch.Tensor:
        """The tokens of ``[K, longest, d]`` as ``[T, d]``."""
        states = padded.flatten(0, 1)
        return states if self.places is None else states.index_select(0, self.places)

    def drop(self, layer: str, states: torch.Tensor) -> torch.Tensor | None:
        """What the adapters' input ``[T, in]`` is multiplied by, or None. Asked again for a layer, it draws
        the same masks: so they are not kept for the backward pass, nor in recomputed layers.

        A generator draws for the layers in their order, as one process that trains the lane alone does.
        """
        lanes = [span for span in self.lanes(layer) if span[0] in self.dropout]
        if not lanes:
            return None
        generators = [self.dropout[lane][1] for lane, _, _ in lanes]
        now = [generator.get_state() for generator in generators]
        again = layer in self._drawn
        for generator, state in zip(generators, self._drawn.setdefault(layer, now), strict=True):
            generator.set_state(state)
        mask = torch.ones_like(states, dtype=torch.promote_types(states.dtype, torch.float32))
        for lane, start, end in lanes:
            rate, generator = self.dropout[lane]
            mask[start:end].bernoulli_(1 - rate, generator=generator).div_(1 - rate)
        if again:
            for generator, state in zip(generators, now, strict=True):
                generator.set_state(state)
        return mask


class Adapters:
    """What the layers of a model add: nothing, or the adapters of the pass under way."""

    def __init__(self, model: nn.Module) -> None:
        """Every linear layer but the output head can be adapted from now on. The head is never."""
        head = model.get_output_embeddings()  # type: ignore[operator]
        self.current: Pass | None = None
        self.shapes: dict[str, tuple[int, int]] = {}
        self.anchor = torch.zeros((), requires_grad=True)
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module is not head:
                self.shapes[name] = (module.in_features, module.out_features)
                module.forward = partial(self._linear, name, module)  # type: ignore[method-assign]

    def _linear(self, name: str, linear: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        current = self.current
        if current is None or not current.lanes(name):
            return F.linear(states, linear.weight, linear.bias)
        states = states.to(linear.weight.dtype)
        out: torch.Tensor = _Adapted.apply(states, self.anchor, linear.weight, linear.bias, name, current)
        return out


class _Adapted(torch.autograd.Function):
    """W x + s B A x. ``anchor`` makes the output require a gradient where the input does not."""

    @staticmethod
    def forward(  # noqa: PLR0917
        ctx: Any,
        states: torch.Tensor,
        anchor: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        layer: str,
        current: Pass,
    ) -> torch.Tensor:
        inner = states.flatten(0, -2)
        out = F.linear(inner, weight, bias)
        mask = current.drop(layer, inner)
        into = inner if mask is None else (inner * mask).to(inner.dtype)
        hidden = (_add_batched if current.batched else _add)(current, layer, into, out)
        ctx.layer, ctx.current = layer, current
        ctx.save_for_backward(inner, hidden, weight)
        return out.view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inner, hidden, weight = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.flatten(0, -2)
        total = grad @ weight if ctx.needs_input_grad[0] else None
        mask = ctx.current.drop(ctx.layer, inner)
        into = inner if mask is None else (inner * mask).to(inner.dtype)
        back = _back_batched if ctx.current.batched else _back
        back(ctx.current, ctx.layer, into, hidden, grad, total, mask)
        return (None if total is None else total.view(*shape, -1), None, None, None, None, None)


def _add(current: Pass, layer: str, states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Add the update to ``out`` ``[T, out]``; returns A x, ``[T, R]``."""
    bank = current.bank
    a, b = bank.weights[layer]
    hidden = states.new_empty(len(states), bank.layout.rank)
    for lane, start, end in current.lanes(layer):
        rank = bank.ranks[lane]
        own = hidden[start:end, :rank]
        torch.mm(states[start:end], a[lane, :rank].t(), out=own)
        out[start:end].addmm_(own, b[lane, :, :rank].t(), alpha=bank.scales[lane])
    return hidden


def _back(  # noqa: PLR0917
    current: Pass,
    layer: str,
    states: torch.Tensor,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Add the gradients of A and B to the bank's and that of the input to ``total``."""
    bank = current.bank
    (a, b), (grad_a, grad_b) = bank.weights[layer], bank.gradients[layer]
    for lane, start, end in current.lanes(layer):
        rank, scale, own = bank.ranks[lane], bank.scales[lane], grad[start:end]
        _accumulate(grad_b[lane, :, :rank], own.t(), hidden[start:end, :rank], scale)
        inner = torch.mm(own, b[lane, :, :rank]).mul_(scale)
        _accumulate(grad_a[lane, :rank], inner.t(), states[start:end])
        if total is None:
            continue
        if mask is None:
            total[start:end].addmm_(inner, a[lane, :rank])
        else:
            total[start:end] += torch.mm(inner, a[lane, :rank]) * mask[start:end]


def _accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float = 1.0) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_(left @ right, alpha=scale)


def _add_batched(current: Pass, layer: str, states: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """:func:`_add` over padded lanes; returns s A x, ``[K, longest, R]``."""
    window = current.window
    a, b = (half[window] for half in current.bank.weights[layer])
    hidden = torch.bmm(current.pad(states), a.mT).mul_(current.bank.scale[window])
    out += current.unpad(torch.bmm(hidden, b.mT))
    return hidden


def _back_batched(  # noqa: PLR0917
    current: Pass,
    layer: str,
    states: torch.Tensor,
    hidden: torch.Tensor,
    grad: torch.Tensor,
    total: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    window = current.window
    a, b = (half[window] for half in current.bank.weights[layer])
    grad_a, grad_b = (half[window] for half in current.bank.gradients[layer])
    padded = current.pad(grad)
    grad_b += torch.bmm(padded.mT, hidden)
    inner = torch.bmm(padded, b).mul_(current.bank.scale[window])
    grad_a += torch.bmm(inner.mT, current.pad(states))
    if total is not None:
        update = current.unpad(torch.bmm(inner, a))
        total += update if mask is None else update * mask
