"""The plots of a sweep's page, in the look of :mod:`qwen_ray.report.plots`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from qwen_ray.report.plots import STAND_IN, as_svg, new_figure, plot_text
from qwen_ray.report.sweep_rows import TrialRow, domains, keys, mix_text, nats, short, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of sweep.css: five levels of gain, low to high, and the domains of a mixture.
LEVELS = 5
_LEVEL = [f"--level{i}" for i in range(LEVELS)]
_DOMAIN = [f"--domain{i}" for i in range(8)]
INK = STAND_IN | {name: f"#0c0c{i:02x}" for i, name in enumerate(_LEVEL + _DOMAIN)}
LOG_FROM = 20
"""Ratio of an axis's largest to its smallest value from which it is logarithmic."""
LABEL_GAP = 0.045
"""Least distance of two labels at the ends of lines, as a share of the plot's height."""


def parallel(rows: Sequence[TrialRow], winner: int | None, ident: str) -> str | None:
    """One line a trial across the swept values and its gain. None where nothing was swept or judged."""
    drawn = [row for row in rows if row.gain is not None]
    among, parts = keys(list(rows)), domains(list(rows))
    scales: list[tuple[str, Scale]] = [
        (short(key, among), Scale([row.values.get(key) for row in drawn])) for key in among
    ]
    scales += [(f"share {name}", Scale([row.mix.get(name) for row in drawn])) for name in parts]
    scales = [(name, scale) for name, scale in scales if scale.varies]
    if not scales or len(drawn) < 2:
        return None
    scales.append(("gain", Scale([row.gain for row in drawn], log=False)))
    figure, axes = new_figure(3.3)
    axes.spines["bottom"].set_visible(False)
    for x, (_, scale) in enumerate(scales):
        axes.axvline(x, color=INK["--rule"], linewidth=1.0, zorder=0)
        for at, label in scale.ticks:
            end = {0.0: ((0, -3), "center", "top"), 1.0: ((0, 3), "center", "bottom")}
            offset, ha, va = end.get(at, ((3, 0), "left", "center"))
            mark(axes, label, (x, at), offset, "--muted", ha=ha, va=va, fontsize=7, zorder=4)
    levels = _levels(drawn)
    ends: list[tuple[float, int]] = []
    for i in reversed(range(len(drawn))):  # the best on top
        row = drawn[i]
        known = [(x, scale.at[i]) for x, (_, scale) in enumerate(scales)]
        line = [(x, y) for x, y in known if y is not None]
        colour = INK[_LEVEL[levels[row.index]] if row.feasible else "--bad"]
        style: dict[str, Any] = {"linewidth": 2.4 if row.index == winner else 1.2}
        if not row.feasible:
            style |= {"linestyle": (0, (2, 2)), "alpha": 0.7, "linewidth": 0.9}
        axes.plot(*zip(*line, strict=True), color=colour, **style)
        ends.append((line[-1][1], row.index))
    for at, (_, index) in zip(apart([y for y, _ in ends], LABEL_GAP), ends, strict=True):
        mark(axes, index, (len(scales) - 1, at), (5, 0), va="center")
    axes.set_yticks([])
    axes.set_xlim(-0.3, len(scales) - 0.75)
    axes.set_ylim(-0.09, 1.07)
    axes.set_xticks(range(len(scales)), [plot_text(name) for name, _ in scales])
    if len(scales) > 4:
        for tick in axes.get_xticklabels():
            tick.set(rotation=28, ha="right")
    axes.tick_params(axis="x", labelcolor=INK["--ink"], labelsize=8, pad=2)
    said = "; ".join(
        f"trial {row.index} gain {nats(row.gain)}{'' if row.feasible else ', outside the tolerance'}"
        for row in drawn
    )
    return page(figure, ident, f"Swept values and gain of each trial, a line each. {said}.")


