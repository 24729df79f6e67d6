"""Results and comparisons as text for a terminal."""

from __future__ import annotations

from typing import Any


def result_table(result: dict[str, Any]) -> str:
    """Score and interval of each category, in points."""
    lines = [
        f"{result['suite']} suite, {result['model']}"
        + (f" + {result['adapter']}" if result["adapter"] else "")
    ]
    for name, c in {**result["categories"], **result["controls"]}.items():
        lo, hi = (100 * v for v in c["ci"])
        lines.append(f"  {name:<16}{100 * c['score']:6.1f}  [{lo:.1f}, {hi:.1f}]  n={c['n']}  {c['role']}")
    return "\n".join(lines)


def comparison_table(comparison: dict[str, Any]) -> str:
    """Before, after and paired difference of each category, the verdict and why."""
    lines = [f"  {'category':<16}{'role':<10}{'n':>5}{'before':>9}{'after':>8}{'change':>8}  95% interval"]
    level = f"{comparison['gate']['confidence'] * 100:g}%"
    lines[0] = lines[0].replace("95%", level)
    for row in [*comparison["categories"], *comparison["controls"]]:
        lo, hi = (100 * v for v in row["delta_ci"])
        lines.append(
            f"  {row['name']:<16}{row['role']:<10}{row['n']:>5}{100 * row['baseline']:>9.1f}"
            f"{100 * row['candidate']:>8.1f}{100 * row['delta']:>+8.1f}  [{lo:+.1f}, {hi:+.1f}]"
        )
    lines.append(f"verdict: {comparison['verdict']}")
    lines += [f"  - {reason}" for reason in comparison["reasons"]]
    return "\n".join(lines)
