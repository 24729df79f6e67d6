"""The lineage of a name's versions as a drawing: each row a version, the newest on top, its base below.

Lanes as in the log of a version control system: a version stands in its parent's lane when it is the first to
go on from it, otherwise in one of its own. What comes from outside the name (base models, versions of other
names) has a trunk at the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

ROW, LANE, LANES_WIDTH = 30, 15, 105
"""Pixels: height of a row, distance of two lanes, the most that all lanes take."""
TEXT = 7.2
"""Pixels a character of a label takes, at most, in the page's 13 px font."""


@dataclass(frozen=True)
class Node:
    """One version or origin. ``parents`` are keys of other nodes; those that are not among them are left out.

    ``tone`` is a class of report.css for the dot; ``marks`` are (CSS class, text) behind the label.
    """

    key: str
    label: str
    parents: Sequence[str] = ()
    href: str | None = None
    tone: str = "none"
    marks: Sequence[tuple[str, str]] = ()
    strong: bool = False


@dataclass(frozen=True)
class Layout:
    """Where everything stands. Rows count from the oldest version (0) up; origins have rows below 0."""

    row: dict[str, int] = field(default_factory=dict)
    lane: dict[str, int] = field(default_factory=dict)
    lanes: int = 0


def layout(origins: Sequence[Node], versions: Sequence[Node]) -> Layout:
    """``versions`` are in order of age. No vertical line runs through a dot that it does not belong to."""
    rows = {node.key: i - len(origins) for i, node in enumerate([*origins, *versions])}
    lanes = {node.key: i for i, node in enumerate(origins)}
    first = len(origins)
    goes_on: dict[str, str] = {}  # parent to the child that stays in its lane
    for node in versions:
        if (parent := _primary(node, rows)) is not None and rows[parent] >= 0:
            goes_on.setdefault(parent, node.key)
    tips: list[str] = []  # the newest of each lane so far
    for node in versions:
        parent = _primary(node, rows)
        if parent is not None and goes_on.get(parent) == node.key:
            at = lanes[parent] - first
        else:
            # A branch's line runs down its own lane to the row of its parent, so that must be empty.
            since = rows[parent] if parent is not None and rows[parent] >= 0 else len(rows)
            free = (i for i, tip in enumerate(tips) if tip not in goes_on and rows[tip] < since)
            at = next(free, len(tips))
        if at == len(tips):
            tips.append(node.key)
        tips[at] = node.key
        lanes[node.key] = first + at
    return Layout(rows, lanes, first + len(tips))


def _primary(node: Node, rows: dict[str, int]) -> str | None:
    """The first parent that is older."""
    return next((p for p in node.parents if p in rows and rows[p] < rows[node.key]), None)


def lineage_svg(origins: Sequence[Node], versions: Sequence[Node], label: str) -> Markup:
    """The drawing as an SVG element in the page's colours; its labels are links where a node has one."""
    nodes = [*origins, *versions]
    places = layout(origins, versions)
    step = min(LANE, LANES_WIDTH / max(1, places.lanes))
    top = max(places.row.values())
    at = {
        node.key: (11 + step * places.lane[node.key], ROW / 2 + ROW * (top - places.row[node.key]))
        for node in nodes
    }
    text_x = 11 + step * places.lanes
    longest = max(len(" ".join([n.label, *(text for _, text in n.marks)])) + 2 * len(n.marks) for n in nodes)
    width, height = round(text_x + TEXT * longest + 8), ROW * len(nodes)
    parts = [
        f'<svg class="lineage" role="group" aria-label="{escape(label)}" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}">'
    ]
    for node in nodes:
        known = [p for p in node.parents if p in at and places.row[p] < places.row[node.key]]
        parts += [
            _edge(at[p], at[node.key], trunk=places.row[p] < 0, more=i > 0) for i, p in enumerate(known)
        ]
    parts += [_dot(node, at[node.key], text_x) for node in reversed(nodes)]  # as they are read, from the top
    return Markup("\n".join([*parts, "</svg>"]))


def _edge(old: tuple[float, float], new: tuple[float, float], *, trunk: bool, more: bool) -> str:
    (x0, y0), (x1, y1) = old, new
    bend = ROW / 3
    if more:  # a further parent, as of a merge
        path = f"M{x1:g} {y1:g}C{x1:g} {y1 + ROW:g} {x0:g} {y0 - ROW:g} {x0:g} {y0:g}"
    elif x0 == x1:
        path = f"M{x1:g} {y1:g}V{y0:g}"
    elif trunk:  # up the trunk, then across
        path = f"M{x1:g} {y1:g}H{x0 + bend:g}Q{x0:g} {y1:g} {x0:g} {y1 + bend:g}V{y0:g}"
    else:  # down its own lane, then across to the parent
        turn = bend if x0 < x1 else -bend
        path = f"M{x1:g} {y1:g}V{y0 - bend:g}Q{x1:g} {y0:g} {x1 - turn:g} {y0:g}H{x0:g}"
    return f'<path class="{"edge more" if more else "edge"}" d="{path}"/>'


def _dot(node: Node, place: tuple[float, float], text_x: float) -> str:
    x, y = place
    ring = f'<circle class="ring" cx="{x:g}" cy="{y:g}" r="8.5"/>' if node.strong else ""
    marks = "".join(f'<tspan class="{css}" dx="9">{escape(text)}</tspan>' for css, text in node.marks)
    name = f'<tspan class="name">{escape(node.label)}</tspan>'
    if node.href:
        name = f'<a href="{escape(node.href)}">{name}</a>'
    return (
        f'{ring}<circle class="dot {node.tone}" cx="{x:g}" cy="{y:g}" r="5"/>'
        f'<text x="{text_x:g}" y="{y + 4.5:g}">{name}{marks}</text>'
    )
