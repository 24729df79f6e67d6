"""The ways to lay a run out on some GPUs, each with its memory, speed and whether it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_ray.combinations import of_deepspeed, oversize, unsound
from qwen_ray.config import RunConfig
from qwen_ray.planner import memory, programs, speed
from qwen_ray.planner.hardware import Hardware
from qwen_ray.planner.memory import Memory
from qwen_ray.planner.shapes import Shape
from qwen_ray.planner.speed import Speed

USABLE = 0.90
"""Share of a GPU's memory that a prediction may fill. The rest is for what it does not know: fragmentation of
the allocator, and its own error, which on published peaks is within a tenth for most."""
USABLE_HOST = 0.85
"""The same of host memory, where the data and the processes live too."""
_BATCHES = (1, 2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Layout:
    """One way to lay a run out. ``config`` holds the choice; memory is of one GPU, in bytes."""

    config: RunConfig
    hardware: Hardware
    memory: Memory
    speed: Speed
    refused: str = ""
    """Why it does not fit or cannot be, if so."""

    @property
    def fits(self) -> bool:
        return not self.refused

    @property
    def offloads(self) -> bool:
        """Whether optimizer state or parameters live outside of the GPUs."""
        s = self.config.strategy
        return s.offload_optimizer != "none" or s.offload_parameters != "none"

    @property
    def strategy(self) -> str:
        """In words: ``ddp``, ``deepspeed zero 3, optimizer on cpu``."""
        s = self.config.strategy
        if s.name != "deepspeed":
            return s.name
        text = f"deepspeed zero {s.zero_stage}"
        if s.offload_optimizer != "none":
            text += f", optimizer on {s.offload_optimizer}"
        if s.offload_parameters != "none":
            text += f", parameters on {s.offload_parameters}"
        return text

    def cost(self, tokens: float) -> float:
        """Dollars to train on ``tokens``."""
        seconds = tokens / self.speed.tokens_per_second
        return seconds / 3600 * self.hardware.gpus * self.hardware.gpu.price


def layouts(
    config: RunConfig, shape: Shape, hardware: Hardware, *, keep_batch: bool = False, offload: bool = True
) -> Iterator[Layout]:
    """Every layout of ``config`` on ``hardware`` with the same rows a step.

    What the configuration has decided stays: a named strategy, DeepSpeed's stage and offloads, checkpointing
    that is on. ``keep_batch``: keep the batch size too. The step's rows are those of ``config`` on its own
    number of workers.
    """
    each = -(-config.rows_a_step // hardware.gpus)
    batches = (config.optim.batch_size,) if keep_batch else tuple(b for b in _BATCHES if each % b == 0)
    remats = (True,) if config.compute.activation_checkpointing else (False, True)
    for strategy in _strategies(config, hardware, offload=offload):
        for checkpointing in remats:
            for batch in batches:
                yield lay_out(
                    config,
                    shape,
                    hardware,
                    strategy=strategy,
                    checkpointing=checkpointing,
                    batch_size=batch,
                    accumulation=max(1, -(-each // batch)),
                )


def lay_out(
    config: RunConfig,
    shape: Shape,
    hardware: Hardware,
    *,
    strategy: dict[str, Any],
    checkpointing: bool,
    batch_size: int,
    accumulation: int,
) -> Layout:
    """One layout, weighed."""
    chosen = config.model_copy(deep=True)
    chosen.strategy = config.strategy.model_copy(update=strategy)
    chosen.compute.activation_checkpointing = checkpointing
    chosen.optim.batch_size, chosen.optim.gradient_accumulation = batch_size, accumulation
    chosen.cluster.workers = hardware.gpus
    need = memory.predict(
        shape, programs.ours(chosen, shape, hardware.gpus), batch_size * config.data.max_length
    )
    pace = speed.predict(chosen, shape, hardware, kept=need.moved)
    return Layout(chosen, hardware, need, pace, _refusal(chosen, shape, hardware, need))


def _strategies(config: RunConfig, hardware: Hardware, *, offload: bool) -> Iterator[dict[str, Any]]:
    """Settings of ``strategy`` to try, simple ones first."""
    named = config.strategy
    if named.name != "auto":
        yield {"name": named.name}
        return
    asked = of_deepspeed(named)
    if asked:
        for stage in (named.zero_stage,) if "zero_stage" in asked else (2, 3):
            yield {"name": "deepspeed", "zero_stage": stage}
        return
    yield {"name": "ddp"}
    if hardware.gpus > 1:
        yield {"name": "fsdp"}
        for stage in (1, 2, 3):
            yield _zero(stage)
    if offload and config.method.name == "full":  # an adapter has next to no state to move
        yield _zero(2, offload_optimizer="cpu")
        if hardware.gpus > 1:
            yield _zero(3, offload_optimizer="cpu")
        yield _zero(3, offload_optimizer="cpu", offload_parameters="cpu")


def _zero(stage: int, **offload: str) -> dict[str, Any]:
    nothing = {"offload_optimizer": "none", "offload_parameters": "none"}
    return {"name": "deepspeed", "zero_stage": stage, **nothing, **offload}


def _refusal(config: RunConfig, shape: Shape, hardware: Hardware, need: Memory) -> str:
    why = unsound(config)
    if why:
        return why
    if config.data.max_length > shape.context:
        return f"the model was made for {shape.context} tokens"
    trained = shape.parameters if config.method.name == "full" else shape.adapter(config.method)
    why = oversize(config, trained, hardware.gpus)
    if why:
        return why
    room = hardware.gpu.memory * USABLE
    if need.total > room:
        return f"needs {need.total / 1e9:.1f} GB of {room / 1e9:.1f}"
    room = hardware.gpu.host_memory * USABLE_HOST
    if need.host > room:
        return f"needs {need.host / 1e9:.0f} GB of host memory a GPU of {room / 1e9:.0f}"
    return ""
