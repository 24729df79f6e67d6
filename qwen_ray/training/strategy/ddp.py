"""Data parallel: a whole copy of the model on every worker, gradients averaged (gloo or NCCL).

With one process it is the plain model; the loop need not know.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qwen_ray.config import RunConfig
from qwen_ray.training import shards
from qwen_ray.training.base import load_base
from qwen_ray.training.precision import Precision, choose
from qwen_ray.training.strategy.base import MakeOptimizer, Strategy, Write, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_ray.models import ModelRef


class Ddp(Strategy):
    """``torch.nn.parallel.DistributedDataParallel``, and loss scaling where the format needs it."""

    name = "ddp"

    def load(
        self, ref: ModelRef, config: RunConfig, numbers: Precision, adapter: Path | None = None
    ) -> PreTrainedModel:
        return load_base(ref, config, numbers, self.device, adapter)

    def join(self, module: nn.Module, make_optimizer: MakeOptimizer, config: RunConfig) -> None:
        module = module.to(self.device)
        self._plain = module
        self.optimizer = make_optimizer(module)
        self.module = module
        if self.world_size > 1:
            ids = [self.device.index] if self.device.type == "cuda" else None
            self.module = DistributedDataParallel(
                module, device_ids=ids, gradient_as_bucket_view=True, forward_sync_buffers=False
            )
        scales = choose(config.precision, self.device).scales_loss
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=scales)

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()

    def backward(self, loss: torch.Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self, rate: float, max_norm: float) -> torch.Tensor:
        self._set_rate(rate)
        self._scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(trained(self._plain).values(), max_norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def weights(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        if self.rank > 0:
            return {}
        every = dict(self._plain.named_parameters())
        chosen = trained(self._plain) if names is None else names
        return {name: every[name].detach().to("cpu", copy=True) for name in chosen}

    def snapshot(self) -> Write:
        extra = {"scaler": self._scaler.state_dict()}
        return shards.snapshot(trained(self._plain), self.optimizer, rank=self.rank, extra=extra)

    def restore(self, folder: Path) -> None:
        extra = shards.restore(trained(self._plain), self.optimizer, folder)
        if extra.get("scaler") and self._scaler.is_enabled():
            self._scaler.load_state_dict(extra["scaler"])
