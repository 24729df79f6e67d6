"""How a model is spread over workers: one file a strategy, all with the interface of base.Strategy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_ray.errors import UserError

if TYPE_CHECKING:
    import torch

    from qwen_ray.training.strategy.base import Strategy


def make(name: str, device: torch.device | None = None) -> Strategy:
    """The strategy of ``strategy.name`` (not auto, which the planner has resolved by then)."""
    match name:
        case "ddp":
            from qwen_ray.training.strategy.ddp import Ddp as Chosen
        case "fsdp":
            from qwen_ray.training.strategy.fsdp import Fsdp as Chosen  # type: ignore[assignment]
        case "deepspeed":
            from qwen_ray.training.strategy.deepspeed import DeepSpeed as Chosen  # type: ignore[assignment]
        case _:
            raise UserError(f"unknown strategy '{name}'", where="strategy.name", fix="ddp, fsdp or deepspeed")
    return Chosen(device)
