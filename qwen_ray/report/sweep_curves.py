"""The losses of a sweep's trials as curves, in the look of :mod:`qwen_ray.report.plots`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qwen_ray.report.plots import new_figure, plain, running_mean
from qwen_ray.report.sweep_plots import INK, LABEL_GAP, apart, mark, page
from qwen_ray.report.sweep_rows import TrialRow

PANELS = 24
"""Trials whose curves are shown in panels of their own."""


def held_out_curves(
    rows: Sequence[TrialRow], winner: int | None, reference: int, base: float | None, ident: str
) -> str | None:
    """Held-out loss of every trial: the winner bold, the reference dashed, stopped ones faint."""
    drawn = [row for row in rows if row.held_out]
    if not drawn:
        return None
    figure, axes = new_figure(3.0)
    for row in drawn:
        start = [(0.0, base)] if base is not None and row.held_out[0][0] > 0 else []
        style: dict[str, Any] = {"color": INK["--steady"], "linewidth": 1.0}
        if row.state != "done":
            style |= {"alpha": 0.4, "linewidth": 0.8}
        if row.index == reference:
            style |= {"color": INK["--ink"], "linestyle": (0, (4, 2))}
        if row.index == winner:
            style |= {"color": INK["--good"], "linewidth": 2.0, "zorder": 3}
        axes.plot(*zip(*start, *row.held_out, strict=True), marker="o", markersize=2.4, **style)
    low, high = _loss_range([loss for row in drawn for _, loss in row.held_out], base)
    axes.set_ylim(low, high)
    for step in sorted({row.held_out[-1][0] for row in drawn}):  # labels of one step are kept apart
        there = [row for row in drawn if row.held_out[-1][0] == step]
        wanted = [min(max(row.held_out[-1][1], low), high) for row in there]
        for row, at in zip(there, apart(wanted, LABEL_GAP * (high - low)), strict=True):
            colour = "--ink" if row.index == winner else "--muted"
            mark(axes, row.index, (step, at), (5, 0), colour, va="center")
    axes.grid(axis="y", color=INK["--rule"], linewidth=0.6)
    axes.set_xlabel("step")
    axes.set_ylabel("held-out loss")
    said = "; ".join(f"trial {r.index} {r.held_out[-1][1]:.3f} at step {r.held_out[-1][0]:g}" for r in drawn)
    return page(figure, ident, f"Held-out loss of every trial over the steps. Last values: {said}.")


def panels(rows: Sequence[TrialRow], winner: int | None, ident: str) -> str | None:
    """Training loss (running mean) and held-out loss of each trial in a panel of its own, on one scale."""
    drawn = [row for row in rows if row.train or row.held_out][:PANELS]
    if not drawn:
        return None
    columns = min(3, len(drawn))
    lines = -(-len(drawn) // columns)
    figure, first = new_figure(0.5 + 1.15 * lines)
    first.remove()
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axes, row in zip(grid.flat, drawn, strict=False):
        plain(axes)
        faint = 1.0 if row.state == "done" else 0.45
        if row.train:
            mean = running_mean(row.train, max(2, len(row.train) // 15))
            axes.plot(*zip(*mean, strict=True), color=INK["--train"], linewidth=1.1, alpha=faint)
        if row.held_out:
            axes.plot(*zip(*row.held_out, strict=True), color=INK["--valid"], linewidth=1.1, marker="o",
                      markersize=2.6, alpha=faint)  # fmt: skip
        name = f"{row.index}, {'winner' if row.index == winner else row.state}"
        axes.set_title(name, fontsize=8, color=INK["--ink"], loc="left", pad=2)
        axes.grid(axis="y", color=INK["--rule"], linewidth=0.5)
        axes.tick_params(labelsize=7)
    losses = [loss for row in drawn for _, loss in row.held_out + row.train[len(row.train) // 20 :]]
    grid[0, 0].set_ylim(*_loss_range(losses, None))
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    said = "; ".join(
        f"trial {r.index}: " + ", ".join(f"{what} {s[0][1]:.2f} to {s[-1][1]:.2f}" for what, s in
                                         (("training", r.train), ("held-out", r.held_out)) if s)
        for r in drawn
    )  # fmt: skip
    return page(figure, ident, f"Losses of each trial over the steps. {said}.")


def _loss_range(losses: Sequence[float], base: float | None) -> tuple[float, float]:
    """Limits that show all but losses far above the rest: those leave the plot at its top."""
    ordered = sorted([*losses, *([base] if base is not None else [])])
    low, upper = ordered[0], ordered[(3 * (len(ordered) - 1)) // 4]
    high = min(ordered[-1], max(upper + 1.5 * (upper - low), base or 0.0))
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room
