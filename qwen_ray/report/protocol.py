"""The pages of the evaluation protocol: what is weak and in which questions, and what changed afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from qwen_ray.evaluation.gate import Gate
from qwen_ray.evaluation.protocol_text import STANDINGS, cannot_see
from qwen_ray.evaluation.report_text import too_few
from qwen_ray.fsio import write_text
from qwen_ray.report.html import HERE, VERDICTS, environment
from qwen_ray.report.rows import category_rows, control_rows

MOST = 50
"""Flipped items of a category that the page shows each way; the document beside it has them all."""


def write_before(out: Path, document: dict[str, Any]) -> None:
    """Write the page of :func:`qwen_ray.evaluation.protocol.before`: one file, no script, no request."""
    _write(
        out,
        "protocol_before.html.j2",
        document=document,
        standings=STANDINGS,
        warning=cannot_see(document),
        changes=list(document["suites"][0]["categories"][0]["detectable"]),
        confidence=f"{100 * document['gate']['confidence']:g} %",
    )


def write_after(
    out: Path,
    document: dict[str, Any],
    baselines: Sequence[dict[str, Any]],
    candidates: Sequence[dict[str, Any]],
) -> None:
    """Write the page of :func:`qwen_ray.evaluation.protocol.after`, whose suites are those of ``baselines``;
    ``candidates`` in any order.
    """
    gate = Gate.model_validate(document["gate"])
    by_suite = {result["suite"]: result for result in candidates}
    suites = []
    for compared, baseline in zip(document["suites"], baselines, strict=True):
        candidate = by_suite[baseline["suite"]]
        comparison = {**compared, "gate": document["gate"]}
        suites.append(
            {
                "name": baseline["suite"],
                "held_out": compared["held_out"],
                "rows": category_rows(comparison, baseline, candidate),
                "controls": control_rows(comparison, baseline, candidate),
                "too_few": too_few(compared, gate),
            }
        )
    word, sentence = VERDICTS[document["verdict"]]
    _write(
        out,
        "protocol_after.html.j2",
        document=document,
        candidate=candidates[0],
        word=word,
        sentence=sentence,
        suites=suites,
        flips=[_flips(flip) for flip in document["flips"]],
        confidence=f"{100 * gate.confidence:g} %",
    )


def _flips(flip: dict[str, Any]) -> dict[str, Any]:
    """The first items each way, those lost first, with the way of each."""
    won = [item for item in flip["items"] if item["score_after"] > item["score"]]
    lost = [item for item in flip["items"] if item["score_after"] < item["score"]]
    shown = [("lost", item) for item in lost[:MOST]] + [("won", item) for item in won[:MOST]]
    left_out = len(won) + len(lost) - len(shown)
    return {**flip, "shown": shown, "left_out": left_out}


def _write(out: Path, template: str, **values: Any) -> None:
    css = "\n".join((HERE / name).read_text(encoding="utf-8") for name in ("report.css", "protocol.css"))
    write_text(out, environment().get_template(template).render(css=Markup(css), **values).lstrip())
