"""What a watch remembers, in storage: one document, written only by the holder of the lease."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from qwen_ray.lifecycle.lease import Lease, LeaseLost
from qwen_ray.storage import Missing, read_document, update

if TYPE_CHECKING:
    from qwen_ray.storage import Storage

STATE, LEASE = "state.json", "lease.json"


class WatchState:
    """``value`` is what was read and what will be written.

    ``triggers``: what each remembers. ``troubles``: what could not be looked at. ``pending``: triggers that
    wait for a pipeline to start, by pipeline; ``running``: the one that has. ``told``: when an alert was
    last sent. ``outbox``: what is still to be sent. ``ended``: when the last pipeline did.
    """

    def __init__(self, storage: Storage, lease: Lease) -> None:
        self._storage, self._lease = storage, lease
        self.value = read_state(storage)
        self._saved = _copied(self.value)
        self._written = [self._saved]  # what storage may hold: a write may arrive though its answer does not

    def save(self) -> None:
        """Write it. :class:`LeaseLost` if another watch may be at work."""

        after = _copied(self.value)

        def change(found: Any) -> Any:
            if _filled(found) not in self._written:
                raise LeaseLost(f"another watch has written {self._storage.location}/{STATE}")
            return after

        self._lease.check()
        self._written.append(after)
        update(self._storage, STATE, change)
        self._saved, self._written = after, [after]

    def restore(self) -> None:
        """Forget what has changed since :meth:`save`."""
        self.value = _copied(self._saved)


def read_state(storage: Storage) -> dict[str, Any]:
    """The document, with every part."""
    try:
        return _filled(read_document(storage, STATE))
    except Missing:
        return _filled(None)


def _filled(document: Any) -> dict[str, Any]:
    empty: dict[str, Any] = {
        "triggers": {},
        "troubles": {},
        "pending": {},
        "running": None,
        "told": {},
        "outbox": [],
    }
    return {**empty, "ended": None, **(document or {})}


def _copied(value: dict[str, Any]) -> dict[str, Any]:
    copy: dict[str, Any] = json.loads(json.dumps(value))
    return copy
