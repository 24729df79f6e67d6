"""What a source is, what it yields, and the account of what it left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qwen_ray.data.records import Record

MAX_EXAMPLES = 20
SHOWN = 300  # characters of a record that are kept of what was left out


class Found(NamedTuple):
    """A record and where it was read: ``file:line``, or the file and the item in it."""

    record: Record
    where: str


class Drop(NamedTuple):
    """What was left out, why and where it stands."""

    reason: str
    """One of a few: they are counted."""
    where: str
    shown: str
    """The record, or what is wrong with it, in at most :data:`SHOWN` characters."""


@dataclass
class Drops:
    """All that was left out, in order."""

    log: list[Drop] = field(default_factory=list)

    def add(self, reason: str, shown: str, *, where: str = "") -> None:
        """Account for one record."""
        self.log.append(Drop(reason, where, shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + "…"))

    @property
    def counts(self) -> Counter[str]:
        """Number left out for each reason."""
        return Counter(drop.reason for drop in self.log)

    def to_dict(self) -> dict[str, Any]:
        """``{reason: {"count", "examples": [{"where", "shown"}]}}``, most frequent first."""
        found: dict[str, list[dict[str, str]]] = {}
        for drop in self.log:
            shown = found.setdefault(drop.reason, [])
            if len(shown) < MAX_EXAMPLES:
                shown.append({"where": drop.where, "shown": drop.shown})
        return {why: {"count": n, "examples": found[why]} for why, n in self.counts.most_common()}


class Reader(Protocol):
    """Yields the Records of a source in its own order; what it leaves out goes to ``drops``.

    Raises :class:`~qwen_ray.errors.UserError` only where the source as a whole cannot be read; a faulty
    item is a drop, with its place.
    """

    def __call__(self, path: Path, *, domain: str, drops: Drops) -> Iterator[Found]: ...


@dataclass(frozen=True)
class Source:
    """One place training data comes from. Nothing is downloaded: ``where_to_get`` tells the user."""

    name: str
    title: str
    licence: str
    domain_hint: str
    where_to_get: str
    reader: Reader
    size: str = ""
    """Roughly how many records it gives, and of what."""
    requires: str = ""
    """What it needs beyond its files: a package, the hub. Empty: nothing."""

    def find(self, path: Path, *, domain: str | None = None, drops: Drops | None = None) -> Iterator[Found]:
        """Records of this source at ``path`` with their places, in the order of the source.

        ``domain`` is :attr:`domain_hint` unless given. Ids are ``source/part/.../item``: what
        stands between the first and last slash is the chapter and section (the topic), where known.
        """
        return self.reader(
            path, domain=domain or self.domain_hint, drops=drops if drops is not None else Drops()
        )

    def read(self, path: Path, *, domain: str | None = None, drops: Drops | None = None) -> Iterator[Record]:
        """The same without the places."""
        for found in self.find(path, domain=domain, drops=drops):
            yield found.record