class Scale:
    """Where the values of one axis lie between 0 and 1. Numbers by size, logarithmic where they span much;
    other values at equal distances."""

    def __init__(self, values: Sequence[Any], *, log: bool | None = None) -> None:
        known = [value for value in values if value is not None]
        self.ticks: list[tuple[float, str]] = []
        self.at: list[float | None] = [None] * len(values)
        self.varies = len({shown(value) for value in known}) > 1
        if not known:
            return
        place: Callable[[Any], float]
        if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
            low, high = min(known), max(known)
            log = low > 0 and high >= LOG_FROM * low if log is None else log
            scale: Callable[[float], float] = math.log if log else float
            span = scale(high) - scale(low)
            place = lambda value: (scale(value) - scale(low)) / span if span else 0.5  # noqa: E731
            marks: list[Any] = sorted(set(known)) if len(set(known)) <= 4 else [low, high]
        else:
            marks = sorted({shown(value) for value in known})
            place = lambda value: (marks.index(shown(value)) + 0.5) / len(marks)  # noqa: E731
        self.at = [None if value is None else place(value) for value in values]
        self.ticks = [(place(mark), shown(mark)) for mark in marks]


def simplex(rows: Sequence[TrialRow], winner: int | None, ident: str) -> str | None:
    """The mixtures: a triangle for three domains, else a bar a trial. None where no trial has one."""
    drawn = [row for row in rows if row.mix]
    names = domains(drawn)
    if not drawn or len(names) < 2:
        return None
    label = "; ".join(f"trial {row.index}: {mix_text(row.mix)}" for row in drawn)
    figure = (_triangle if len(names) == 3 else _bars)(drawn, names, winner)
    return page(figure, ident, f"Shares of the domains in percent. {label}.")


def _shares(row: TrialRow, names: Sequence[str]) -> list[float]:
    total = sum(row.mix.values()) or 1.0
    return [row.mix.get(name, 0.0) / total for name in names]


def _triangle(rows: Sequence[TrialRow], names: Sequence[str], winner: int | None) -> Figure:
    figure, axes = new_figure(3.9)
    axes.set_axis_off()
    axes.set_aspect("equal")
    height = math.sqrt(3) / 2

    def place(shares: Sequence[float]) -> tuple[float, float]:
        return shares[1] + shares[2] / 2, shares[2] * height

    for part in (0.0, 0.25, 0.5, 0.75):  # lines of an equal share of each domain
        for ends in ([part, 1 - part, 0], [part, 0, 1 - part]), ([1 - part, part, 0], [0, part, 1 - part]), \
                ([1 - part, 0, part], [0, 1 - part, part]):  # fmt: skip
            axes.plot(*zip(*map(place, ends), strict=True), color=INK["--rule"], linewidth=0.6, zorder=0)
    for name, corner, (dx, dy), side in (
        (names[0], (1, 0, 0), (0, -6), "left"),
        (names[1], (0, 1, 0), (0, -6), "right"),
        (names[2], (0, 0, 1), (0, 5), "center"),
    ):
        above = "bottom" if dy > 0 else "top"
        mark(axes, plot_text(name), place(corner), (dx, dy), ha=side, va=above, fontsize=9)
    levels = _levels(rows)
    for row in reversed(rows):
        x, y = place(_shares(row, names))
        size = 9 if row.index == winner else 6
        if row.feasible:
            axes.plot(x, y, "o", color=INK[_LEVEL[levels[row.index]]], markersize=size)
        else:
            axes.plot(x, y, "x", color=INK["--bad"], markersize=size - 1)
        mark(axes, row.index, (x, y), (6, 3))
    return figure


