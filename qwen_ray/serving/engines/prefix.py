"""Keys and values of prompts that were read before, so that a prompt that begins alike reads only the rest.

A tree of blocks of :data:`BLOCK` tokens for each adapter: a block is found under the block before it by
its own tokens, so equal tokens after another beginning, or under another adapter, are another block. The
adapter's key has name, version and path in it; when the adapter is taken off the model or replaced,
:meth:`PrefixCache.forget` drops its tree. Blocks live on the model's device and are dropped, least recently
used first, beyond a limit in bytes.

A client that asks for the log-probabilities of a whole prompt (lm-eval: echo) needs the predictions within
the part that is not read again too: a block can keep them as :class:`Marks`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

BLOCK = 16
DEFAULT_BYTES = 256 * 2**20
_SLAB_BYTES = 4 * 2**20
_BLOCK_BYTES, _MARK_BYTES, _TOP_BYTES = 1000, 40, 12  # of what is beside keys and values, about


@dataclass(frozen=True)
class Marks:
    """What was predicted for the tokens of a prompt from its token ``first`` on.

    Their log-probabilities in nats, whether each was the likeliest, and the likeliest in their place: ``ids``
    and ``values`` [tokens, k].
    """

    first: int
    logprobs: list[float]
    greedy: list[bool]
    ids: torch.Tensor
    values: torch.Tensor

    @property
    def top(self) -> int:
        return int(self.ids.shape[1])

    def part(self, start: int, end: int) -> Marks | None:
        """Those of the tokens from ``start`` to ``end``, counted from ``start``; None if they end before."""
        a, b = max(start - self.first, 0), end - self.first
        if b > len(self.logprobs) or a >= b:
            return None
        ids, values = self.ids[a:b].clone(), self.values[a:b].clone()
        return Marks(max(self.first - start, 0), self.logprobs[a:b], self.greedy[a:b], ids, values)


class _Slot:
    """A place for one block's keys and values. It is free again when nobody refers to it."""

    def __init__(self, place: torch.Tensor, free: list[torch.Tensor]) -> None:
        self.place, self._free = place, free

    def __del__(self) -> None:
        self._free.append(self.place)


