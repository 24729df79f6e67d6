"""Trading memory for time: recompute layers, keep activations on the host, compile layers.

All three work on transformers' decoder layers, under PEFT as well, and do not change what is computed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qwen_ray.errors import UserError

OFFLOAD_BYTES = 1 << 20
"""Smaller tensors stay on the GPU: they free nothing, and each copy has a fixed cost."""


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, in order. Raises :class:`UserError` if there are none to be found."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if not layers:
        raise UserError(
            "the model has no decoder layers that can be recomputed or compiled one by one",
            where="model.name",
            fix="turn off compute.activation_checkpointing and compute.compile",
        )
    return layers


def checkpoint_layers(model: nn.Module) -> None:
    """Keep only each layer's input while training and recompute the layer in the backward pass.

    Activation checkpointing, arXiv 1604.06174, in torch's non-reentrant form: it needs no gradient at the
    input, so a frozen embedding stays as it is. Dropout repeats its draws. Call before sharding the model.
    """
    for layer in decoder_layers(model):
        # The layer checkpoints its own forward, inside the hooks by which FSDP2 gathers its weights.
        switch: Any = layer
        switch.gradient_checkpointing = True
        switch._gradient_checkpointing_func = partial(
            checkpoint, use_reentrant=False, preserve_rng_state=True
        )


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """``torch.compile`` each decoder layer by itself; equal layers share the compiled code.

    The first length is compiled as it is; a second makes the length a variable. Call after
    :func:`checkpoint_layers` and before sharding.
    """
    for layer in decoder_layers(model):
        switch: Any = layer
        if switch.gradient_checkpointing:
            # What is recomputed is the compiled layer. The other way round, a kernel that cannot be traced
            # would leave the whole layer uncompiled.
            switch._gradient_checkpointing_func = partial(_checkpoint_compiled, backend)
        else:
            layer.compile(backend=backend)


def _checkpoint_compiled(backend: str, forward: partial[torch.Tensor], *args: torch.Tensor) -> Any:
    compiled = partial(_compiled(forward.func, backend), *forward.args, **forward.keywords)
    return checkpoint(compiled, *args, use_reentrant=False, preserve_rng_state=True)


@cache
def _compiled(function: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    return torch.compile(function, backend=backend)


def offload(device: torch.device, *, minimum_bytes: int = OFFLOAD_BYTES) -> AbstractContextManager[object]:
    """Around a forward pass: keep what it saves for the backward pass in pinned host memory.

    Copies to the host run beside the computation. Parameters are never copied: they stay anyway. On a CPU
    there is nothing to gain and the context does nothing.
    """
    if device.type != "cuda":
        return nullcontext()
    mover = _Cuda(device)
    return saved_elsewhere(mover.to_host, minimum_bytes=minimum_bytes)


def saved_elsewhere(
    store: Callable[[torch.Tensor], Callable[[], torch.Tensor]], *, minimum_bytes: int
) -> AbstractContextManager[object]:
    """Hand each large activation that autograd saves to ``store``, which returns how to get it back."""

    def pack(tensor: torch.Tensor) -> torch.Tensor | Callable[[], torch.Tensor]:
        # A linear layer saves its weight, or a transposed view of it.
        owner = tensor if tensor._base is None else tensor._base
        if isinstance(owner, nn.Parameter) or tensor.numel() * tensor.element_size() < minimum_bytes:
            return tensor
        return store(tensor)

    def unpack(saved: torch.Tensor | Callable[[], torch.Tensor]) -> torch.Tensor:
        return saved if isinstance(saved, torch.Tensor) else saved()

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Cuda:
    """Copies to pinned memory and back on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = _copy_stream(device)

    def to_host(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory may not be reused before the copy is done

        def back() -> torch.Tensor:
            # The same stream brings it back, so it comes after the copy away.
            with torch.cuda.stream(self._stream):
                copy = torch.empty_like(host, device=self._device, pin_memory=False)
                copy.copy_(host, non_blocking=True)
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            copy.record_stream(current)
            return copy

        return back


_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _STREAMS:
        _STREAMS[device] = torch.cuda.Stream(device)
    return _STREAMS[device]
