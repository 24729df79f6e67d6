"""Scaling over nodes, on paper: what is exchanged, what it costs, and how far published runs disagree.

The figures are those of :mod:`qwen_ray.planner.speed`, for layouts that the planner chooses. Weak scaling
keeps the rows of a GPU, strong scaling those of a step. ``docs/scaling.md`` holds the tables.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qwen_ray.config import RunConfig
from qwen_ray.planner import speed
from qwen_ray.planner.hardware import Hardware, hardware
from qwen_ray.planner.layouts import Layout
from qwen_ray.planner.plan import plan
from qwen_ray.planner.shapes import QWEN25

SIZES = (8, 16, 32, 64, 128, 256, 512)
"""GPUs, eight a node."""
NETWORKS = {"infiniband": 400e9, "ethernet": 12.5e9}
"""Bytes/s of a node's ports, one direction: 8 x 400 Gb/s, and 100 Gb/s."""
MODELS = ("3b", "7b", "14b")
STRATEGIES = {
    "DDP, LoRA": ("ddp", "lora"),
    "FSDP, full": ("fsdp", "full"),
    "ZeRO-3, full": ("deepspeed", "full"),
}
ROWS_A_GPU, ROWS_A_STEP, LENGTH = 4, 512, 4096
"""Weak scaling's rows of a GPU, strong scaling's rows of a step, tokens of a row."""


def cluster(gpu: str, gpus: int, ports: float, *, gpus_per_node: int = 8) -> Hardware:
    """``gpus`` of the catalogue's ``gpu`` in nodes whose ports carry ``ports`` bytes/s together."""
    each = min(gpus, gpus_per_node)
    return hardware(gpu, gpus_per_node=each, nodes=gpus // each, network=ports * 8 / 1e9)


@dataclass(frozen=True)
class Point:
    """The planner's layout at one number of GPUs."""

    layout: Layout
    sent: float
    """Bytes that a GPU sends in a step."""

    @property
    def rate(self) -> float:
        """Tokens/s of a GPU."""
        return self.layout.speed.tokens_per_second / self.layout.hardware.gpus

    @property
    def busy(self) -> float:
        """Seconds of exchange for a second of computation: below one, nothing of it shows."""
        return self.sent / (self.layout.hardware.collective * speed.BUS) / self.layout.speed.compute

    @property
    def text(self) -> str:
        """Batch x accumulation, and whether activations are recomputed."""
        config = self.layout.config
        mark = "c" if config.compute.activation_checkpointing else ""
        return f"{config.optim.batch_size}x{config.optim.gradient_accumulation}{mark}"


def point(model: str, strategy: str, gpus: int, ports: float, *, rows: int) -> Point:
    """``rows``: of a step, over all GPUs. Raises RuntimeError if nothing fits."""
    name, method = STRATEGIES[strategy]
    tree = {
        "model": {"name": model},
        "method": {"name": method},
        "data": {"max_length": LENGTH},
        "optim": {"batch_size": 1, "gradient_accumulation": rows},
        "strategy": {"name": name, **({"zero_stage": 3} if name == "deepspeed" else {})},
    }
    machine = cluster("h100-80gb", gpus, ports)
    best = plan(RunConfig.model_validate(tree), machine, 0).best
    if best is None:
        raise RuntimeError(f"{model} {strategy} does not fit on {gpus} GPUs")
    shape = QWEN25[model]
    trained = shape.parameters if method == "full" else shape.adapter(best.config.method)
    return Point(best, sum(speed.exchanged_bytes(best.config, shape, trained, gpus)))


def weak(model: str, strategy: str, ports: float) -> list[Point]:
    """A point for each of :data:`SIZES`, the rows of a GPU fixed."""
    return [point(model, strategy, n, ports, rows=ROWS_A_GPU * n) for n in SIZES]


def strong(model: str, strategy: str, ports: float) -> list[Point]:
    """A point for each of :data:`SIZES`, the rows of a step fixed."""
    return [point(model, strategy, n, ports, rows=ROWS_A_STEP) for n in SIZES]


def _table(first: str, last: str, row: Callable[[str, str], list[str]]) -> str:
    """Markdown with a line for each model and strategy, from its cells."""
    heads = [first, *(f"{n} GPUs" for n in SIZES), *([last] if last else [])]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    lines += [
        f"| {model} {strategy} | " + " | ".join(row(model, strategy)) + " |"
        for model in MODELS
        for strategy in STRATEGIES
    ]
    return "\n".join(lines)


def weak_table(network: str) -> str:
    """Efficiency, bytes that a GPU sends in a step, seconds not hidden, layout; exchange over computation."""

    def row(model: str, strategy: str) -> list[str]:
        points = weak(model, strategy, NETWORKS[network])
        cells = [
            f"**{p.rate / points[0].rate:.0%}** {p.sent / 1e9:.3g} GB, {p.layout.speed.exchange:.2g} s, "
            f"{p.text}"
            for p in points
        ]
        return [*cells, f"{max(p.busy for p in points[1:]):.2g}"]

    return _table(f"{ROWS_A_GPU} rows a GPU", "exchange / computation", row)


def strong_table(network: str) -> str:
    """Efficiency, seconds of a step and layout."""

    def row(model: str, strategy: str) -> list[str]:
        points = strong(model, strategy, NETWORKS[network])
        return [f"**{p.rate / points[0].rate:.0%}** {p.layout.speed.seconds:.3g} s, {p.text}" for p in points]

    return _table(f"{ROWS_A_STEP} rows a step", "", row)
