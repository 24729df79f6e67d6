"""The plan of a run: the cheapest layout that fits, or no, with what would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

from qwen_ray.combinations import unsound
from qwen_ray.config import ComputeConfig, RunConfig, StrategyConfig
from qwen_ray.errors import UserError
from qwen_ray.planner.hardware import Hardware, nearest
from qwen_ray.planner.layouts import USABLE, Layout, layouts
from qwen_ray.planner.shapes import Shape, shape_of

_SAME = 1.03
"""Speeds this near are equal: the layout that comes first, simpler or smaller, is taken."""


@dataclass(frozen=True)
class Plan:
    """``best`` is the cheapest layout that fits; None is a no, and ``advice`` says what would fit."""

    config: RunConfig
    shape: Shape
    hardware: Hardware
    tokens: float
    """To train on: of the data, times epochs."""
    best: Layout | None
    tried: tuple[Layout, ...]
    advice: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        return self.best is not None

    @property
    def nearest(self) -> Layout:
        """The best, or the one that misses by least."""
        possible = [x for x in self.tried if not unsound(x.config)] or list(self.tried)
        return self.best or min(possible, key=lambda x: x.memory.total)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return self.tokens / self.nearest.speed.tokens_per_second

    def to_dict(self, *, every: bool = False) -> dict[str, Any]:
        """For JSON. Bytes, seconds, dollars. ``every``: with all layouts that were tried."""
        gpu = self.hardware.gpu
        value: dict[str, Any] = {
            "model": {"name": self.shape.name, "parameters": self.shape.parameters},
            "method": self.config.method.name,
            "sequence_length": self.config.data.max_length,
            "hardware": {
                "gpu": gpu.name,
                "gpu_memory": gpu.memory,
                "usable": int(gpu.memory * USABLE),
                "gpus_per_node": self.hardware.gpus_per_node,
                "nodes": self.hardware.nodes,
                "price_per_gpu_hour": gpu.price,
            },
            "tokens": self.tokens,
            "fits": self.fits,
            "best": self._layout(self.best) if self.best else None,
            "advice": list(self.advice),
        }
        if self.best is None:
            value["nearest"] = self._layout(self.nearest)
        if every:
            value["layouts"] = [self._layout(layout) for layout in self.tried]
        return value

    def _layout(self, layout: Layout) -> dict[str, Any]:
        config, pace = layout.config, layout.speed
        rows = config.optim.batch_size * config.optim.gradient_accumulation * layout.hardware.gpus
        return {
            "strategy": config.strategy.model_dump(mode="json"),
            "activation_checkpointing": config.compute.activation_checkpointing,
            "batch_size": config.optim.batch_size,
            "gradient_accumulation": config.optim.gradient_accumulation,
            "rows_per_step": rows,
            "memory": {
                **{part: round(size) for part, size in layout.memory.parts.items()},
                "total": round(layout.memory.total),
                "moment": layout.memory.moment,
                "host": round(layout.memory.host),
            },
            "step_seconds": pace.seconds,
            "step_parts": {
                "compute": pace.compute,
                "exchange": pace.exchange,
                "update": pace.update,
                "transfer": pace.transfer,
            },
            "tokens_per_second": pace.tokens_per_second,
            "mfu": pace.mfu,
            "hours": self.tokens / pace.tokens_per_second / 3600,
            "dollars": layout.cost(self.tokens),
            "fits": layout.fits,
            "refused": layout.refused,
        }


def plan(
    config: RunConfig,
    hardware: Hardware,
    data_tokens: float,
    *,
    shape: Shape | None = None,
    keep_batch: bool = False,
    advise: bool = True,
) -> Plan:
    """Choose strategy, checkpointing and batch size for ``config`` on ``hardware``.

    ``data_tokens``: tokens of one epoch; ``optim.epochs`` of them are trained on, or ``optim.max_steps``
    steps. Rows a step stay as configured. Offload is taken only when nothing else fits. ``shape``: the
    model's, if it is known already. Raises :class:`UserError` for a model it does not know.
    """
    shape = shape or shape_of(config.model.name)
    tried = tuple(layouts(config, shape, hardware, keep_batch=keep_batch))
    best = _cheapest(tried)
    tokens = data_tokens * config.optim.epochs
    if config.optim.max_steps is not None:
        tokens = float(config.optim.max_steps * config.rows_a_step * config.data.max_length)
    advice = _advice(config, hardware, shape) if best is None and advise else ()
    return Plan(config, shape, hardware, tokens, best, tried, advice)


def choose_strategy(
    config: RunConfig, gpus: int, gpu_memory: int
) -> tuple[StrategyConfig, ComputeConfig, str]:
    """What ``strategy.name: auto`` means on ``gpus`` GPUs of ``gpu_memory`` bytes each, and why.

    The batch size is the configuration's. When nothing is predicted to fit, what needs least is returned and
    the reason says so. Without GPUs, and for models the planner does not know, it is ddp. DeepSpeed is taken
    where it is installed, or where nothing else fits.
    """
    named = config.strategy
    if named.name != "auto":
        return named, config.compute, f"{named.name} was asked for"
    whole = named.model_copy(update={"name": "ddp"})
    if gpus == 0:
        return whole, config.compute, "ddp: there is no GPU whose memory would have to be shared"
    try:
        shape = shape_of(config.model.name)
    except UserError as e:
        return whole, config.compute, f"ddp: the model cannot be planned for ({e.what})"
    nodes = -(-gpus // 8)  # as nodes usually are; it decides the speed of the exchange only
    if gpus % nodes:
        nodes = 1
    hardware = Hardware(nearest(gpu_memory), gpus // nodes, nodes)
    made = plan(config, hardware, 1e6, shape=shape, keep_batch=True, advise=False)
    layout = made.nearest
    if layout.config.strategy.name == "deepspeed" and find_spec("deepspeed") is None:
        others = [x for x in made.tried if x.config.strategy.name != "deepspeed"]
        layout = _cheapest(others) or layout  # if none fits, the error says what to install
    size = f"{layout.memory.total / 1e9:.1f} of {gpu_memory / 1e9:.1f} GB a GPU predicted"
    reason = f"{layout.strategy}"
    if layout.config.compute.activation_checkpointing and not config.compute.activation_checkpointing:
        reason += " with activation checkpointing"
    reason += f": {size}" + ("" if layout.fits else "; nothing that was tried is predicted to fit")
    return layout.config.strategy, layout.config.compute, reason


def _cheapest(tried: Iterable[Layout]) -> Layout | None:
    fitting = [layout for layout in tried if layout.fits]
    on_gpu = [layout for layout in fitting if not layout.offloads]
    choice: Layout | None = None
    for layout in on_gpu or fitting:
        # On the same GPUs the fastest is the cheapest, whatever their price, which may be 0.
        if choice is None or layout.speed.tokens_per_second > choice.speed.tokens_per_second * _SAME:
            choice = layout
    return choice


def _advice(config: RunConfig, hardware: Hardware, shape: Shape) -> tuple[str, ...]:
    """Single changes that make it fit, each tried."""
    found: list[str] = []
    changes: list[tuple[str, Callable[[RunConfig], None]]] = [
        ("strategy.name=auto", lambda c: setattr(c.strategy, "name", "auto")),
        ("strategy.zero_stage=2", lambda c: setattr(c.strategy, "zero_stage", 2)),
        ("strategy.zero_stage=3", lambda c: setattr(c.strategy, "zero_stage", 3)),
        ("optim.name=adamw_8bit", lambda c: setattr(c.optim, "name", "adamw_8bit")),
        ("precision=pure_bf16", lambda c: setattr(c, "precision", "pure_bf16")),
        ("method.name=lora", lambda c: setattr(c.method, "name", "lora")),
        ("method.name=qlora", lambda c: setattr(c.method, "name", "qlora")),
    ]
    for text, change in changes:
        changed = config.model_copy(deep=True)
        change(changed)
        if changed != config and _fits(changed, hardware, shape):
            found.append(text)
    per_node = max(8, hardware.gpus_per_node)
    sizes = [(g, 1) for g in (2, 4, 8) if g > hardware.gpus] + [
        (per_node, nodes) for nodes in (1, 2, 4, 8) if per_node * nodes > max(8, hardware.gpus)
    ]
    for gpus, nodes in sizes:
        larger = replace(hardware, gpus_per_node=gpus, nodes=nodes)
        if _fits(config, larger, shape):
            found.append(str(larger))
            break
    length = config.data.max_length // 2
    while length >= 256:
        changed = config.model_copy(deep=True)
        changed.data.max_length = length
        if _fits(changed, hardware, shape):
            found.append(f"data.max_length={length}")
            break
        length //= 2
    return tuple(found)


def _fits(config: RunConfig, hardware: Hardware, shape: Shape) -> bool:
    return any(layout.fits for layout in layouts(config, shape, hardware))
