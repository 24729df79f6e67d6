"""What a source is, and the tally of what it left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.data.records import Record

MAX_EXAMPLES = 3


@dataclass
class Drops:
    """Why records were left out: a count and a few examples for every reason."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, example: str) -> None:
        """Count one record; the first :data:`MAX_EXAMPLES` are kept word for word."""
        self.counts[reason] += 1
        shown = self.examples.setdefault(reason, [])
        if len(shown) < MAX_EXAMPLES:
            shown.append(example if len(example) <= 300 else example[:299] + "…")

    def to_dict(self) -> dict[str, Any]:
        """``{reason: {"count", "examples"}}``, most frequent first."""
        return {why: {"count": n, "examples": self.examples[why]} for why, n in self.counts.most_common()}


class Reader(Protocol):
    """Yields the Records of a source; what it leaves out goes to ``drops``."""

    def __call__(self, path: Path, *, domain: str, drops: Drops) -> Iterator[Record]: ...


@dataclass(frozen=True)
class Source:
    """One place training data comes from. Nothing is downloaded: ``where_to_get`` tells the user."""

    name: str
    title: str
    licence: str
    domain_hint: str
    where_to_get: str
    reader: Reader

    def read(self, path: Path, *, domain: str | None = None, drops: Drops | None = None) -> Iterator[Record]:
        """Records of this source at ``path``, in the order of the source.

        ``domain`` is :attr:`domain_hint` unless given. Ids are ``source/part/.../item``: what
        stands between the first and last slash is the chapter and section, where known.
        """
        return self.reader(
            path, domain=domain or self.domain_hint, drops=drops if drops is not None else Drops()
        )
