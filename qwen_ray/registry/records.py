"""What is recorded on a version: how it was evaluated, what a gate said, who overruled it."""

from __future__ import annotations

from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json
from qwen_ray.registry.events import Event
from qwen_ray.registry.registry import Registry
from qwen_ray.registry.state import PRODUCTION, Change, Was
from qwen_ray.registry.version import AdapterVersion

_VERDICTS = ("promote", "hold", "regress")


def record_evaluation(
    registry: Registry, version: AdapterVersion, result: dict[str, Any], *, location: str
) -> Event:
    """Note an EvalResult: all of it but the items, ``location`` of the complete file, and its ``sha256``,
    that of its JSON in canonical form (:func:`qwen_ray.fsio.sha256_json`)."""
    value = {key: value for key, value in result.items() if key != "items"}
    return registry.record(
        version.name,
        version.version,
        "evaluation",
        {**value, "location": location, "sha256": sha256_json(result)},
    )


def record_verdict(
    registry: Registry, version: AdapterVersion, verdict: dict[str, Any], *, baseline: str, run: str | None
) -> Event:
    """Note what a gate said, with its settings and the rows it judged.

    ``verdict``: as a comparison or :func:`qwen_ray.evaluation.gate.judge` gives it. ``baseline``: what it was
    compared with, ``NAME@VERSION`` or ``base``; a version is kept as long as the one judged is. ``run``: the
    pipeline's.
    """
    if verdict.get("verdict") not in _VERDICTS:
        raise UserError(f"'{verdict.get('verdict')}' is no verdict", fix=f"one of {', '.join(_VERDICTS)}")
    value: dict[str, Any] = {"verdict": verdict["verdict"], "reasons": list(verdict.get("reasons", []))}
    for key, empty in (("gate", {}), ("categories", []), ("controls", [])):
        value[key] = verdict.get(key, empty)
    value |= {"baseline": baseline, "run": run}
    return registry.record(version.name, version.version, "verdict", value)


def promote_against(
    registry: Registry,
    version: AdapterVersion,
    *,
    verdict: str | None,
    reason: str,
    by: str,
    was: Was = "any",
) -> None:
    """Point production at a version against a gate's ``verdict``, or without one (None), and note that it was
    against it, in one step: a move that is refused (see :meth:`Registry.point`) leaves neither."""
    if not reason.strip():
        raise UserError("an override needs a reason", where=version.ref, fix="say why, in words")
    value = {"verdict": verdict, "reason": reason, "by": by}

    def act(change: Change) -> None:
        change.override(version.version, value)
        change.point(PRODUCTION, version.version, reason=reason, by=by, was=was)

    registry.change(version.name, act)
