"""The model card of an adapter version: Markdown with the hub's YAML front matter, from its registry."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from qwen_ray.registry import AdapterVersion, Registry
from qwen_ray.registry.version import parents_of
from qwen_ray.report import site_pages as pages
from qwen_ray.report.html import HERE
from qwen_ray.report.registry_facts import BASE, Evaluation, Verdict
from qwen_ray.report.registry_history import NameHistory, VersionHistory, read_history
from qwen_ray.report.site_lineage import settings, training_data

SHOWN = (
    "method.name", "method.r", "method.alpha", "method.dropout", "method.targets", "optim.learning_rate",
    "optim.schedule", "optim.epochs", "optim.max_steps", "optim.batch_size", "optim.gradient_accumulation",
    "data.max_length", "data.packing", "precision", "seed",
)  # fmt: skip
"""Settings that the card shows; all of them are in the lineage."""
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(registry: Registry, version: AdapterVersion, *, license: str | None = None) -> str:
    """The card of a version, from its lineage and events.

    ``license`` is the identifier under which the adapter is given away, such as ``apache-2.0``; without one
    the card says that nobody has chosen it. The front matter is what the Hugging Face hub reads: its
    ``model-index`` has a result for each category of the last evaluation of each suite.
    """
    history = read_history(registry, version.name)
    return card_text(history, history.versions[version.version], license=license)


def card_text(history: NameHistory, version: VersionHistory, *, license: str | None = None) -> str:
    """As :func:`model_card`, of a history that was read."""
    last = {evaluation.suite: evaluation for evaluation in version.evaluations}
    evaluations = [last[suite] for suite in sorted(last)]
    verdict = version.verdict
    changes = pages.standing_of(history, version)
    front = yaml.safe_dump(
        _front_matter(version, evaluations, license), sort_keys=False, allow_unicode=True, width=100
    )
    body = (
        _templates()
        .get_template("card.md.j2")
        .render(
            version=version,
            license=license,
            base=version.lineage.get("base") or {},
            adapts=_adapts(version.lineage),
            trained_for=[row.change.name for row in changes if row.change.role == "target"],
            in_production=[p for p in history.periods if p.version == version.number],
            training=training_data(version.lineage),
            settings={k: v for k, v in settings(version.lineage).items() if k in SHOWN},
            changes=changes,
            strengths=[row for row in changes if row.change.role == "strength"],
            controls=_controls(verdict),
            evaluations=evaluations,
            verdict=verdict,
            against=None if verdict is None or verdict.baseline == BASE else verdict.baseline,
            overrides=[event.value for event in version.kind("override")],
            fewest=min((s.n for e in evaluations for s in e.scores), default=None),
            sweep=(version.lineage.get("sweep") or {}).get("id"),
            parents=parents_of(version.lineage),
            versions=version.lineage.get("versions") or {},
            location=_location(version.lineage),
        )
    )
    return f"---\n{front}---\n\n{body}"


def _front_matter(
    version: VersionHistory, evaluations: list[Evaluation], license: str | None
) -> dict[str, Any]:
    lineage = version.lineage
    method = str(((lineage.get("config") or {}).get("method") or {}).get("name") or "lora")
    tags = ["qwen-ray", method, *(row.name for row in training_data(lineage))]
    front: dict[str, Any] = {
        "base_model": _location(lineage),
        "base_model_relation": "adapter",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
        **({"license": license} if license else {"license": "other", "license_name": "not-chosen"}),
    }
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {
                "name": f"{one.suite}: {score.name}",
                "type": one.suite,
                "revision": one.suite_version,
            },
            "metrics": [
                {
                    "type": score.metric,
                    "name": f"{score.metric} ({score.role}, n={score.n})",
                    "value": round(score.score, 6),
                    "args": {
                        "n": score.n,
                        **({"interval": [round(bound, 6) for bound in score.ci]} if score.ci else {}),
                    },
                }
            ],
        }
        for one in evaluations
        for score in one.scores
    ]
    if results:
        front["model-index"] = [{"name": version.ref, "results": results}]
    return front


def _location(lineage: dict[str, Any]) -> str:
    """Where the base is on the hub, if it is there, else what it is called here."""
    base = lineage.get("base") or {}
    location = str(base.get("location") or "")
    return location if _HUB_ID.fullmatch(location) else str(base.get("id") or "not recorded")


def _adapts(lineage: dict[str, Any]) -> str:
    method = (lineage.get("config") or {}).get("method") or {}
    if not method:
        return "PEFT adapter"
    kind = {"lora": "LoRA", "qlora": "QLoRA"}.get(str(method.get("name")), "PEFT")
    return f"{kind} adapter of rank {method.get('r', 'not recorded')}"


def _controls(verdict: Verdict | None) -> list[pages.ChangeRow]:
    if verdict is None:
        return []
    controls = [change for change in verdict.changes if change.role == "control"]
    return pages.change_rows(controls, verdict.gate)


def _templates() -> Environment:
    """Every value that is printed is escaped, so that text from outside is no markup."""
    found = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=False,  # this is Markdown, which finalize escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=escaped,
    )
    found.filters.update(
        code=_code, literal=_literal, points=lambda share: f"{100 * share:.1f}", signed=pages.signed_points
    )
    return found


class _Raw(str):
    """Text that is Markdown already."""


def escaped(value: object) -> str:
    """``value`` on one line, without a meaning in Markdown or HTML."""
    if isinstance(value, _Raw):
        return value
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#~])", r"\\\1", text)


def _code(value: object) -> _Raw:
    """As inline code; a backtick inside ends nothing."""
    text = " ".join(str(value).split()).replace("|", "\\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    pad = " " if "`" in text else ""
    return _Raw(f"{fence}{pad}{text}{pad}{fence}")


def _literal(value: object) -> _Raw:
    """As a Python string in a block of code."""
    return _Raw(repr(str(value)))