class _Slabs:
    """Memory for blocks, taken in large pieces and used again.

    A tensor for each block would lie among those that each forward makes and frees, and keep the heap from
    shrinking: with 256 MiB of blocks a server grew by as much again.
    """

    def __init__(self) -> None:
        self._free: list[torch.Tensor] = []

    def keep(self, values: torch.Tensor) -> _Slot:
        """A slot that holds ``values``; all have one shape and type."""
        if not self._free:
            count = max(1, _SLAB_BYTES // (values.numel() * values.element_size()))
            self._free.extend(values.new_empty(count, *values.shape).unbind())
        slot = _Slot(self._free.pop(), self._free)
        slot.place.copy_(values)
        return slot


@dataclass(eq=False)
class Block:
    """Keys and values of :data:`BLOCK` tokens. ``marks``: of its last tokens, if some are known."""

    parent: Block | None
    tokens: tuple[int, ...]
    slot: _Slot
    marks: Marks | None = None
    children: dict[tuple[int, ...], Block] = field(default_factory=dict)
    nbytes: int = 0

    @property
    def kv(self) -> torch.Tensor:
        """[layers, 2, heads, BLOCK, D]; another block's once this one is gone."""
        return self.slot.place


class PrefixCache:
    """Least recently used blocks within ``max_bytes``. One thread at a time."""

    def __init__(self, max_bytes: int = DEFAULT_BYTES) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self.read = self.reused = 0  # tokens of prompts and trunks computed, and found, since the start
        self._roots: dict[str | None, dict[tuple[int, ...], Block]] = {}
        self._used: OrderedDict[Block, str | None] = OrderedDict()
        self._slabs = _Slabs()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, adapter: str | None, tokens: Sequence[int]) -> list[Block]:
        """The blocks of the longest known beginning of ``tokens``."""
        found: list[Block] = []
        children = self._roots.get(adapter, {})
        for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
            block = children.get(tuple(tokens[start : start + BLOCK]))
            if block is None:
                break
            found.append(block)
            children = block.children
        return found

    def store(
        self,
        adapter: str | None,
        tokens: Sequence[int],
        kv: torch.Tensor,
        start: int,
        marks: Marks | None = None,
    ) -> None:
        """Keep the whole blocks of ``tokens``. ``kv`` [layers, 2, heads, T, D] is of ``tokens[start:]``.

        Blocks before ``start`` must be known; nothing is kept beyond one that has been dropped meanwhile.
        ``marks``: of some tokens.
        """
        self.read += len(tokens) - start
        self.reused += start
        children, parent, path = self._roots.setdefault(adapter, {}), None, []
        for begin in range(0, len(tokens) - BLOCK + 1, BLOCK):
            own, end = tuple(tokens[begin : begin + BLOCK]), begin + BLOCK
            block = children.get(own)
            if block is None:
                if begin < start:
                    break
                values = kv[..., begin - start : end - start, :]
                block = children[own] = Block(parent, own, self._slabs.keep(values))
                self._used[block] = adapter
                self._weigh(block, values.numel() * values.element_size() + _BLOCK_BYTES)
            if marks is not None:
                self._mark(block, marks.part(begin, end))
            path.append(block)
            children, parent = block.children, block
        self.touch(path)
        while self.nbytes > self.max_bytes and self._used:
            self._drop(next(iter(self._used)))

    def touch(self, path: Sequence[Block]) -> None:
        """Note the use of a chain of blocks, the first last: none is dropped before its children."""
        for block in reversed(path):
            if block in self._used:
                self._used.move_to_end(block)

    def forget(self, adapter: str | None) -> None:
        """Drop all that was read with an adapter."""
        for block in [block for block, owner in self._used.items() if owner == adapter]:
            self._drop(block)
        self._roots.pop(adapter, None)

    def _mark(self, block: Block, marks: Marks | None) -> None:
        old = block.marks
        if marks is None or (old is not None and (old.first < marks.first or old.top >= marks.top)):
            return
        block.marks = marks
        more = len(marks.logprobs) * (_MARK_BYTES + _TOP_BYTES * marks.top)
        if old is not None:
            more -= len(old.logprobs) * (_MARK_BYTES + _TOP_BYTES * old.top)
        self._weigh(block, more)

    def _weigh(self, block: Block, more: int) -> None:
        block.nbytes += more
        self.nbytes += more

    def _drop(self, block: Block) -> None:
        adapter = self._used.pop(block)
        self.nbytes -= block.nbytes
        siblings = self._roots.get(adapter, {}) if block.parent is None else block.parent.children
        siblings.pop(block.tokens, None)


def past(chains: Sequence[Sequence[Block]], lengths: Sequence[int]) -> Any:
    """A cache for a forward whose rows have read the first ``lengths[i]`` tokens of ``chains[i]``.

    Rows are padded on the left to the longest, with zeros that a mask must hide. Without anything known it
    is an empty cache.
    """
    from transformers.cache_utils import DynamicCache

    longest = max(lengths, default=0)
    cache = DynamicCache()
    if longest == 0:
        return cache
    blocks = next(chain for chain in chains if chain)[0].kv
    layers, two, heads, _, width = blocks.shape
    kv = blocks.new_zeros(layers, two, len(chains), heads, longest, width)
    joined: dict[int, torch.Tensor] = {}  # rows that share all their blocks share the concatenation
    for row, (chain, length) in enumerate(zip(chains, lengths, strict=True)):
        if length:
            known = joined.get(id(chain[-1]))
            if known is None:
                known = joined[id(chain[-1])] = torch.cat([block.kv for block in chain], dim=3)
            kv[:, :, row, :, longest - length :] = known[:, :, :, :length]
    for layer in range(layers):
        cache.update(kv[layer, 0], kv[layer, 1], layer)
    return cache


def plain_layers(cache: Any) -> list[Any]:
    """The cache's layers if all are plain growing [B, heads, T, D] tensors, else none (sliding windows)."""
    from transformers.cache_utils import DynamicLayer

    layers = list(getattr(cache, "layers", []))
    return layers if all(type(layer) is DynamicLayer for layer in layers) else []


def stacked(cache: Any, start: int) -> torch.Tensor | None:
    """Keys and values of a cache from column ``start`` on: [layers, 2, B, heads, T, D]."""
    layers = plain_layers(cache)
    if not layers:
        return None
    return torch.stack([torch.stack((x.keys[:, :, start:], x.values[:, :, start:])) for x in layers])
