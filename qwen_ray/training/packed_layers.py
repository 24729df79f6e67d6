"""Linear layers that add another adapter's update to each segment of one sequence.

Lanes, each with an adapter of its own, lie end to end in a sequence ``[1, T]``. The frozen product is made
once for all of them; the update s B A x is made lane by lane, in one of two ways: small products over the
lanes' tokens (CPU, where a call is cheap), or batched products over lanes padded to the longest (GPU, where
it is not). A lane's numbers never meet another's: padding is zeros and is dropped again.

Gradients are added to the bank's in the backward pass itself, not through autograd: no copy of the pack's
size is made, and a lane that sits out a pass is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from qwen_ray.training.packed_bank import Bank

Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""Layer -> (A ``[r, in]``, B ``[out, r]``), the scale folded into B."""


@dataclass(eq=False)
class Pass:
    """Whose tokens lie where in one forward pass."""

    bank: Bank
    spans: list[tuple[int, int, int]]
    """(lane, first token, token after the last), in order; every lane at most once."""
    dropout: Mapping[int, tuple[float, torch.Generator]] = field(default_factory=dict)
    """Lane -> (rate, generator), where there is any."""
    _drawn: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    """Layer -> the generators' states before its masks were drawn."""

    def adapts(self, layer: str) -> bool:
        """Whether any of its lanes does."""
        return any(layer in self.bank.lanes[lane].layers for lane, _, _ in self.spans)

    def lanes(self, layer: str) -> list[tuple[int, int, int]]:
        """The spans whose lanes adapt ``layer``."""
        return [span for span in self.spans if layer in self.bank.lanes[span[0]].layers]

    @cached_property
    def sizes(self) -> list[int]:
        """Tokens of each span."""
        return [end - start for _, start, end in self.spans]

    @cached_property
    def window(self) -> slice:
        """The lanes from the first to the last that takes part."""
        return slice(self.spans[0][0], self.spans[-1][0] + 1)

    @cached_property
    def longest(self) -> int:
        return max(self.sizes)

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
        return torch.cat(places).to(self.bank.scale.device)

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
        if current is None or not current.adapts(name):
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
        hidden = (_add_batched if current.bank.padded else _add)(current, layer, into, out)
        ctx.layer, ctx.current = layer, current
        ctx.save_for_backward(inner, weight, *hidden)
        return out.view(*states.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        inner, weight, *hidden = ctx.saved_tensors
        shape, grad = grad.shape[:-1], grad.flatten(0, -2)
        total = grad @ weight if ctx.needs_input_grad[0] else None
        mask = ctx.current.drop(ctx.layer, inner)
        into = inner if mask is None else (inner * mask).to(inner.dtype)
        back = _back_batched if ctx.current.bank.padded else _back
        back(ctx.current, ctx.layer, into, hidden, grad, total, mask)
        return (None if total is None else total.view(*shape, -1), None, None, None, None, None)


def _add(current: Pass, layer: str, states: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor | None]:
    """Add the update to ``out`` ``[T, out]``; returns A x of each span whose lane adapts ``layer``."""
    factors = current.bank.factors[layer]
    hidden: list[torch.Tensor | None] = []
    parts = states.split(current.sizes), out.split(current.sizes)
    for (lane, _, _), x, y in zip(current.spans, *parts, strict=True):
        if (own := factors.get(lane)) is None:
            hidden.append(None)
            continue
        inner = torch.mm(x, own.a_t)
        y.addmm_(inner, own.b_t, alpha=own.scale)
        hidden.append(inner)
    return hidden


def _back(  # noqa: PLR0917
    current: Pass,
    layer: str,
    states: torch.Tensor,
    hidden: Iterable[torch.Tensor | None],
    grad: torch.Tensor,
    total: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    """Add the gradients of A and B to the bank's and that of the input to ``total``."""
    factors, sizes = current.bank.factors[layer], current.sizes
    parts = states.split(sizes), hidden, grad.split(sizes)
    totals: Iterable[torch.Tensor | None] = repeat(None) if total is None else total.split(sizes)
    masks: Iterable[torch.Tensor | None] = repeat(None) if mask is None else mask.split(sizes)
    for (lane, _, _), x, h, g, t, m in zip(current.spans, *parts, totals, masks, strict=False):
        if h is None:
            continue
        own = factors[lane]
        assert own.grads is not None
        inner = torch.mm(g, own.b)
        _accumulate(own.grads[0], inner.t(), x, own.scale)
        _accumulate(own.grads[1], g.t(), h, own.scale)
        if t is None:
            continue
        if m is None:
            t.addmm_(inner, own.a, alpha=own.scale)
        else:
            t.add_(torch.mm(inner, own.a) * m, alpha=own.scale)


def _accumulate(into: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scale)
    else:
        into.add_(left @ right, alpha=scale)


def _add_batched(
    current: Pass, layer: str, states: torch.Tensor, out: torch.Tensor
) -> list[torch.Tensor | None]:
    """:func:`_add` over padded lanes; returns s A x, ``[K, longest, R]``."""
    window = current.window
    a, b = (half[window] for half in current.bank.stacked[layer])
    hidden = torch.bmm(current.pad(states), a.mT).mul_(current.bank.scale[window])
    out += current.unpad(torch.bmm(hidden, b.mT))
    return [hidden]


def _back_batched(  # noqa: PLR0917
    current: Pass,
    layer: str,
    states: torch.Tensor,
    hidden: Iterable[torch.Tensor | None],
    grad: torch.Tensor,
    total: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> None:
    window = current.window
    a, b = (half[window] for half in current.bank.stacked[layer])
    grad_a, grad_b = (half[window] for half in current.bank.stacked_grads[layer])
    (scaled,) = hidden
    assert scaled is not None
    padded = current.pad(grad)
    grad_b += torch.bmm(padded.mT, scaled)
    inner = torch.bmm(padded, b).mul_(current.bank.scale[window])
    grad_a += torch.bmm(inner.mT, current.pad(states))
    if total is not None:
        update = current.unpad(torch.bmm(inner, a))
        total += update if mask is None else update * mask
