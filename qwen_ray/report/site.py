"""The registry as a site of static pages: what is in production, why, what it cost (:func:`write_site`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from qwen_ray.fsio import write_text
from qwen_ray.registry import Registry
from qwen_ray.registry.version import parents_of
from qwen_ray.report import site_pages as pages
from qwen_ray.report.card import card_text
from qwen_ray.report.html import HERE, environment, flat, markup
from qwen_ray.report.pipeline_runs import RunRow, pipeline_runs
from qwen_ray.report.registry_history import (
    NameHistory,
    VersionHistory,
    production_series,
    read_history,
)
from qwen_ray.report.site_lineage import graph, identity, lineage_text, settings, training_data
from qwen_ray.report.site_plots import PANELS, production_plot

LATEST = 12
"""Decisions that the first page shows unfolded."""


@dataclass(frozen=True)
class Site:
    """What was written. ``index`` is the first page."""

    index: Path
    pages: list[Path]
    names: list[str]


def write_site(
    registry: Registry,
    out: Path,
    *,
    pipelines: str | Path | None = None,
    title: str | None = None,
    price: float | None = None,
) -> Site:
    """Write the pages of a registry into the folder ``out``: no script, no request, light and dark.

    ``pipelines`` is the folder or URI of pipelines' state, ``price`` the dollars of a GPU-hour. The same
    registry gives the same bytes. Raises :class:`UserError` where ``pipelines`` has none.
    """
    histories = [read_history(registry, name) for name in registry.names()]
    histories.sort(key=lambda history: history.production is None)
    runs = pipeline_runs(pipelines) if pipelines is not None else {}
    made = _Pages(out, [history.name for history in histories], title or "Adapters in production")
    sections = [_adapter(history, made.names) for history in histories]
    decided = [decision for history in histories for decision in pages.decisions(history)]
    decided.sort(key=lambda decision: decision.at, reverse=True)
    made.write(
        "index.html",
        "site_index.html.j2",
        title=made.title,
        adapters=sections,
        latest=decided[:LATEST],
        older=decided[LATEST:],
        runs=_newest(runs),
        spent={h.name: pages.spent(h.versions.values(), price) for h in histories},
        total=pages.spent([v for h in histories for v in h.versions.values()], price),
        judged=sum(len(v.verdicts) for h in histories for v in h.versions.values()),
        versions=sum(len(h.versions) for h in histories),
        last=max((h.events[-1].at for h in histories if h.events), default=None),
    )
    for history, section in zip(histories, sections, strict=True):
        made.write(
            f"adapters/{history.name}/index.html",
            "site_adapter.html.j2",
            title=history.name,
            adapter=section,
            history=history,
            decisions=pages.decisions(history)[::-1],
            moves=pages.alias_log(history.events),
            graph=graph(history, made.names),
            spent=pages.spent(history.versions.values(), price),
        )
        for number, version in history.versions.items():
            made.write(
                f"adapters/{history.name}/{number}.html",
                "site_version.html.j2",
                title=version.ref,
                **_version(history, version, price),
            )
            made.put(f"adapters/{history.name}/{number}.md", card_text(history, version))
    return Site(out / "index.html", made.written, made.names)


class _Pages:
    """Renders templates into files below one folder, with links that hold from file:// too."""

    def __init__(self, out: Path, names: list[str], title: str) -> None:
        self.out, self.names, self.title = out, names, title
        self.written: list[Path] = []
        self._templates = _environment()
        self._css = Markup(
            "".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "site.css"))
        )

    def write(self, file: str, template: str, **values: Any) -> None:
        top = "../" * file.count("/")
        text = self._templates.get_template(template).render(
            css=self._css, top=top, site=self.title, names=self.names, **values
        )
        self.put(file, text.lstrip())  # macros leave blank lines before the doctype

    def put(self, file: str, text: str) -> None:
        write_text(self.out / file, text)
        self.written.append(self.out / file)


def _environment() -> Environment:
    found = environment()
    found.filters.update(
        day=lambda at: at[:10],
        minute=lambda at: at[:16].replace("T", " "),
        share=lambda value: f"{100 * value:.1f}",
        signed_share=pages.signed_points,
        hours=lambda value: f"{value:.2f}" if value < 10 else f"{value:,.0f}",
        change_rows=pages.change_rows,
        decided=pages.decided,
        limits=lambda gate: flat({key: value for key, value in gate.items() if value not in (None, {}, [])}),
        parts=lambda ref: ref.rpartition("@")[::2],
    )
    found.filters["word"] = pages.word_of
    found.globals["words"] = pages.WORDS
    return found


def _newest(runs: dict[str, list[RunRow]]) -> list[tuple[str, RunRow]]:
    """All runs with their pipeline's name, the newest first."""
    found = [(name, run) for name, listed in runs.items() for run in listed]
    return sorted(found, key=lambda pair: pair[1].at, reverse=True)


def _adapter(history: NameHistory, names: Sequence[str]) -> dict[str, Any]:
    """What the first page and the adapter's own both say of a name."""
    series = production_series(history)
    last = history.events[-1].at if history.events else ""
    plot = production_plot(series, history.periods, last, f"production-{names.index(history.name)}")
    current = history.periods[-1] if history.periods and history.periods[-1].until is None else None
    return {
        "name": history.name,
        "production": history.production,
        "standing": pages.standing(history),
        "period": current,
        "waiting": history.waiting,
        "canary": history.canary,
        "plot": markup(plot),
        "left_out": max(0, len(series) - PANELS),
        "versions": len(history.versions),
    }


def _version(history: NameHistory, version: VersionHistory, price: float | None) -> dict[str, Any]:
    return {
        "version": version,
        "in_production": [period for period in history.periods if period.version == version.number],
        "against_base": pages.standing_of(history, version),
        "moves": pages.alias_log(version.events),
        "parents": parents_of(version.lineage),
        "training": training_data(version.lineage),
        "settings": settings(version.lineage),
        "spent": pages.spent([version], price),
        "identity": identity(version),
        "lineage": lineage_text(version.lineage),
    }
