"""The protocol's documents as text for a terminal."""

from __future__ import annotations

from typing import Any

from qwen_ray.evaluation.gate import Gate
from qwen_ray.evaluation.report_text import change_lines, verdict_lines

FEW = "0.1"
"""The share of changed answers for which it is said that a gain cannot be seen."""
STANDINGS = {"weak": "weak", "perhaps": "perhaps weak", "not weak": "not weak", "control": "control"}


def before_text(document: dict[str, Any]) -> str:
    """Baseline and standing by category, then what so many items can show."""
    confidence = document["gate"]["confidence"]
    lines = []
    for suite in document["suites"]:
        lines.append(
            f"{suite['suite']} suite{', held out' if suite['held_out'] else ''}: "
            f"weak is certainly below {100 * suite['threshold']:.1f} ({suite['threshold_is']})"
        )
        lines.append(f"  {'category':<20}{'n':>5}{'score':>7}  {f'{100 * confidence:g}% interval':<16}")
        for row in suite["categories"]:
            lo, hi = (100 * v for v in row["ci"])
            lines.append(
                f"  {row['name']:<20}{row['n']:>5}{100 * row['score']:>7.1f}  {f'[{lo:.1f}, {hi:.1f}]':<16}"
                f"{STANDINGS[row['standing']]}"
            )
    lines += ["", "smallest true change that the items show in four of five comparisons, in points,"]
    changes = list(document["suites"][0]["categories"][0]["detectable"])
    lines.append("if this share of the answers changes between right and wrong:")
    lines.append(f"  {'category':<20}{'n':>5}" + "".join(f"{100 * float(c):>7.0f}%" for c in changes))
    rows = [row for suite in document["suites"] for row in suite["categories"]]
    for row in rows:
        cells = "".join(f"{100 * row['detectable'][c]:>8.1f}" for c in changes)
        lines.append(f"  {row['name']:<20}{row['n']:>5}{cells}")
    warning = cannot_see(document)
    lines += [f"  {warning}"] if warning else []
    lines.append("")
    lines += [
        f"{found['suite']}/{found['category']}: {found['failed']} wrong answers, {len(found['items'])} chosen"
        for found in document["failures"]
    ]
    return "\n".join(lines) if document["weak"] else "\n".join([*lines, "no category is certainly weak"])


def cannot_see(document: dict[str, Any]) -> str | None:
    """That these items miss the gain the gate asks for even where few answers change; None if they do not."""
    asked = document["gate"]["min_gain"]
    takes = {
        row["n"]: row["detectable"][FEW]
        for suite in document["suites"]
        for row in suite["categories"]
        if row["standing"] != "control" and row["detectable"][FEW] > asked
    }
    if not takes:
        return None
    fewest, most = min(takes), max(takes)
    items = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    needs = (
        f"{100 * takes[fewest]:.1f}"
        if fewest == most
        else f"{100 * takes[fewest]:.1f} to {100 * takes[most]:.1f}"
    )
    return (
        f"with {items} items you cannot see {100 * asked:g} points: even if only {100 * float(FEW):g}% "
        f"of the answers change, it takes {needs}"
    )


def during_text(seen: dict[str, Any]) -> str:
    """A line a step: the worst fall of a strength, and every score, in points."""
    names = list(seen["steps"][0]["scores"])
    short = {name: name.partition("/")[2] for name in names}
    if len(set(short.values())) < len(names):
        short = {name: name for name in names}
    widths = {name: max(8, len(short[name]) + 2) for name in names}
    lines = [f"{'step':>8}{'fall':>8}" + "".join(f"{short[name]:>{widths[name]}}" for name in names)]
    for row in seen["steps"]:
        worst = "" if row["worst"] is None else f"{100 * row['worst']:.1f}"
        cells = "".join(
            f"{100 * row['scores'][name]:>{widths[name]}.1f}" if name in row["scores"] else " " * widths[name]
            for name in names
        )
        mark = "  beyond the tolerance" if row["step"] in seen["broken"] else ""
        lines.append(f"{row['step']:>8}{worst:>8}{cells}{mark}")
    tolerance = f"{100 * seen['tolerance']:g} points"
    if seen["broken"]:
        lines.append(f"a strength fell more than {tolerance} at step {', '.join(map(str, seen['broken']))}")
    elif all(row["worst"] is None for row in seen["steps"]):
        lines.append("no category of the suites is a strength, so no forgetting can be seen")
    else:
        lines.append(f"every strength stayed within {tolerance} of the baseline")
    return "\n".join(lines)


def after_text(document: dict[str, Any]) -> str:
    """The comparison of each suite, flips, regressions, and the verdict over all."""
    gate, lines = Gate.model_validate(document["gate"]), []
    for suite in document["suites"]:
        held_out = ", held out" if suite["held_out"] else ""
        lines.append(f"{suite['baseline']['suite']} suite{held_out}")
        lines += change_lines(suite, gate)
    lines += [
        f"{flip['suite']}/{flip['category']}: {flip['won']} items won, {flip['lost']} lost"
        for flip in document["flips"]
    ]
    lines += [
        f"regression: {row['suite']}/{row['name']} {100 * row['delta']:+.1f} "
        f"(corrected p={row['p_corrected']:.2g})"
        for row in document["regressions"]
    ]
    return "\n".join([*lines, *verdict_lines(document)])