def _bars(rows: Sequence[TrialRow], names: Sequence[str], winner: int | None) -> Figure:
    figure, axes = new_figure(0.55 + 0.25 * len(rows))
    for at, row in enumerate(rows):
        left = 0.0
        for i, share in enumerate(_shares(row, names)):
            ink = INK[_DOMAIN[i % len(_DOMAIN)]]
            axes.barh(at, share, left=left, height=0.78, color=ink, edgecolor=INK["--paper"], linewidth=0.8)
            if share >= 0.07:
                axes.text(left + share / 2, at, f"{100 * share:.0f}", ha="center", va="center", fontsize=7,
                          color=INK["--paper"])  # fmt: skip
            left += share
        gain = nats(row.gain) if row.feasible or row.gain is None else f"{nats(row.gain)} ×"
        colour = "--bad" if not row.feasible else "--good" if row.index == winner else "--muted"
        mark(axes, gain, (1.0, at), (4, 0), colour, va="center")
    axes.set_yticks(range(len(rows)), [str(row.index) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.17)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    return figure


def pareto(rows: Sequence[TrialRow], front: Sequence[int], tolerance: float, ident: str) -> str | None:
    """Gain over forgetting, the size of a point for what the trial cost; the front is a line."""
    rises = all(row.rise is not None for row in rows if row.gain is not None)
    places = {
        row.index: (forgotten, row.gain)
        for row in rows
        if (forgotten := row.rise if rises else row.violation) is not None and row.gain is not None
    }
    drawn = [row for row in rows if row.index in places]
    if len(drawn) < 2:
        return None
    figure, axes = new_figure(3.0)
    dearest = max(row.seconds for row in drawn) or 1.0
    for row in drawn:
        (x, y), size = places[row.index], 4 + 9 * math.sqrt(row.seconds / dearest)
        ink = INK["--steady" if row.feasible else "--bad"]
        fill = ink if row.index in front else "none"
        axes.plot(x, y, "o", color=ink, markerfacecolor=fill, markersize=size, alpha=0.85)
        mark(axes, row.index, (x, y), (6, 4))
    line: list[tuple[float, float]] = []
    for x, y in sorted(places[row.index] for row in drawn if row.index in front):
        if not line or y > line[-1][1]:  # the front of the two that are drawn; cost is the third
            line.append((x, y))
    if len(line) > 1:
        axes.step(*zip(*line, strict=True), where="post", color=INK["--muted"], linewidth=0.9, zorder=0)
    if rises:
        axes.axvline(tolerance, color=INK["--bad"], linewidth=0.9, linestyle=(0, (3, 2)), zorder=0)
    axes.margins(0.1)
    axes.grid(color=INK["--rule"], linewidth=0.5)
    what = "largest rise of a strength's loss" if rises else "strength's loss beyond the tolerance"
    axes.set_xlabel(f"forgetting: {what}, nats")
    axes.set_ylabel("gain, nats")
    said = "; ".join(
        f"trial {row.index}: gain {nats(row.gain)}, forgetting {nats(places[row.index][0])}"
        f"{', on the front' if row.index in front else ''}"
        for row in drawn
    )
    return page(figure, ident, f"Gain against forgetting. {said}.")


def proxy(pairs: Sequence[tuple[str, float, float]], ident: str) -> str | None:
    """Gain of real runs over what the merged experts promised; ``pairs``: name, proxy, real."""
    if len(pairs) < 2:
        return None
    figure, axes = new_figure(2.8)
    low, high = (pick(v for _, *pair in pairs for v in pair) for pick in (min, max))
    axes.plot([low, high], [low, high], color=INK["--rule"], linewidth=1.0, zorder=0)
    for name, x, y in pairs:
        axes.plot(x, y, "o", color=INK["--steady"], markersize=5)
        mark(axes, name, (x, y), (5, 3))
    axes.grid(color=INK["--rule"], linewidth=0.5)
    axes.set_xlabel("gain by the merged experts, nats")
    axes.set_ylabel("gain of the real run, nats")
    said = "; ".join(f"{name}: {nats(x)} and {nats(y)}" for name, x, y in pairs)
    return page(figure, ident, f"Gain by the merged experts against that of the real run. {said}.")


def mark(
    axes: Axes,
    text: object,
    at: tuple[float, float],
    offset: tuple[float, float],
    colour: str = "--ink",
    **more: Any,
) -> None:
    """A small label at a point of the data, moved by ``offset`` points."""
    style: dict[str, Any] = {"fontsize": 7.5, "color": INK[colour], **more}
    axes.annotate(str(text), at, offset, textcoords="offset points", **style)


def _levels(rows: Sequence[TrialRow]) -> dict[int, int]:
    """Trial -> one of the levels of gain, the same number of trials in each."""
    order = sorted((row for row in rows if row.feasible), key=lambda row: (row.gain or 0.0, -row.index))
    top = max(1, len(order) - 1)
    return {
        row.index: i * (LEVELS - 1) // top if len(order) > 1 else LEVELS - 1 for i, row in enumerate(order)
    }


def apart(wanted: Sequence[float], gap: float) -> list[float]:
    """The places nearest below which no two are closer than ``gap``, in the given order."""
    placed = list(wanted)
    last = -math.inf
    for i in sorted(range(len(wanted)), key=lambda i: (wanted[i], i)):
        last = placed[i] = max(wanted[i], last + gap)
    return placed


def page(figure: Figure, ident: str, label: str) -> str:
    """As :func:`qwen_ray.report.plots.as_svg`, with the colours of a sweep too."""
    svg = as_svg(figure, ident, label)
    for name in _LEVEL + _DOMAIN:
        svg = svg.replace(INK[name], f"var({name})")
    return svg
