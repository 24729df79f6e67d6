"""The plots, as SVG to put inside HTML: page fonts, page colours (light and dark), stable bytes."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwen_ray.report.rows import BAD, GOOD, STEADY, UNSURE, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Matplotlib wants colours, the page has CSS variables: draw in stand-ins, then put the variables in.
STAND_IN = {
    "--ink": "#010101",
    "--muted": "#020202",
    "--rule": "#030303",
    "--paper": "#0b0b0b",
    "--before": "#040404",
    f"--{GOOD}": "#050505",
    f"--{BAD}": "#060606",
    f"--{UNSURE}": "#070707",
    f"--{STEADY}": "#080808",
    "--train": "#090909",
    "--valid": "#0a0a0a",
}
WIDTH = 4.7  # inches; narrow, so that the text stays readable when a phone scales it
SMOOTH_FROM = 50  # points from which a running mean is drawn over the raw loss


@dataclass(frozen=True)
class RunCurve:
    """One training run; rows of ``metrics`` have a ``step`` and a loss, learning rate or eval_loss."""

    name: str
    metrics: list[dict[str, Any]]


def before_after(rows: Sequence[Row], ident: str) -> str:
    """Two whiskered points a category: before, hollow; after, filled in the colour of its meaning."""
    figure, axes = new_figure(0.62 + 0.46 * len(rows))
    for at, row in enumerate(rows):
        _whisker(axes, at - 0.15, row.baseline, row.baseline_ci, "--before", filled=False)
        _whisker(axes, at + 0.15, row.candidate, row.candidate_ci, f"--{row.tone}", filled=True)
    axes.set_yticks(range(len(rows)), [plot_text(row.name) for row in rows])
    axes.tick_params(axis="y", labelsize=9, labelcolor=STAND_IN["--ink"])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.grid(axis="x", color=STAND_IN["--rule"], linewidth=0.6)
    axes.set_xlabel("score in points, with interval")
    label = "; ".join(f"{row.name}: before {row.baseline:.1f}, after {row.candidate:.1f}" for row in rows)
    return as_svg(figure, ident, f"Scores before and after. {label}.")


def loss_curve(run: RunCurve, ident: str) -> str | None:
    """Training and validation loss over the steps, learning rate in a strip below. None without a loss."""
    train, valid, rate = (_series(run, key) for key in ("loss", "eval_loss", "learning_rate"))
    if not train and not valid:
        return None
    figure, axes = new_figure(2.5)
    if rate:
        axes.remove()
        axes, strip = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
        plain(axes)
        plain(strip)
        strip.plot(*zip(*rate, strict=True), color=STAND_IN["--muted"], linewidth=1)
        strip.set_ylabel("rate", labelpad=6)
        strip.set_yticks([0, max(value for _, value in rate)])
        strip.set_yticklabels(["0", f"{max(value for _, value in rate):.1e}"])
        strip.set_ylim(bottom=0)
        axes.tick_params(axis="x", labelbottom=False)
    if train:
        smooth = len(train) >= SMOOTH_FROM
        raw: dict[str, Any] = (
            {"alpha": 0.35, "linewidth": 0.8} if smooth else {"linewidth": 1.3, "label": "training"}
        )
        axes.plot(*zip(*train, strict=True), color=STAND_IN["--train"], **raw)
        if smooth:
            mean = running_mean(train, len(train) // 15)
            axes.plot(
                *zip(*mean, strict=True), color=STAND_IN["--train"], linewidth=1.5, label="training (mean)"
            )
    if valid:
        marks: dict[str, Any] = {"marker": "o", "markersize": 3.2, "linewidth": 1.3, "label": "validation"}
        axes.plot(*zip(*valid, strict=True), color=STAND_IN["--valid"], **marks)
    axes.set_ylabel("loss")
    axes.grid(axis="y", color=STAND_IN["--rule"], linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, labelcolor=STAND_IN["--ink"])
    figure.axes[-1].set_xlabel("step")
    said = [
        f"{what} {s[0][1]:.2f} to {s[-1][1]:.2f}"
        for what, s in (("training", train), ("validation", valid))
        if s
    ]
    return as_svg(figure, ident, f"Loss of run {run.name} over the steps: {', '.join(said)}.")


def _series(run: RunCurve, key: str) -> list[tuple[float, float]]:
    rows = [(row.get("step"), row.get(key)) for row in run.metrics]
    return [
        (float(step), float(value))
        for step, value in rows
        if isinstance(step, (int, float)) and isinstance(value, (int, float)) and math.isfinite(value)
    ]


def running_mean(series: list[tuple[float, float]], window: int) -> list[tuple[float, float]]:
    """Mean of the points around each point; fewer at both ends."""
    half = max(1, window // 2)
    out = []
    for i, (step, _) in enumerate(series):
        near = [value for _, value in series[max(0, i - half) : i + half + 1]]
        out.append((step, sum(near) / len(near)))
    return out


def _whisker(
    axes: Axes, at: float, score: float, interval: tuple[float, float], colour: str, *, filled: bool
) -> None:
    ink = STAND_IN[colour]
    axes.plot(interval, [at, at], color=ink, linewidth=1.4, solid_capstyle="round")
    fill = ink if filled else STAND_IN["--paper"]
    axes.plot([score], [at], marker="o", markersize=5, color=ink, markerfacecolor=fill, markeredgewidth=1.3)


def new_figure(height: float) -> tuple[Figure, Axes]:
    # Not pyplot: it keeps global state and picks a backend by the display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    plain(axes)
    return figure, axes


def plain(axes: Axes) -> None:
    axes.patch.set_visible(False)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STAND_IN["--rule"])
    axes.tick_params(length=0, labelsize=8, labelcolor=STAND_IN["--muted"], pad=5)
    axes.xaxis.label.set(color=STAND_IN["--muted"], fontsize=8)
    axes.yaxis.label.set(color=STAND_IN["--muted"], fontsize=8)
    axes.set_axisbelow(True)


def plot_text(name: str, length: int = 24) -> str:
    """A name that mathtext leaves alone, short enough to leave room for the plot."""
    short = name if len(name) <= length else f"{name[: length - 1]}…"
    return short.replace("$", r"\$")


def as_svg(figure: Figure, ident: str, label: str) -> str:
    import matplotlib as mpl

    buffer = io.StringIO()
    # fonttype none keeps text as text, in the font of the page; the salt makes the ids repeatable.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": ident}):
        figure.patch.set_visible(False)
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return _inline(buffer.getvalue(), ident, label)


def _inline(svg: str, ident: str, label: str) -> str:
    """A standalone SVG file as an element of a page: no prologue, no foreign URL, ids of its own, a label."""
    from markupsafe import escape

    svg = svg[svg.index("<svg") :]
    # Its own style sheet would apply to the whole page; report.css has the two rules.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>\s*|<!--.*?-->\s*", "", svg, flags=re.S)
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\bid="', f'id="{ident}-', svg)
    svg = re.sub(r'href="#|url\(#', lambda m: f"{m[0]}{ident}-", svg)
    for name, stand_in in STAND_IN.items():
        svg = svg.replace(stand_in, f"var({name})")
    view = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg class="plot" id="{ident}" role="img" aria-label="{escape(label)}" {view[0] if view else ""}>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, svg, count=1).rstrip()
