"""What a watch has done: one document for each event, numbered, never changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qwen_ray.storage import create_document, read_document

if TYPE_CHECKING:
    from qwen_ray.storage import Storage

FOLDER = "history"


@dataclass(frozen=True)
class Entry:
    """An event. ``at``: ISO, UTC. ``kind``: what ``value`` is about, such as ``trigger`` or ``alert``;
    ``text``: the event in words."""

    number: int
    at: str
    kind: str
    text: str
    value: dict[str, Any]


class History:
    """Events in the order in which they were written. Several processes may write at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def append(self, at: str, kind: str, text: str, value: dict[str, Any] | None = None) -> Entry:
        """Write the next event; it is in storage when this returns."""
        number = len(self._keys())
        while True:
            number += 1
            entry = Entry(number, at, kind, text, value or {})
            key = f"{FOLDER}/{number:08d}.json"
            # What is there may be this very entry: written, and the answer lost on the way.
            if create_document(self._storage, key, asdict(entry)) or self._read(key) == entry:
                return entry

    def entries(self, *, kind: str | None = None, last: int | None = None) -> list[Entry]:
        """Oldest first; only the ``last`` so many, only those of ``kind``."""
        keys = self._keys()
        if kind is None and last is not None:
            keys = keys[-last:]
        found = [self._read(key) for key in keys]
        found = [entry for entry in found if kind in (None, entry.kind)]
        return found if last is None else found[-last:]

    def _read(self, key: str) -> Entry:
        return Entry(**read_document(self._storage, key))

    def _keys(self) -> list[str]:
        return self._storage.keys(f"{FOLDER}/")
