"""Results and comparisons as text for a terminal, and as Markdown."""

from __future__ import annotations

from typing import Any

from qwen_ray.evaluation.gate import Gate


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
    """The changes of a comparison, what so few items miss, the verdict and why."""
    return "\n".join(
        [*change_lines(comparison, Gate.model_validate(comparison["gate"])), *verdict_lines(comparison)]
    )


def change_lines(comparison: dict[str, Any], gate: Gate) -> list[str]:
    """Before, after, paired difference and test of each category, and what so few items miss.

    ``p``: of the paired test, corrected for the number of categories; of a control as it is.
    """
    level = f"{gate.confidence * 100:g}% interval"
    lines = [
        f"  {'category':<16}{'role':<10}{'n':>5}{'before':>9}{'after':>8}{'change':>8}  {level:<16}{'p':>7}"
    ]
    for row in [*comparison["categories"], *comparison["controls"]]:
        lo, hi = (100 * v for v in row["delta_ci"])
        p = row.get("p_corrected", row["p"])
        lines.append(
            f"  {row['name']:<16}{row['role']:<10}{row['n']:>5}{100 * row['baseline']:>9.1f}"
            f"{100 * row['candidate']:>8.1f}{100 * row['delta']:>+8.1f}  {f'[{lo:+.1f}, {hi:+.1f}]':<16}"
            f"{'<0.001' if p < 0.001 else f'{p:.3f}':>7}"
        )
    return lines + [f"  {sentence}" for sentence in too_few(comparison, gate)]


def verdict_lines(judged: dict[str, Any]) -> list[str]:
    """The verdict and its reasons."""
    return [f"verdict: {judged['verdict']}", *(f"  - {reason}" for reason in judged["reasons"])]


def too_few(comparison: dict[str, Any], gate: Gate) -> list[str]:
    """A sentence for each category without a certain change whose items easily miss one as small as the gate
    asks about: the gain of a target, the tolerance of a strength."""
    suite, sentences = comparison["baseline"]["suite"], []
    for row in comparison["categories"]:
        asked = gate.min_gain if row["role"] == "target" else gate.tolerance_of(suite, row["name"])
        if row["detectable"] > asked and row["delta_ci"][0] <= 0 <= row["delta_ci"][1]:
            sentences.append(
                f"{row['name']}: with {row['n']} items you cannot see a change of {100 * asked:g} points; "
                f"one of {100 * row['detectable']:.1f} shows in four of five comparisons"
            )
    return sentences


def improvements_table(table: dict[str, Any]) -> str:
    """Scores of many models side by side, each with its difference to the first; then what follows."""
    titles = [model["title"] for model in table["models"]]
    width = max(16, *(len(title) + 2 for title in titles))
    lines = [f"  {'category':<16}{'role':<10}{'n':>5}" + "".join(f"{title:>{width}}" for title in titles)]
    for row in table["rows"]:
        cells = "".join(f"{_short(row['cells'][model['id']]):>{width}}" for model in table["models"])
        lines.append(f"  {row['name']:<16}{row['role']:<10}{row['n']:>5}{cells}")
    lines.append(f"points; in brackets against {table['base']}, * where the interval leaves out 0")
    lines += [f"{model}: {verdict['verdict']}" for model, verdict in table["verdicts"].items()]
    return "\n".join(lines + _reading_lines(table))


def improvements_markdown(table: dict[str, Any]) -> str:
    """The same with every interval, and the reasons of each verdict."""
    level = f"{table['gate']['confidence'] * 100:g}%"
    titles = [f"{model['title']} (`{model['id']}`)" for model in table["models"]]
    limit = table["settings"]["limit"]
    lines = [
        f"# {table['suite']} suite, version {table['suite_version']}: improvements as measured",
        "",
        f"Points of 100 with {level} intervals; in bold the difference to `{table['base']}` on the same items"
        + ("." if limit is None else f". At most {limit} items of each task."),
        "",
        "| category | role | n | " + " | ".join(titles) + " |",
        "|---|---|--:|" + "---|" * len(titles),
    ]
    for row in table["rows"]:
        cells = " | ".join(_full(row["cells"][model["id"]]) for model in table["models"])
        lines.append(f"| {row['name']} | {row['role']} | {row['n']} | {cells} |")
    for model, verdict in table["verdicts"].items():
        lines += ["", f"## `{model}`: {verdict['verdict']}", ""]
        lines += [f"- {reason}" for reason in verdict["reasons"]]
    lines += ["", "## Who answered", ""]
    lines += [
        "| model | prompts answered by | after reading passages | cut at the start |",
        "|---|---|--:|--:|",
    ]
    for model in table["models"]:
        shares = ", ".join(f"{name} {count}" for name, count in model["adapters"].items())
        lines.append(f"| `{model['id']}` | {shares} | {model['with_passages']} | {model['truncated']} |")
    if table["rag"]:
        lines += ["", "## Where reading passages helps", ""]
        lines += [line if line.startswith(" ") else f"- {line}" for line in _reading_lines(table)]
    return "\n".join(lines) + "\n"


def _short(cell: dict[str, Any]) -> str:
    text = f"{100 * cell['score']:.1f}"
    if "delta" not in cell:
        return text + " " * 9
    certain = "*" if cell["delta_ci"][0] > 0 or cell["delta_ci"][1] < 0 else " "
    change = f"({100 * cell['delta']:+.1f})"
    return f"{text} {change:>7}{certain}"


def _full(cell: dict[str, Any]) -> str:
    lo, hi = (100 * v for v in cell["ci"])
    text = f"{100 * cell['score']:.1f} [{lo:.1f}, {hi:.1f}]"
    if "delta" in cell:
        text += f" **{100 * cell['delta']:+.1f}** {_interval(cell['delta_ci'])}"
    return text


def _interval(ends: list[float]) -> str:
    return f"[{100 * ends[0]:+.1f}, {100 * ends[1]:+.1f}]"


_EFFECTS = {"helps": "helps", "harms": "harms", "not shown": "no difference shown"}


def _reading_lines(table: dict[str, Any]) -> list[str]:
    """Of each model that reads: where that helps, and where not."""
    lines = []
    for reading in table["rag"]:
        lines.append(
            f"+RAG on {reading['without']} (passages were read before {reading['with_passages']} of "
            f"{reading['answers']} prompts):"
        )
        for effect, text in _EFFECTS.items():
            rows = [
                f"{row['name']} {100 * row['delta']:+.1f} {_interval(row['delta_ci'])}"
                for row in reading["categories"]
                if row["effect"] == effect
            ]
            if rows or effect == "helps":
                lines.append(f"  - {text}: {', '.join(rows) or 'nowhere'}")
    return lines
