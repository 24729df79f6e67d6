"""Canaries: a version that answers part of the router's traffic, until its requests have decided on it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from qwen_ray.errors import UserError
from qwen_ray.lifecycle import endpoint_metrics as metrics
from qwen_ray.lifecycle.watch_spec import CanaryRules, Level
from qwen_ray.registry import CANARY, CANDIDATE, PRODUCTION

if TYPE_CHECKING:
    from qwen_ray.registry import Registry

Memory = dict[str, Any]
_FEWEST = 50  # requests of each side, below which their latencies are not compared
_HOUR = 3600.0


@dataclass(frozen=True)
class Decision:
    """What was decided about a canary, why, and how much that matters."""

    what: Literal["started", "stopped", "promoted", "ended"]
    text: str
    level: Level
    facts: dict[str, Any] = field(default_factory=dict)


def start(rules: CanaryRules, registry: Registry, name: str) -> Decision | None:
    """Start one with the candidate, if its verdict is promote and it has not been one before."""
    aliases = registry.aliases(name)
    candidate = aliases.get(CANDIDATE)
    if rules.share is None or candidate is None or CANARY in aliases or candidate == aliases.get(PRODUCTION):
        return None
    events = registry.events(name, version=candidate)
    verdicts = [event.value["verdict"] for event in events if event.kind == "verdict"]
    tried = any(e.kind == "alias" and e.value["alias"] == CANARY and e.version == candidate for e in events)
    if verdicts[-1:] != ["promote"] or tried:
        return None
    text = f"{name}@{candidate} gets {rules.share:.0%} of the router's requests for {name}"
    registry.start_canary(name, candidate, rules.share, reason="its verdict is promote")
    return Decision("started", text, "info", {"version": candidate, "share": rules.share})


def follow(
    rules: CanaryRules,
    registry: Registry,
    name: str,
    memory: Memory | None,
    *,
    counters: metrics.Counters,
    now: float,
) -> tuple[Memory | None, Decision | None]:
    """Count what the canary has done since the last look, and stop or promote it when that is enough.

    ``counters``: of the server now. Returns what to remember, None when there is no canary any more.
    """
    canary = registry.canary(name)
    if canary is None:
        return None, None
    production = registry.aliases(name).get(PRODUCTION)
    ref = f"{name}@{canary.version}"
    if canary.version == production:  # promoted before, and then the watch was interrupted
        registry.stop_canary(name, reason="it is in production")
        return None, Decision("ended", f"{ref} is in production; it is no canary any more", "info")
    subject = {"version": canary.version, "production": production}
    if memory is None or memory["subject"] != subject:
        return {"subject": subject, "since": now, "counters": counters, "seen": {}}, None
    memory = {
        **memory,
        "counters": counters,
        "seen": _added(memory["seen"], metrics.since(memory["counters"], counters), name),
    }
    decision = _decide(rules, ref, f"{name}@{production}", memory["seen"], (now - memory["since"]) / _HOUR)
    if decision is None:
        return memory, None
    if decision.what == "promoted":
        try:
            registry.point(
                name, PRODUCTION, canary.version, reason=f"canary: {decision.text}", was=production
            )
        except UserError as e:
            if e.status != 409:
                raise
            decision = Decision("ended", f"{ref} passed, but {e.what}", "warning", decision.facts)
    registry.stop_canary(name, reason=decision.text)
    return None, decision


def _decide(
    rules: CanaryRules, ref: str, production: str, seen: metrics.Counters, hours: float
) -> Decision | None:
    good, failed = (seen.get(f"{ref}/canary/{outcome}", 0.0) for outcome in ("answered", "failed"))
    p95 = {one: metrics.quantile(seen, f"{one}/seconds/", 0.95) for one in (ref, production)}
    enough = all(seen.get(f"{one}/seconds/inf", 0.0) >= _FEWEST for one in (ref, production))
    facts = {"requests": good + failed, "failed": failed, "hours": hours}
    facts |= {"p95_seconds": p95[ref], "production_p95_seconds": p95[production]}
    said = f"{failed:g} of its {good + failed:g} requests failed"
    if failed > rules.max_error_rate * rules.requests:
        return Decision("stopped", f"{ref} was rolled back: {said}", "critical", facts)
    if enough and rules.max_latency_ratio and p95[ref] > rules.max_latency_ratio * p95[production]:
        slow = f"95% of its requests took up to {p95[ref]:.2f} s, production's {p95[production]:.2f} s"
        return Decision("stopped", f"{ref} was rolled back: {slow}", "critical", facts)
    if good + failed >= rules.requests:
        if rules.on_pass == "promote":
            return Decision("promoted", f"{ref} is promoted: {said}", "info", facts)
        return Decision("ended", f"{ref} passed as a canary: {said}", "info", facts)
    if hours >= rules.max_hours:
        return Decision("ended", f"{ref} was stopped after {hours:.0f} hours: {said}", "warning", facts)
    return None


def _added(seen: metrics.Counters, more: metrics.Counters, name: str) -> metrics.Counters:
    """The sums, of what concerns versions of ``name``."""
    mine = {key: value for key, value in more.items() if key.startswith(f"{name}@")}
    return seen | {key: seen.get(key, 0.0) + value for key, value in mine.items()}
