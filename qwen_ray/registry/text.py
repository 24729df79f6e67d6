"""The story of a version in lines that people read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qwen_ray.registry.events import Event
from qwen_ray.registry.registry import Registry
from qwen_ray.registry.state import PRODUCTION


def overview(registry: Registry, name: str) -> list[str]:
    """The versions of a name, newest last, and why production is what it is."""
    state = registry.state(name)
    lines = [name]
    for event in registry.events(name, kind="published"):
        version = event.version
        standing = [alias for alias, meant in sorted(state.aliases.items()) if meant == version]
        standing += ["archived"] if str(version) in state.archived else []
        standing += ["files removed"] if str(version) in state.removed else []
        lines.append(
            f"  {version:>4}  {when(event)}  {_published(event.value)}  {', '.join(standing)}".rstrip()
        )
    return [*lines, *why(registry, name)]


def why(registry: Registry, name: str) -> list[str]:
    """Why a name's production version is that: who moved it there, and what was known of it then."""
    version = registry.aliases(name).get(PRODUCTION)
    if version is None:
        return ["  nothing is in production"]
    events = registry.events(name, version=version)
    last = max(
        i for i, e in enumerate(events) if e.kind == "alias" and e.value["alias"] == PRODUCTION and e.version
    )
    found = [e for e in events[: last + 1] if e.kind in ("verdict", "override")]
    lines = [f"in production: {name}@{version}", f"  {line(events[last])}"]
    lines += [f"  {line(event)}" for event in found]
    return lines if found else [*lines, "  no verdict of a gate is recorded before that"]


def story(events: Iterable[Event]) -> list[str]:
    """One line an event."""
    return [line(event) for event in events]


def line(event: Event) -> str:
    """An event in one line."""
    version = "" if event.version is None else f"@{event.version}"
    return f"{when(event)}  {event.name}{version}  {event.kind}: {_SAID[event.kind](event.value)}"


def when(event: Event) -> str:
    """Date and time, UTC, to the minute."""
    return event.at[:16].replace("T", " ")


def _published(value: dict[str, Any]) -> str:
    base = (value.get("base") or {}).get("id", "?")
    parents = f", from {', '.join(value['parents'])}" if value["parents"] else ""
    return f"{value['digest'][:12]}, {value['bytes'] / 2**20:,.1f} MiB on {base}{parents}"


def _alias(value: dict[str, Any]) -> str:
    said = [str(v) if v is not None else "nothing" for v in (value["was"], value["version"])]
    share = f", {value['share']:.0%} of the requests" if value.get("share") else ""
    back = "rolled back, " if value.get("rollback") else ""
    return f"{back}{value['alias']} {said[0]} -> {said[1]}{share}: {_reason(value)}"


def _evaluation(value: dict[str, Any]) -> str:
    groups = [*(value.get("categories") or {}).items(), *(value.get("controls") or {}).items()]
    scores = ", ".join(f"{name} {found['score']:.1%} of {found['n']}" for name, found in groups)
    return f"{value.get('suite')} {value.get('suite_version')}: {scores} ({value.get('location')})"


def _verdict(value: dict[str, Any]) -> str:
    reasons = "; ".join(map(str, value["reasons"])) or "no reasons given"
    return f"{value['verdict']} against {value['baseline']}: {reasons}"


def _override(value: dict[str, Any]) -> str:
    verdict = f"against the verdict '{value['verdict']}'" if value["verdict"] else "without a verdict"
    return f"{value['by']} decided {verdict}: {value['reason']}"


def _reason(value: dict[str, Any]) -> str:
    by = f" ({value['by']})" if value.get("by") else ""
    return f"{value['reason']}{by}"


_SAID = {
    "published": _published,
    "alias": _alias,
    "archived": _reason,
    "restored": _reason,
    "removed": _reason,
    "evaluation": _evaluation,
    "verdict": _verdict,
    "override": _override,
    "note": lambda value: "; ".join(f"{key}: {one}" for key, one in value.items()),
}
