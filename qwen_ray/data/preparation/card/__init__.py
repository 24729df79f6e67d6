"""The data card: what is in a training file, where it comes from, and what was left out and why.

One HTML page that needs nothing but itself, and the same as JSON. What a card should tell follows Gebru et
al., "Datasheets for Datasets" (arXiv 1803.09010).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.fsio import beside, write_json, write_text

if TYPE_CHECKING:
    from markupsafe import Markup

HERE = Path(__file__).parent
SHOWN = 20
"""Rows of a list that stand open; the rest is folded."""
HITS_SHOWN, HITS_FOLDED = 50, 1000
"""Benchmark hits that stand open, and that are folded; the JSON holds all."""
LONG = 900
"""Characters of a text that stand open."""


def write_card(card: dict[str, Any], out: Path) -> Path:
    """Write ``<out>.card.html`` and ``<out>.card.json``; returns the page's path.

    ``card`` is what the pipeline counted (schema ``qwen-ray/data-card/1``, docs/data.md). The page holds no
    script and asks for nothing; every text of a record is escaped. The same card gives the same bytes.
    """
    write_json(beside(out, "card.json"), card)
    page = beside(out, "card.html")
    write_text(page, render(card))
    return page


def render(card: dict[str, Any]) -> str:
    """The page as HTML. See :func:`write_card`."""
    from markupsafe import Markup

    from qwen_ray.report.html import HERE as REPORT
    from qwen_ray.report.html import templates

    environment = templates(HERE)
    environment.filters.update(
        number=_number, share=_share, split=_split, cut=_cut, figure=_figure, path=_path
    )
    css = [
        (REPORT / "report.css").read_text(encoding="utf-8"),
        (HERE / "card.css").read_text(encoding="utf-8"),
    ]
    text = environment.get_template("card.html.j2").render(
        card=card,
        css=Markup("\n".join(css)),
        read=sum(source["read"] for source in card["sources"].values()),
        topics=_by_count(card["coverage"]["topics"]),
        kinds=_by_count(card["coverage"]["kinds"]),
        dropped=sorted(card["dropped"].items(), key=lambda item: (-item[1]["count"], item[0])),
        benchmarks=_benchmarks(card["contamination"]),
        shown=SHOWN,
        hits_shown=HITS_SHOWN,
        hits_folded=HITS_FOLDED,
    )
    return text.lstrip()  # macros leave blank lines before the doctype


def _benchmarks(contamination: dict[str, Any]) -> list[dict[str, Any]]:
    """Per benchmark: its items, and how many records hit it in each part (question, passage) of an item."""
    rows: dict[str, dict[str, Any]] = {
        checked["benchmark"]: {"name": checked["benchmark"], "items": checked["items"], "parts": {}}
        for checked in contamination["checked"]
    }
    records: dict[tuple[str, str], set[str]] = {}
    for hit in contamination["hits"]:
        records.setdefault((hit["benchmark"], hit["part"]), set()).add(hit["record"])
    for (benchmark, part), found in sorted(records.items()):
        row = rows.setdefault(benchmark, {"name": benchmark, "items": None, "parts": {}})
        row["parts"][part] = len(found)
    return sorted(rows.values(), key=lambda row: (-sum(row["parts"].values()), row["name"]))


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _number(number: float | None) -> str:
    """Thousands parted by a thin space that does not break."""
    return "not known" if number is None else f"{number:,}".replace(",", "\u202f")


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def _figure(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) and not value.is_integer() else _number(int(value))


def _split(items: list[Any], at: int) -> tuple[list[Any], list[Any]]:
    """What stands open and what is folded."""
    return items[:at], items[at:]


def _cut(text: str) -> tuple[str, str]:
    """A long text's beginning, up to a space, and the rest."""
    if len(text) <= LONG:
        return text, ""
    at = text.rfind(" ", LONG // 2, LONG)
    at = LONG if at < 0 else at
    return text[:at], text[at:].lstrip()


def _path(name: str) -> Markup:
    """A name that breaks at its slashes where a line is too short for it."""
    from markupsafe import Markup, escape

    return escape(name).replace("/", Markup("/<wbr>"))
