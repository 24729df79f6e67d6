"""The plot of the registry's site: what was in production, category by category, over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from qwen_ray.report.plots import STAND_IN, as_svg, new_figure, plain, plot_text
from qwen_ray.report.registry_history import Period, Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PANELS = 24
"""Categories that are drawn; the targets come first."""
_LABEL_ROOM = 0.09
"""Least distance of two version numbers above a panel, as a share of its width."""
_DAY = 86400.0


def production_plot(
    series: Sequence[Series], periods: Sequence[Period], until: str, ident: str
) -> str | None:
    """A panel a category on one scale: the score of what was in production, with its interval.

    ``until`` (ISO time) is the right end. Dashed: the base model. Above the first row the versions, where
    they came in. None without scores.
    """
    drawn = series[:PANELS]
    if not drawn:
        return None
    begin = min(_days(m.at) for s in drawn for m in s.measures)
    end = max(_days(until), begin + 1 / 24)
    columns = min(2, len(drawn))
    lines = -(-len(drawn) // columns)
    figure, first = new_figure(0.55 + 1.2 * lines)
    first.remove()
    grid = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for i, (axes, one) in enumerate(zip(grid.flat, drawn, strict=False)):
        plain(axes)
        _panel(axes, one, end - begin, begin)
        name = one.name if one.role == "target" else f"{one.name} ({one.role})"
        axes.set_title(
            plot_text(name, 30), fontsize=8, color=STAND_IN["--ink"], loc="left", pad=11 if i < columns else 3
        )
        _moves(axes, periods, begin, end, labels=i < columns)
    for axes in list(grid.flat)[len(drawn) :]:
        axes.set_axis_off()
    low, high = _range(drawn)
    grid[0, 0].set_ylim(low, high + 0.02 * (high - low))  # a line at 100 shows whole
    for axes in grid.flat:
        axes.set_xlim(0, end - begin)
        axes.set_xticks([0, end - begin], [_time(begin, end - begin), _time(end, end - begin)])
        for label, side in zip(axes.get_xticklabels(), ("left", "right"), strict=True):
            label.set_horizontalalignment(side)
    said = "; ".join(
        f"{s.name}: {100 * s.measures[0].score:.1f} to {100 * s.measures[-1].score:.1f}"
        + ("" if s.base is None else f", base {100 * s.base:.1f}")
        for s in drawn
    )
    return as_svg(figure, ident, f"Score in points of what was in production, over time. {said}.")


def _panel(axes: Axes, series: Series, end: float, begin: float) -> None:
    ink = STAND_IN["--train"]
    measures = series.measures
    times = [_days(m.at) - begin for m in measures] + [end]
    held = [*measures, measures[-1]]  # a score holds until the next one
    axes.plot(times, [100 * m.score for m in held], color=ink, linewidth=1.4, drawstyle="steps-post")
    axes.plot(
        times[:-1], [100 * m.score for m in measures], color=ink, linestyle="none", marker="o", markersize=2.2
    )
    bounds = [m.ci or (m.score, m.score) for m in held]
    low, high = [100 * b[0] for b in bounds], [100 * b[1] for b in bounds]
    axes.fill_between(times, low, high, step="post", color=ink, alpha=0.16, linewidth=0)
    if series.base is not None:
        axes.axhline(100 * series.base, color=STAND_IN["--before"], linewidth=1.1, linestyle=(0, (3, 2)))
    axes.grid(axis="y", color=STAND_IN["--rule"], linewidth=0.5)
    axes.tick_params(labelsize=7)


def _moves(axes: Axes, periods: Sequence[Period], begin: float, end: float, *, labels: bool) -> None:
    last = -math.inf
    for period in periods:
        at = max(_days(period.since) - begin, 0.0)
        axes.axvline(at, color=STAND_IN["--rule"], linewidth=0.8, zorder=0)
        if labels and (at - last) / (end - begin) >= _LABEL_ROOM:
            style: dict[str, Any] = {
                "fontsize": 6.5,
                "color": STAND_IN["--muted"],
                "ha": "left" if at == 0 else "center",
            }
            axes.annotate(
                f"v{period.version}", (at, 1), (0, 2), xycoords=("data", "axes fraction"),
                textcoords="offset points", **style,
            )  # fmt: skip
            last = at


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """Limits in points, at tens, that show every interval and base."""
    values = [v for s in series for m in s.measures for v in (m.ci or (m.score, m.score))]
    values += [s.base for s in series if s.base is not None]
    low, high = 10 * math.floor(10 * min(values)), 10 * math.ceil(10 * max(values))
    return max(0.0, low), min(100.0, high if high > low else low + 10)


def _days(at: str) -> float:
    return datetime.fromisoformat(at).timestamp() / _DAY


def _time(days: float, span: float) -> str:
    """A date; with the time of day where the plot spans less than two days."""
    at = datetime.fromtimestamp(days * _DAY, UTC)
    return f"{at:%Y-%m-%d %H:%M}" if span < 2 else f"{at:%Y-%m-%d}"
