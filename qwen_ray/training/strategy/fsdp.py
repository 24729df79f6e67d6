"""Fully sharded data parallel, FSDP2 (``torch.distributed.fsdp.fully_shard``).

Parameters, gradients and optimizer state are sharded by rows; a layer's parameters are gathered while it
computes. The model is sharded as it is read (:func:`qwen_ray.training.base.load_layerwise`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.training import shards
from qwen_ray.training.base import load_layerwise
from qwen_ray.training.precision import Precision
from qwen_ray.training.strategy.base import MakeOptimizer, Strategy, Write, trained

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_ray.models import ModelRef


class Fsdp(Strategy):
    """FSDP2 over all workers. With one worker it is the plain model, sharded into one shard."""

    name = "fsdp"
    lockstep = True

    def load(
        self, ref: ModelRef, config: RunConfig, numbers: Precision, adapter: Path | None = None
    ) -> PreTrainedModel:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy

        if not self.distributed:
            raise RuntimeError("fsdp needs a process group")
        if numbers.scales_loss:
            raise UserError(
                "fsdp has no loss scaling, and float16 gradients underflow without it",
                where="precision",
                fix="precision=bf16 where the GPU has it, else ddp or deepspeed",
            )
        mesh = init_device_mesh(self.device.type, (self.world_size,))
        self._settings: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(param_dtype=numbers.compute, reduce_dtype=torch.float32),
        }
        self._reshard = config.strategy.reshard_after_forward
        # Gradients of every weight would otherwise stay whole until the last micro-batch.
        self._exchange_each = config.method.name == "full"
        return load_layerwise(ref, config, numbers, self.device, self._shard)

    def _shard(self, layer: nn.Module) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(layer, reshard_after_forward=self._reshard, **self._settings)

    def join(self, module: nn.Module, make_optimizer: MakeOptimizer, config: RunConfig) -> None:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, **self._settings)  # in place
        self.module = module
        self.optimizer = make_optimizer(self.module)

    @contextmanager
    def _local(self, last: bool) -> Iterator[None]:
        module: Any = self.module
        module.set_requires_gradient_sync(last)
        yield

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if self._exchange_each else self._local(last)

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self, rate: float, max_norm: float) -> torch.Tensor:
        self._set_rate(rate)
        norm = nn.utils.clip_grad_norm_(trained(self.module).values(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def weights(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        self._reshard_all()
        every = dict(self.module.named_parameters())
        whole: dict[str, torch.Tensor] = {}
        for name in trained(self.module) if names is None else names:
            parameter = every[name].detach()
            value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if self.rank == 0:  # one at a time: the others are freed
                whole[name] = value.to("cpu", copy=True)
        return whole

    def snapshot(self) -> Write:
        self._reshard_all()
        return shards.snapshot(trained(self.module), self.optimizer, rank=self.rank)

    def restore(self, folder: Path) -> None:
        self._reshard_all()
        shards.restore(trained(self.module), self.optimizer, folder)
        dist.barrier()

    def _reshard_all(self) -> None:
        """Let every module's parameters be its shards: after a forward pass without a backward one the
        outermost module, and with reshard_after_forward off each layer, still shows gathered copies."""
        from torch.distributed.fsdp import FSDPModule

        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
