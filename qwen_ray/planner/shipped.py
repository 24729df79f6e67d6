"""The configurations in configs/ and the tables in docs/, all written from the planner.

``python -m qwen_ray.planner.shipped --write`` writes them; without ``--write`` it says which differ.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import yaml

from qwen_ray.config import RunConfig
from qwen_ray.planner.hardware import Hardware, hardware
from qwen_ray.planner.memory import PARTS
from qwen_ray.planner.plan import Plan, plan
from qwen_ray.planner.published import PEAKS, RATES
from qwen_ray.planner.published_scaling import steps_table
from qwen_ray.planner.scaling import strong_table, weak_table
from qwen_ray.planner.speed import HOST_CPUS

LENGTH = 4096
"""Tokens of a row."""
GPU = "h100-80gb"
MODELS, METHODS = ("3b", "7b", "14b"), ("lora", "qlora", "full")
MACHINES = {
    "1x80gb": (1, 1),
    "4x80gb": (4, 1),
    "8x80gb": (8, 1),
    "2nodes-8x80gb": (8, 2),
    "4nodes-8x80gb": (8, 4),
}
_BEGIN, _END = "<!-- {}: written by python -m qwen_ray.planner.shipped --write -->", "<!-- end -->"


@dataclass(frozen=True)
class Row:
    """One model, method and machine, and its plan."""

    model: str
    method: str
    machine: str
    plan: Plan

    @property
    def name(self) -> str:
        return f"{self.model}-{self.method}-{self.machine}"


def rows() -> Iterator[Row]:
    """All combinations, those that do not fit included."""
    for model in MODELS:
        for method in METHODS:
            for machine, (gpus, nodes) in MACHINES.items():
                made = hardware(GPU, gpus_per_node=gpus, nodes=nodes)
                yield Row(model, method, machine, plan(_wanted(model, method, made), made, 0))


def _wanted(model: str, method: str, machine: Hardware) -> RunConfig:
    # 32 rows (131,072 tokens) a step up to a node; beyond, four a GPU, or exchange would take over.
    rows_a_step = max(32, 4 * machine.gpus)
    tree = {
        "model": {"name": model},
        "method": {"name": method},
        "data": {"max_length": LENGTH},
        "optim": {"batch_size": 1, "gradient_accumulation": rows_a_step},
    }
    return RunConfig.model_validate(tree)


def yaml_of(row: Row) -> str:
    """The configuration file of a row that fits."""
    layout = row.plan.best
    assert layout is not None
    config, need, pace = layout.config, layout.memory, layout.speed
    parts = [f"{part} {need.parts[part] / 1e9:.1f}" for part in PARTS if need.parts[part] >= 5e7]
    host = f" Host memory {need.host / 1e9:.0f} GB a GPU." if need.host else ""
    said = (
        f"{row.plan.shape.name}, {row.method}, on {row.plan.hardware}, rows of {LENGTH} tokens. Predicted: "
        f"{need.total / 1e9:.1f} GB of each GPU ({', '.join(parts)}).{host} "
        f"{pace.tokens_per_second:,.0f} tokens/s, {pace.tokens_per_second / layout.hardware.gpus:,.0f} a "
        f"GPU, if rows are full and documents as long as rows."
    )
    strategy: dict[str, str | int] = {"name": config.strategy.name}
    if config.strategy.name == "deepspeed":
        strategy["zero_stage"] = config.strategy.zero_stage
        for key in ("offload_optimizer", "offload_parameters"):
            if getattr(config.strategy, key) != "none":
                strategy[key] = getattr(config.strategy, key)
    cpus = {"cpus_per_worker": HOST_CPUS} if layout.offloads else {}
    tree = {
        "model": {"name": row.model},
        "method": {"name": row.method},
        "data": {"max_length": LENGTH, "packing": True},
        "optim": {
            "batch_size": config.optim.batch_size,
            "gradient_accumulation": config.optim.gradient_accumulation,
        },
        "strategy": strategy,
        "compute": {"activation_checkpointing": config.compute.activation_checkpointing},
        "cluster": {"workers": layout.hardware.gpus, "gpus_per_worker": 1, **cpus},
        "precision": "bf16",
    }
    comment = textwrap.fill(said, 100, initial_indent="# ", subsequent_indent="# ")
    command = f"# qwen-ray train --config configs/{row.name}.yaml --data data/biology.jsonl"
    return f"{command}\n{comment}\n{yaml.safe_dump(tree, sort_keys=False)}"


def table() -> str:
    """Every row as Markdown."""
    lines = [
        "| model | method | GPUs | strategy | checkpointing | batch x accumulation | GB a GPU "
        "| tokens/s a GPU | configuration |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows():
        start = f"| {row.model} | {row.method} | {row.plan.hardware} "
        layout = row.plan.best
        if layout is None:
            advice = "; ".join(f"`{a}`" if "=" in a else a for a in row.plan.advice)
            lines.append(f"{start}| - | - | - | - | - | does not fit. What would: {advice} |")
            continue
        config = layout.config
        on = "on" if config.compute.activation_checkpointing else "off"
        batch = f"{config.optim.batch_size} x {config.optim.gradient_accumulation}"
        pace = layout.speed.tokens_per_second / layout.hardware.gpus
        lines.append(
            f"{start}| {layout.strategy} | {on} | {batch} | {layout.memory.total / 1e9:.1f} | {pace:,.0f} "
            f"| [{row.name}](../configs/{row.name}.yaml) |"
        )
    return "\n".join(lines)


def peaks_table() -> str:
    """Published memory peaks beside our predictions."""
    lines = ["| setting | measured GB | predicted GB | error | source |", "|---|---|---|---|---|"]
    lines += [
        f"| {p.setting} | {p.measured:.1f} | {p.predicted:.1f} | {100 * p.error:+.0f}% | {p.source} |"
        for p in PEAKS
    ]
    reasons = dict.fromkeys(p.unpredicted for p in PEAKS if p.unpredicted)
    marks = {reason: "\\*" * (i + 1) for i, reason in enumerate(reasons)}
    for i, p in enumerate(PEAKS):
        if p.unpredicted:
            lines[i + 2] = lines[i + 2].replace("% |", f"%{marks[p.unpredicted]} |")
    return "\n".join([*lines, "", *(f"{mark}: {reason}\n" for reason, mark in marks.items())]).rstrip()


def rates_table() -> str:
    """Published speeds beside our predictions."""
    lines = ["| setting | measured | predicted | error | source |", "|---|---|---|---|---|"]
    return "\n".join(
        lines
        + [
            f"| {r.setting} | {r.measured:,.0f} | {r.predicted:,.0f} | {100 * r.error:+.0f}% | {r.source} |"
            for r in RATES
        ]
    )


_GUIDE = {
    ("7b", "full"): 120,
    ("7b", "full in bf16"): 60,
    ("7b", "lora"): 16,
    ("7b", "qlora"): 6,
    ("14b", "full"): 240,
    ("14b", "full in bf16"): 120,
    ("14b", "lora"): 32,
    ("14b", "qlora"): 12,
}
"""GB, from LLaMA-Factory's README, "Hardware Requirement", which calls them estimated."""


