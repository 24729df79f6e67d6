"""Write the report. See :func:`write_report`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from qwen_ray.fsio import write_text
from qwen_ray.report.plots import RunCurve, before_after, loss_curve
from qwen_ray.report.rows import Row, category_rows, control_rows

__all__ = ["ExtraComparison", "MixturePart", "NoteSection", "RunCurve", "write_report"]

HERE = Path(__file__).parent

VERDICTS = {
    "promote": ("Promote", "Every target gained enough and no strength was lost."),
    "hold": ("Hold", "No strength was lost, but a target did not gain enough to replace what is served."),
    "regress": ("Regress", "Something got worse; what is served should stay."),
}
METRICS = {
    "acc": "share of questions where the right choice is the most likely one",
    "acc_norm": "share of questions where the right choice is the most likely one for its length",
    "exact_match": "share of questions where the final answer is exactly right",
}


@dataclass(frozen=True)
class NoteSection:
    """A section of prose; blank lines part its paragraphs."""

    title: str
    text: str

    @property
    def paragraphs(self) -> list[str]:
        """The text without its blank lines."""
        return [p.strip() for p in self.text.split("\n\n") if p.strip()]


@dataclass(frozen=True)
class ExtraComparison:
    """A second candidate against the same baseline, with the reason for showing it."""

    title: str
    text: str
    comparison: dict[str, Any]
    candidate: dict[str, Any]


@dataclass(frozen=True)
class MixturePart:
    """One part of the training mixture. ``share`` is its fraction of what was trained on."""

    name: str
    role: str
    records: int
    share: float
    licences: list[str] = field(default_factory=list)


def write_report(
    out: Path,
    *,
    title: str,
    comparison: dict[str, Any],
    baseline: dict[str, Any],
    candidate: dict[str, Any],
    runs: list[RunCurve],
    sections: list[NoteSection],
    commands: list[str],
    versions: dict[str, str],
    extra: ExtraComparison | None = None,
    mixture: list[MixturePart] | None = None,
) -> None:
    """Write one self-contained HTML file to ``out``: no script, no request, light and dark.

    ``comparison`` is of ``baseline`` and ``candidate``, which are EvalResults. ``extra`` is shown as
    the reason for the replay mix. The same input gives the same bytes.
    """
    rows = category_rows(comparison, baseline, candidate)
    page = environment().get_template("report.html.j2")
    word, sentence = VERDICTS[comparison["verdict"]]
    gate = comparison.get("gate", {})
    text = page.render(
        css=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        title=title,
        verdict=comparison["verdict"],
        verdict_word=word,
        verdict_sentence=sentence,
        reasons=comparison["reasons"],
        baseline=baseline,
        candidate=candidate,
        rows=rows,
        plot=markup(before_after(rows, "scores")) if rows else None,
        runs=[(run.name, markup(loss_curve(run, f"loss{i}"))) for i, run in enumerate(runs, start=1)],
        extra=extra,
        extra_rows=category_rows(extra.comparison, baseline, extra.candidate) if extra else [],
        controls=control_rows(comparison, baseline, candidate),
        confidence=f"{100 * gate.get('confidence', 0.95):g} %",
        min_gain=f"{100 * gate['min_gain']:g}" if "min_gain" in gate else None,
        tolerance=f"{100 * gate['tolerance']:g}" if "tolerance" in gate else None,
        metrics=_metrics(candidate),
        sections=sections,
        commands=commands,
        versions=versions,
        settings=_settings(comparison, baseline, candidate),
        mixture=mixture or [],
    )
    write_text(out, text.lstrip())  # macros leave blank lines before the doctype


def templates(folder: Path) -> Environment:
    """The page templates of a folder: everything is escaped, an unknown name is an error."""
    return Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def environment() -> Environment:
    environment = templates(HERE)
    environment.filters.update(
        points=_points, signed=_signed, interval=_interval, signed_interval=_signed_interval
    )
    environment.globals["models"] = _model_name
    return environment


def markup(svg: str | None) -> Markup | None:
    # The plots escape what they draw and their label (see plots.py), so they go in as they are.
    return None if svg is None else Markup(svg)


def _metrics(candidate: dict[str, Any]) -> dict[str, str]:
    """Metric -> its meaning, for the metrics that occur."""
    used = {c["metric"] for key in ("categories", "controls") for c in candidate.get(key, {}).values()}
    return {name: METRICS.get(name, "as the suite defines it") for name in sorted(used)}


def _settings(
    comparison: dict[str, Any], baseline: dict[str, Any], candidate: dict[str, Any]
) -> dict[str, str]:
    """What the numbers depend on, flat. A setting that differs between the two results shows both."""
    shown = {
        "suite": f"{candidate['suite']}, version {candidate['suite_version']}",
        "baseline": f"{_model_name(baseline)}, evaluated {baseline['created_at']}",
        "candidate": f"{_model_name(candidate)}, evaluated {candidate['created_at']}",
    }
    first, second = flat(baseline["settings"]), flat(candidate["settings"])
    for key in sorted(first.keys() | second.keys()):
        before, after = first.get(key, "not set"), second.get(key, "not set")
        shown[f"evaluation: {key}"] = after if before == after else f"baseline {before}, candidate {after}"
    for key, value in flat(comparison.get("gate", {})).items():
        shown[f"gate: {key}"] = value
    return shown


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted keys, with their values as text."""
    found: dict[str, str] = {}
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
    return found


def _model_name(result: dict[str, Any]) -> str:
    adapter = result.get("adapter")
    return f"{result['model']} with adapter {adapter}" if adapter else f"{result['model']} without adapter"


def _points(value: float) -> str:
    return f"{value:.1f}"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "−")


def _interval(ci: tuple[float, float]) -> str:
    return f"{ci[0]:.1f} to {ci[1]:.1f}"


def _signed_interval(row: Row) -> str:
    return f"{_signed(row.delta_ci[0])} to {_signed(row.delta_ci[1])}"
