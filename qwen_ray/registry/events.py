"""What happened to the versions of a name, for ever: published, moved, judged, archived.

What somebody records is a document of its own, ``NAME/events/ID.json``. The rest is read from what it
happened to: versions, and the log in the state.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.registry.state import State
from qwen_ray.registry.version import Document, parents_of
from qwen_ray.storage import Storage, create_document, read_document

RECORDED = ("evaluation", "verdict", "override", "note")
"""Kinds that others record."""
KINDS = ("published", "alias", "archived", "restored", "removed", *RECORDED)
"""All kinds; the registry itself writes the others, and an override with the move that it is about."""
Clock = Callable[[], datetime]
_READERS = 8


@dataclass(frozen=True)
class Event:
    """Something that happened to a version. ``at``: ISO, UTC. ``version`` is None where an alias was taken
    away; ``value`` depends on the kind."""

    id: str
    at: str
    kind: str
    name: str
    version: int | None
    value: dict[str, Any]

    def concerns(self, version: int) -> bool:
        """Whether it is about this version; a move of an alias is about the one that it leaves, too."""
        return version in (self.version, self.value.get("was") if self.kind == "alias" else None)


def utc_now() -> datetime:
    """The time; what a registry asks unless it is given a clock."""
    return datetime.now(UTC)


def iso(now: datetime) -> str:
    """ISO, UTC, to the microsecond: later times sort later."""
    return now.astimezone(UTC).isoformat(timespec="microseconds")


def new_id(now: datetime) -> str:
    """A new name for what happens now; later ones sort later."""
    return f"{now.astimezone(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(4)}"


def record(storage: Storage, event: Event) -> Event:
    """Write an event of one of the kinds in ``RECORDED``; it stays as it is for ever."""
    if event.kind not in RECORDED:
        raise UserError(f"'{event.kind}' is no kind of event", fix=did_you_mean(event.kind, RECORDED))
    key = f"{event.name}/events/{event.id}.json"
    # Where it is there, it is this one and the answer was lost.
    if not create_document(storage, key, asdict(event)) and Event(**read_document(storage, key)) != event:
        raise RuntimeError(f"another event has this id: {event.id}")
    return event


def recorded(storage: Storage, name: str) -> list[Event]:
    """All events that were recorded for a name."""
    keys = storage.keys(f"{name}/events/")
    with ThreadPoolExecutor(_READERS) as threads:
        return [Event(**found) for found in threads.map(lambda key: read_document(storage, key), keys)]


def published(name: str, documents: Iterable[tuple[int, Document]]) -> list[Event]:
    """The publication of each version, as an event."""
    return [
        Event(
            f"{name}-{number}-published",
            document.at,
            "published",
            name,
            number,
            {
                "digest": document.digest,
                "bytes": document.size,
                "base": document.lineage.get("base"),
                "parents": parents_of(document.lineage),
            },
        )
        for number, document in documents
    ]


def logged(name: str, state: State) -> list[Event]:
    """What the log of a state says, as events."""
    return [Event(name=name, **entry) for entry in state.log]