def guide_table() -> str:
    """The guide's figures beside ours, one GPU without a limit, one row of 4096 tokens."""
    from dataclasses import replace

    from qwen_ray.planner.layouts import lay_out
    from qwen_ray.planner.shapes import QWEN25

    endless = hardware(GPU)
    endless = replace(endless, gpu=replace(endless.gpu, memory=10**13))
    lines = [
        "| model | method | guide | ours: states | with checkpointing | without |",
        "|---|---|---|---|---|---|",
    ]
    for (model, method), guide in _GUIDE.items():
        config = _wanted(model, method.split()[0], endless)
        if method == "full in bf16":
            config.precision = "pure_bf16"
        totals, states = [], 0.0
        for checkpointing in (True, False):
            layout = lay_out(
                config,
                QWEN25[model],
                endless,
                strategy={"name": "ddp"},
                checkpointing=checkpointing,
                batch_size=1,
                accumulation=32,
            )
            totals.append(layout.memory.total / 1e9)
            states = sum(layout.memory.parts[p] for p in ("parameters", "gradients", "optimizer")) / 1e9
        lines.append(f"| {model} | {method} | {guide} | {states:.1f} | {totals[0]:.1f} | {totals[1]:.1f} |")
    return "\n".join(lines)


TABLES: dict[str, tuple[str, Callable[[], str]]] = {
    "shipped": ("docs/planning.md", table),
    "peaks": ("docs/planning.md", peaks_table),
    "rates": ("docs/planning.md", rates_table),
    "guide": ("docs/hardware.md", guide_table),
    "weak-infiniband": ("docs/scaling.md", partial(weak_table, "infiniband")),
    "weak-ethernet": ("docs/scaling.md", partial(weak_table, "ethernet")),
    "strong-infiniband": ("docs/scaling.md", partial(strong_table, "infiniband")),
    "strong-ethernet": ("docs/scaling.md", partial(strong_table, "ethernet")),
    "steps": ("docs/scaling.md", steps_table),
}


def files(root: Path) -> dict[Path, str]:
    """Every file this writes, with what is to be in it. The documents must hold their markers."""
    texts = {root / "configs" / f"{row.name}.yaml": yaml_of(row) for row in rows() if row.plan.fits}
    for name, (document, make) in TABLES.items():
        path = root / document
        text = texts.get(path) or path.read_text(encoding="utf-8")
        begin = _BEGIN.format(name)
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(_END)
        if not found or not closed:
            raise RuntimeError(f"{path} lacks the markers of the table '{name}': {begin} and {_END}")
        texts[path] = f"{before}{begin}\n\n{make()}\n\n{_END}{after}"
    return texts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[2])
    args = parser.parse_args()
    wanted = files(args.root)
    differ = [p for p, text in wanted.items() if not p.is_file() or p.read_text(encoding="utf-8") != text]
    stale = sorted(set((args.root / "configs").glob("*.yaml")) - set(wanted))
    for path in [*differ, *stale]:
        print(path.relative_to(args.root))
    if args.write:
        (args.root / "configs").mkdir(exist_ok=True)
        for path in differ:
            path.write_text(wanted[path], encoding="utf-8")
        for path in stale:
            path.unlink()
    return 0 if args.write or not (differ or stale) else 1


if __name__ == "__main__":
    raise SystemExit(main())
