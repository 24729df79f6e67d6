"""Data parallel: a whole copy of the model on every worker, gradients averaged (gloo or NCCL).

With one process it is the plain model; the loop need not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Ddp:
    """Strategy over ``torch.distributed``'s default group, or over nothing when there is none."""

    def __init__(self, device: torch.device | None = None) -> None:
        """``device``: this worker's; without it the current GPU, else the CPU."""
        self.distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if self.distributed else 0
        self.world_size = dist.get_world_size() if self.distributed else 1
        if device is None:
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if device.type == "cuda":
            device = torch.device(
                "cuda", torch.cuda.current_device() if device.index is None else device.index
            )
            torch.cuda.set_device(device)
        self.device = device

    def prepare(self, module: nn.Module) -> nn.Module:
        """Move the module to this worker's device and join it to the others'."""
        module = module.to(self.device)
        if self.world_size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=ids, gradient_as_bucket_view=True)

    def accumulate(self, module: nn.Module) -> AbstractContextManager[None]:
        """Inside, gradients add up locally; the first backward outside exchanges them."""
        return module.no_sync() if isinstance(module, DistributedDataParallel) else nullcontext()

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clip to a global norm; returns the norm before clipping. Gradients are equal on all ranks."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over workers."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values
