"""A plan as text for a terminal, and the number of tokens in a data file."""

from __future__ import annotations

from pathlib import Path

from qwen_ray.combinations import unsound
from qwen_ray.planner.layouts import USABLE, Layout
from qwen_ray.planner.memory import PARTS
from qwen_ray.planner.plan import Plan

_MOMENTS = {
    "forward": "in the forward pass of the last layer",
    "head": "when the loss is computed",
    "layer": "in the backward pass of a layer",
    "end": "at the end of the backward pass",
    "step": "in the optimizer's update",
}


def plan_text(plan: Plan, *, every: bool = False) -> str:
    """The plan in words and a table; with ``every``, each layout that was tried."""
    config, gpu = plan.config, plan.hardware.gpu
    lines = [
        f"{plan.shape.name} ({plan.shape.parameters / 1e9:.2f} B weights), {config.method.name}, "
        f"rows of {config.data.max_length} tokens, on {plan.hardware}",
        f"memory of a GPU: {gpu.memory / 1e9:.1f} GB, {gpu.memory * USABLE / 1e9:.1f} of it planned with",
        "",
    ]
    layout = plan.nearest
    if plan.best is None:
        lines += [f"does not fit: {layout.refused}", ""]
        if not unsound(layout.config):
            lines += ["What needs least:", *_layout(plan, layout), ""]
        lines += ["What would fit, one change at a time:"]
        lines += [f"  {item}" for item in plan.advice] or ["  nothing that was tried"]
    else:
        lines += _layout(plan, layout)
    if every:
        lines += ["", *_table(plan)]
    return "\n".join(lines)


def _layout(plan: Plan, layout: Layout) -> list[str]:
    config, pace = layout.config, layout.speed
    rows = config.optim.batch_size * config.optim.gradient_accumulation * layout.hardware.gpus
    lines = [
        f"  strategy                  {layout.strategy}",
        f"  activation checkpointing  {'on' if config.compute.activation_checkpointing else 'off'}",
        f"  rows a step               {rows} = {config.optim.batch_size} (batch_size) x "
        f"{config.optim.gradient_accumulation} (gradient_accumulation) x {layout.hardware.gpus} (workers)",
        "",
        f"  GB of a GPU, {_MOMENTS[layout.memory.moment]}:",
    ]
    lines += [f"    {part:<14}{layout.memory.parts[part] / 1e9:8.1f}" for part in PARTS]
    lines += [f"    {'total':<14}{layout.memory.total / 1e9:8.1f}"]
    if layout.memory.host:
        lines += [f"    {'host memory':<14}{layout.memory.host / 1e9:8.1f}"]
    parts = {
        "exchange": pace.exchange,
        "update": pace.update,
        "host transfers": pace.transfer,
    }
    beside = ", ".join(f"{seconds:.2f} {name}" for name, seconds in parts.items() if seconds >= 0.005)
    each = pace.tokens_per_second / layout.hardware.gpus
    lines += [
        "",
        f"  step          {pace.seconds:.2f} s ({pace.compute:.2f} compute{', ' if beside else ''}{beside})",
        f"  tokens/s      {pace.tokens_per_second:,.0f} ({each:,.0f} a GPU, {100 * pace.mfu:.0f}% MFU)",
    ]
    if plan.tokens:
        gpu_hours = plan.seconds / 3600 * layout.hardware.gpus
        lines += [
            f"  tokens        {plan.tokens:,.0f}",
            f"  time          {_duration(plan.seconds)}",
            f"  cost          ${layout.cost(plan.tokens):,.2f} ({gpu_hours:,.1f} GPU-hours at "
            f"${layout.hardware.gpu.price:g})",
        ]
    return lines


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def _table(plan: Plan) -> list[str]:
    head = f"{'strategy':<56}{'ckpt':<6}{'batch':<8}{'GB':>7}{'tokens/s':>11}{'cost $':>10}  verdict"
    lines = [head]
    for layout in plan.tried:
        config = layout.config
        verdict = "fits" if layout.fits else layout.refused
        if layout is plan.best:
            verdict = "chosen"
        on = "on" if config.compute.activation_checkpointing else "off"
        batch = f"{config.optim.batch_size} x {config.optim.gradient_accumulation}"
        lines.append(
            f"{layout.strategy:<56}{on:<6}{batch:<8}{layout.memory.total / 1e9:>7.1f}"
            f"{layout.speed.tokens_per_second:>11,.0f}{layout.cost(plan.tokens):>10,.2f}  {verdict}"
        )
    return lines


def count_tokens(files: list[Path], model: str, *, max_length: int) -> int:
    """Tokens of the records of data files after the model's chat template, long ones cut as in training.

    Needs the model's tokenizer. Raises :class:`UserError` for missing or malformed files.
    """
    from qwen_ray import models
    from qwen_ray.data.formats import load_examples
    from qwen_ray.data.tokenise import tokenise

    tokenizer = models.load_tokenizer(models.resolve(model))
    records = [record for file in files for record in load_examples(file)]
    examples, _ = tokenise(records, tokenizer, max_length=max_length)
    return sum(len(example.ids) for example in examples)
