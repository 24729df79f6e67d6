"""What a watch looks at: new data, the clock, production's accuracy, and drift of what a server says.

Each trigger is given what it remembered last time, and returns what to remember and, if it fired, why. What
is remembered is JSON: it outlives the process. The first look only remembers.
"""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_file, sha256_json
from qwen_ray.lifecycle import endpoint_metrics as metrics
from qwen_ray.lifecycle.cron import Schedule
from qwen_ray.lifecycle.watch_spec import DataTrigger, DriftTrigger
from qwen_ray.storage import Missing, is_uri, open_storage

Memory = dict[str, Any]
_NAMED = 10  # files that are named in the facts of a change


@dataclass(frozen=True)
class Fired:
    """A trigger has fired. ``about``: what it is about, equal when it is about the same again; ``run``:
    whether it starts a pipeline, ``pipeline`` which, if not the watch's own; ``alert``: whether somebody is
    to be told of it now, and not just of the run."""

    trigger: str
    about: str
    text: str
    run: bool
    alert: bool = True
    facts: dict[str, Any] = field(default_factory=dict)
    pipeline: str | None = None


def new_data(spec: DataTrigger, memory: Memory | None) -> tuple[Memory, Fired | None]:
    """Whether the content of the sources has changed. :class:`UserError` for one that is not there."""
    known = (memory or {}).get("files", {})
    files = {name: _looked_at(name, known.get(name)) for name in _files(spec.sources)}
    digests = {name: facts["sha256"] for name, facts in files.items()}
    now = {"digest": sha256_json(digests), "files": files}
    if memory is None or memory["digest"] == now["digest"]:
        return now, None
    before = {name: facts["sha256"] for name, facts in known.items()}
    changes = {
        "added": sorted(set(digests) - set(before)),
        "changed": sorted(name for name in set(digests) & set(before) if digests[name] != before[name]),
        "removed": sorted(set(before) - set(digests)),
    }
    counts = ", ".join(f"{len(names)} {how}" for how, names in changes.items() if names)
    facts: dict[str, Any] = {"digest": now["digest"], "before": memory["digest"]}
    facts |= {how: names[:_NAMED] for how, names in changes.items()}
    run = spec.start == "run"
    return now, Fired("data", "data", f"the data has changed: {counts}", run, alert=not run, facts=facts)


def due(schedule: Schedule, memory: Memory | None, now: float) -> tuple[Memory, float | None]:
    """The time, seconds since 1970, of which the schedule is due; of several that were missed the last."""
    if memory is None:
        return {"last": now}, None
    last = schedule.last(now)
    if last is None or last <= memory["last"]:
        return memory, None
    return {"last": last}, last


def drift(
    spec: DriftTrigger, memory: Memory | None, now: float, scrape: Callable[[], metrics.Counters]
) -> tuple[Memory, list[Fired]]:
    """Which limits the last window passed."""
    if memory is not None and now - memory["at"] < spec.window_seconds:
        return memory, []
    counters = scrape()
    fresh = {"at": now, "counters": counters}
    if memory is None:
        return fresh, []
    seen = metrics.since(memory["counters"], counters)
    if metrics.requests(seen) < spec.min_requests:
        return memory, []
    found = metrics.shares(seen)
    limits = {
        "abstained": (spec.abstained, "of the questions for :auto were left to the base by the router"),
        "rejected": (spec.rejected, "of the requests were answered 429"),
        "client_errors": (spec.client_errors, "of the requests were answered 4xx"),
        "server_errors": (spec.server_errors, "of the requests were answered 5xx"),
    }
    fired = [
        _passed(spec, name, f"{found[name]:.1%} {what}, more than {limit:.1%}", found)
        for name, (limit, what) in limits.items()
        if limit is not None and found[name] > limit
    ]
    if spec.p95_seconds is not None and found["p95_seconds"] > spec.p95_seconds:
        what = (
            f"95% of the requests took up to {found['p95_seconds']:.2f} s, more than {spec.p95_seconds:g} s"
        )
        fired.append(_passed(spec, "p95_seconds", what, found))
    return fresh, fired


def _passed(spec: DriftTrigger, name: str, text: str, facts: dict[str, float]) -> Fired:
    return Fired("drift", f"drift/{name}", text, spec.start == "run", facts=dict(facts))


def _files(sources: list[str]) -> Iterator[str]:
    """Every file of the sources, sorted; an object by its URI."""
    found: set[str] = set()
    for source in sources:
        if is_uri(source):
            found.add(source)
        elif glob.has_magic(source):
            found.update(path for path in glob.glob(source, recursive=True) if Path(path).is_file())
        elif Path(source).is_dir():
            found.update(str(path) for path in Path(source).rglob("*") if path.is_file())
        elif Path(source).is_file():
            found.add(source)
        else:
            raise UserError("no such file or folder", where=source, fix="check data.sources of the watch")
    yield from sorted(found)


def _looked_at(name: str, known: Memory | None) -> Memory:
    """A file's state; it is read only if its size or time has changed."""
    if is_uri(name):
        folder, _, key = name.rpartition("/")
        try:
            return {"sha256": hashlib.sha256(open_storage(folder).read(key).data).hexdigest()}
        except Missing:
            raise UserError("no such object", where=name, fix="check data.sources of the watch") from None
    stat = Path(name).stat()
    seen = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if known is not None and {key: known.get(key) for key in seen} == seen:
        return known
    return {**seen, "sha256": sha256_file(Path(name))}
