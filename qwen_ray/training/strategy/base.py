"""What the loop asks of a strategy, and what all of them share.

A strategy decides where the weights, their gradients and the optimizer's state live. The loop calls, on
every rank and in the same order: ``load``, ``join``, then for each step ``accumulate`` and ``backward`` for
each micro-batch and ``step``; and ``snapshot`` and ``restore`` for checkpoints, ``weights`` for what is
handed on. With one process every strategy is the plain model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from qwen_ray.config import RunConfig
from qwen_ray.training.precision import Precision

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from qwen_ray.models import ModelRef

Write = Callable[[Path], None]
MakeOptimizer = Callable[[nn.Module], torch.optim.Optimizer]


class Strategy(ABC):
    """Over ``torch.distributed``'s default group, or over nothing when there is none."""

    name: str
    format: str = "shards"
    """Of a checkpoint's state: strategies of the same format read one another's."""
    asynchronous: bool = True
    """Whether a snapshot can be written while training goes on."""
    lockstep: bool = False
    """Whether every rank must take part in every forward pass, because parameters are sharded."""

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
        self.module: nn.Module = nn.Identity()
        self.optimizer: torch.optim.Optimizer

    @abstractmethod
    def load(
        self, ref: ModelRef, config: RunConfig, numbers: Precision, adapter: Path | None = None
    ) -> PreTrainedModel:
        """The model of ``ref`` with what ``config.method`` puts on it, where training wants it.

        ``adapter``: the PEFT folder of the checkpoint that is restored next, from which an adapter that
        changed the base's weights changes them again.
        """

    @abstractmethod
    def join(self, module: nn.Module, make_optimizer: MakeOptimizer, config: RunConfig) -> None:
        """Join ``module`` (the model under its loss) to the other workers'; sets module and optimizer."""

    def accumulate(self, *, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients need be exchanged only after the last."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of ``loss``; they are averaged over workers by the end of the step."""

    @abstractmethod
    def step(self, rate: float, max_norm: float) -> torch.Tensor:
        """Clip to the global norm ``max_norm``, update the weights at learning rate ``rate``, clear the
        gradients. Returns the norm before clipping, still on the device."""

    @abstractmethod
    def weights(self, names: Iterable[str] | None = None) -> dict[str, torch.Tensor]:
        """Whole parameters on the CPU of rank 0, elsewhere an empty dict; called on every rank.

        ``names`` as in ``model.named_parameters()``; without them, those that are trained.
        """

    @abstractmethod
    def snapshot(self) -> Write:
        """Copy this rank's share of trained weights and optimizer state to host memory; the returned
        function writes the copy into a folder, from any thread, without talking to other ranks."""

    @abstractmethod
    def restore(self, folder: Path) -> None:
        """Load what the ranks wrote through :meth:`snapshot`, at whatever number of workers."""

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Element-wise sum over workers."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Everybody's ``value`` (picklable), by rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_scale", 1.0)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of ``module`` that are trained, by name, each once."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}
