"""Many LoRA adapters on one frozen model, mixed within a batch.

A linear layer that some adapter targets is wrapped in place. For a batch, the A and B matrices of the
adapters it uses are concatenated along the rank, so one pair of matrix products serves all rows; a mask
then zeroes, for each row (or token), the ranks of the adapters it did not ask for::

    y = x W^T + ((x A_cat^T) * mask) B_cat^T

There are no hooks and no state outlives a forward, so a failing batch cannot leak its adapter into the
next one (as PEFT 0.21's ``adapter_names`` does: huggingface/peft issue 3475). Not thread-safe: one thread
owns the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn import functional as F

from qwen_ray.errors import UserError
from qwen_ray.serving.lora_weights import LoraWeights

_PACKS_KEPT = 4  # concatenations kept for the combinations of adapters that were used last


class _Pack:
    """The matrices of one combination of adapters, concatenated layer by layer as layers ask for them."""

    def __init__(self, keys: tuple[str, ...], adapters: dict[str, LoraWeights]) -> None:
        self.keys = keys
        self.slots = {key: i for i, key in enumerate(keys)}
        self._adapters = [adapters[key].layers for key in keys]
        self._layers: dict[str, tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None] = {}
        self.owners: dict[tuple[int, ...], torch.Tensor] = {}

    def layer(self, name: str) -> tuple[torch.Tensor, torch.Tensor, tuple[int, ...]] | None:
        """(A [R, in], B [out, R], rank of each adapter in this layer), or None where none targets it."""
        if name not in self._layers:
            pairs = [layers.get(name) for layers in self._adapters]
            ranks = tuple(0 if pair is None else pair[0].shape[0] for pair in pairs)
            have = [pair for pair in pairs if pair is not None]
            if not have:
                self._layers[name] = None
            elif len(have) == 1:
                self._layers[name] = (*have[0], ranks)
            else:
                a, b = torch.cat([p[0] for p in have], dim=0), torch.cat([p[1] for p in have], dim=1)
                self._layers[name] = (a, b, ranks)
        return self._layers[name]

    def owner(self, ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """For each concatenated rank, the slot of the adapter it belongs to: int64 [R]."""
        if ranks not in self.owners:
            slots = torch.arange(len(ranks), device=device)
            self.owners[ranks] = slots.repeat_interleave(torch.tensor(ranks, device=device))
        return self.owners[ranks]


class _Selection:
    """The adapters of the forward that is running. ``slots``: int64 [B, 1] or [B, T], -1 for the base."""

    def __init__(self, pack: _Pack, slots: torch.Tensor) -> None:
        self.pack, self.slots = pack, slots
        self.uniform = len(pack.keys) == 1 and bool((slots == 0).all())
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def excluded(self, ranks: tuple[int, ...]) -> torch.Tensor | None:
        """Ranks to zero: bool [B, 1 or T, R]; None when every token uses every rank."""
        if self.uniform:
            return None
        if ranks not in self._masks:
            self._masks[ranks] = self.slots.unsqueeze(-1) != self.pack.owner(ranks, self.slots.device)
        return self._masks[ranks]


class LoraLinear(nn.Module):
    """An ``nn.Linear`` that adds the selected adapters' updates; the plain layer without a selection."""

    def __init__(self, base: nn.Linear, name: str, owner: MultiLora) -> None:
        super().__init__()
        self.base, self.name = base, name
        self._owner = [owner]  # in a list, so that it does not register as a module

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base.bias

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, in] -> [B, T, out]."""
        y: torch.Tensor = self.base(x)
        selection = self._owner[0].selection
        if selection is None:
            return y
        matrices = selection.pack.layer(self.name)
        if matrices is None:
            return y
        if x.dim() != 3:
            # A model that flattens tokens (mixture of experts) has lost which row a token came from.
            raise RuntimeError(
                f"{self.name} gets a {x.dim()}-dimensional input; mixed adapters need [B, T, in]"
            )
        a, b, ranks = matrices
        hidden = F.linear(x, a)
        excluded = selection.excluded(ranks)
        if excluded is not None:
            # masked_fill, not a product: an overflow to infinity in another adapter's rank stays there.
            hidden = hidden.masked_fill(excluded, 0.0)
        return y.add_(F.linear(hidden, b))


class MultiLora:
    """The adapters resident on ``model``, which stays frozen and whole for rows that select none."""

    def __init__(self, model: nn.Module, *, on_remove: Callable[[str], object] | None = None) -> None:
        """``on_remove(key)`` is told when an adapter goes or is replaced: what it computed is void."""
        self.model, self._on_remove = model, on_remove
        self.selection: _Selection | None = None
        self._adapters: dict[str, LoraWeights] = {}
        self._packs: OrderedDict[tuple[str, ...], _Pack] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._adapters

    @property
    def keys(self) -> list[str]:
        """The resident adapters."""
        return list(self._adapters)

    def nbytes(self, key: str) -> int:
        """Memory of one resident adapter's matrices, without the cached concatenations."""
        return self._adapters[key].nbytes

    def add(self, key: str, weights: LoraWeights) -> None:
        """Put an adapter on the model; all of it or, with :class:`UserError`, nothing of it."""
        modules = {name: self._linear(name, pair, weights.where) for name, pair in weights.layers.items()}
        layers = {}
        for name, (a, b) in weights.layers.items():
            like = modules[name].weight
            layers[name] = (a.to(like.device, like.dtype), b.to(like.device, like.dtype))
        nbytes = sum(t.numel() * t.element_size() for pair in layers.values() for t in pair)
        self.remove(key)
        for name, module in modules.items():
            if isinstance(module, nn.Linear):
                parent, _, leaf = name.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, LoraLinear(module, name, self))
        self._adapters[key] = LoraWeights(layers, nbytes, weights.where)

    def remove(self, key: str) -> None:
        """Take an adapter off and free its memory; nothing happens if it is not there."""
        self._adapters.pop(key, None)
        for keys in [k for k in self._packs if key in k]:
            del self._packs[keys]
        if self._on_remove is not None:
            self._on_remove(key)

    def _linear(
        self, name: str, pair: tuple[torch.Tensor, torch.Tensor], where: str
    ) -> nn.Linear | LoraLinear:
        try:
            module = self.model.get_submodule(name)
        except AttributeError:
            raise UserError(
                f"the adapter targets '{name}', which this model does not have",
                where=where,
                fix="it was trained on another base model",
                status=409,
            ) from None
        if not isinstance(module, (nn.Linear, LoraLinear)):
            raise UserError(
                f"the adapter targets '{name}', a {type(module).__name__}; only linear layers are served",
                where=where,
                fix="merge it into the base model and serve that model",
                status=409,
            )
        a, b = pair
        if a.shape[1] != module.in_features or b.shape[0] != module.out_features:
            raise UserError(
                f"'{name}' maps {module.in_features} to {module.out_features}, "
                f"the adapter {a.shape[1]} to {b.shape[0]}",
                where=where,
                fix="it was trained on another base model",
                status=409,
            )
        return module

    @contextmanager
    def select(self, keys: Sequence[str | None], index: torch.Tensor | None = None) -> Iterator[None]:
        """Run the forwards inside with these adapters.

        ``keys``: one a row of the batch, None for the base model. With ``index`` (int64 [B, T]) token
        (b, t) uses ``keys[index[b, t]]`` instead. Raises ``KeyError`` for an adapter that is not resident.
        """
        before = self.selection
        self.selection = self._selection(keys, index)
        try:
            yield
        finally:
            self.selection = before

    def _selection(self, keys: Sequence[str | None], index: torch.Tensor | None) -> _Selection | None:
        used = tuple(sorted({key for key in keys if key is not None}))
        if not used:
            return None
        for key in used:
            if key not in self._adapters:
                raise KeyError(key)
        pack = self._packs.pop(used, None) or _Pack(used, self._adapters)
        self._packs[used] = pack
        while len(self._packs) > _PACKS_KEPT:
            self._packs.popitem(last=False)
        device = next(self.model.parameters()).device
        slots = torch.tensor([-1 if key is None else pack.slots[key] for key in keys], device=device)
        return _Selection(pack, slots.unsqueeze(1) if index is None else slots[index])
