"""The report of a run: gathers what lies in the run folders and hands it to the page."""

from __future__ import annotations

import platform
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwen_ray.config import read_config
from qwen_ray.fsio import read_json
from qwen_ray.registry import LINEAGE
from qwen_ray.report.html import ExtraComparison, MixturePart, NoteSection, write_report
from qwen_ray.report.plots import RunCurve
from qwen_ray.training.driver import CONFIG, RUN
from qwen_ray.training.tracking import read_metrics

PACKAGES = ("qwen-ray", "torch", "ray", "transformers", "peft", "lm-eval")


def build_report(
    out: Path,
    *,
    comparison: dict[str, Any],
    baseline: dict[str, Any],
    candidate: dict[str, Any],
    runs: list[Path],
    commands: list[str],
    title: str | None = None,
    sections: list[NoteSection] | None = None,
    extra: ExtraComparison | None = None,
) -> None:
    """Write the HTML report. ``runs`` are training run folders; the first one's mixture is shown."""
    what = f"{candidate['model']}" + (f" + {candidate['adapter']}" if candidate["adapter"] else "")
    meaning = NoteSection("About this suite", candidate.get("description", ""))
    write_report(
        out,
        title=title or f"{what}: before and after",
        comparison=comparison,
        baseline=baseline,
        candidate=candidate,
        runs=[RunCurve(run.name, read_metrics(run)) for run in runs],
        sections=[*([meaning] if meaning.text else []), *(sections or [])],
        commands=commands,
        versions={"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        extra=extra,
        mixture=_mixture(runs[0]) if runs else None,
    )


def _mixture(run: Path) -> list[MixturePart]:
    """What a run was trained on, by domain."""
    from qwen_ray.data.dataset import load_splits

    config = read_config(run / CONFIG)
    records, _ = load_splits(config.data, seed=config.seed)
    counts: Counter[str] = Counter()
    licences: dict[str, set[str]] = {}
    for record in records:
        counts[record.domain] += 1
        licences.setdefault(record.domain, set()).add(record.license)
    shares = read_json(run / read_json(run / RUN)["result"]["artifact"] / LINEAGE)["data"]["shares"]
    return [
        MixturePart(
            name=domain,
            role="training data",
            records=count,
            share=shares.get(domain, 0.0),
            licences=sorted(licences[domain]),
        )
        for domain, count in sorted(counts.items())
    ]
