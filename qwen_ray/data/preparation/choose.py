"""Which of the usable records are written: no repeats, no contradictions, evenly drawn.

Decided in one place, over what the shards say of their records (about 500 bytes each), so that the choice
does not depend on how the work was divided.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, BinaryIO

import numpy as np

from qwen_ray.data.lots import lot
from qwen_ray.data.preparation import coverage
from qwen_ray.data.preparation.parts import Shard
from qwen_ray.data.quality import duplicates, turns
from qwen_ray.data.records import Record
from qwen_ray.data.sources import Drops

DUPLICATE = "same question and answer as an earlier record"
CONTRADICTION = "same question with another answer"
NEAR = "nearly the same as an earlier record"


@dataclass(frozen=True)
class Usable:
    """The records of all shards, in the order of sources, parts and lines; columns by name."""

    shards: Sequence[Shard]
    columns: dict[str, Any]
    shard: np.ndarray[Any, np.dtype[np.int32]]
    """``[N]``: which shard each record lies in."""
    _files: dict[int, BinaryIO] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.shard)

    def line(self, i: int) -> bytes:
        """The record as it came out of the checks."""
        at = int(self.shard[i])
        if at not in self._files:
            self._files[at] = open(self.shards[at].records, "rb")  # noqa: SIM115 - kept for the next record
        f = self._files[at]
        f.seek(self.columns["start"][i])
        return f.read(int(self.columns["length"][i]))

    def close(self) -> None:
        """Close the shards' files."""
        for f in self._files.values():
            f.close()


def lines(usable: Usable, drawn: Sequence[int]) -> Iterator[bytes]:
    """The drawn records as they are written, each with an id of its own."""
    renamed = _unique_ids(usable, drawn)
    for i in drawn:
        line = usable.line(i)
        if i in renamed:
            line = replace(Record.from_line(line), id=renamed[i]).line()
        yield line


def load(shards: Sequence[Shard]) -> Usable:
    """Read the features of complete shards."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [pq.read_table(shard.features) for shard in shards]
    table = pa.concat_tables(tables)
    columns: dict[str, Any] = {
        name: table[name].to_pylist() for name in table.column_names if name != "signature"
    }
    signatures = b"".join(table["signature"].to_pylist())
    columns["signature"] = np.frombuffer(signatures, dtype=np.uint32).reshape(-1, duplicates.HASHES)
    of = np.repeat(np.arange(len(tables), dtype=np.int32), [t.num_rows for t in tables])
    return Usable(shards, columns, of)


def choose(usable: Usable, *, seed: int, near: float | None, drops: Drops) -> list[int]:
    """Indices of what stays, in the order of the draw: any beginning of it is spread evenly.

    ``near``: similarity above which two records count as one (None: only exact repeats do).
    """
    kept = _without_repeats(usable, drops)
    if near is not None:
        kept = _without_near(usable, kept, near, drops)
    places = usable.columns["place"]
    ids = usable.columns["id"]
    return coverage.spread(
        kept, place=lambda i: tuple(places[i]), lot=lambda text: lot(seed, text), name=lambda i: ids[i]
    )


def _unique_ids(usable: Usable, drawn: Sequence[int]) -> dict[int, str]:
    """New ids for records whose id another drawn record has: two files may use the same."""
    seen: Counter[str] = Counter()
    renamed: dict[int, str] = {}
    for i in drawn:
        name = usable.columns["id"][i]
        seen[name] += 1
        if seen[name] > 1:
            renamed[i] = f"{name}#{seen[name]}"
    return renamed


def _without_repeats(usable: Usable, drops: Drops) -> list[int]:
    """One record a question. Where answers differ none is kept: which one is right cannot be told here."""
    questions, answers, where = (usable.columns[name] for name in ("question", "answer", "where"))
    by_question: dict[bytes, list[int]] = {}
    for i, question in enumerate(questions):
        by_question.setdefault(question, []).append(i)
    kept = []
    for same in by_question.values():
        first, *others = same
        if len({answers[i] for i in same}) > 1:
            told = ", ".join(dict.fromkeys(where[i] for i in same))
            for i in same:
                drops.add(CONTRADICTION, f"{_shown(usable, i)} (answers at {told})", where=where[i])
            continue
        kept.append(first)
        for i in others:
            drops.add(DUPLICATE, f"{_shown(usable, i)} (as {where[first]})", where=where[i])
    return kept


def _without_near(usable: Usable, kept: list[int], threshold: float, drops: Drops) -> list[int]:
    where = usable.columns["where"]
    pairs = duplicates.near_duplicates(
        usable.columns["signature"][kept],
        threshold=threshold,
        text_of=lambda at: duplicates.text(usable.line(kept[at])),
    )
    gone: set[int] = set()
    for at, of, similarity in pairs:
        i, first = kept[at], kept[of]
        gone.add(i)
        drops.add(NEAR, f"{_shown(usable, i)} ({similarity:.0%} as {where[first]})", where=where[i])
    return [i for i in kept if i not in gone]


def _shown(usable: Usable, i: int) -> str:
    return turns.shown(Record.from_line(usable.line(i)))
