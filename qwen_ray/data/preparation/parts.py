"""One part of the sources: read, checked, looked up and described, in any process, into a shard of files.

A shard is three files in the work folder, named by the hash of what decides its content::

    KEY.jsonl      the records that stay so far, as they will be written
    KEY.parquet    what is needed to choose among them: one row a record
    KEY.json       what was read, left out and hit; written last, so a shard that has it is complete

so a run that was interrupted goes on with the shards that are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from qwen_ray.data.decontamination import index as decontaminate
from qwen_ray.data.formats import Span
from qwen_ray.data.preparation import coverage
from qwen_ray.data.quality import checks as quality
from qwen_ray.data.quality import duplicates
from qwen_ray.data.sources import Drop, Drops, Found, get_source
from qwen_ray.fsio import read_json, sha256_json, write_json

BATCH = 256  # records looked up together


@dataclass(frozen=True)
class Part:
    """What one call reads: a source, or a range of lines of a large file."""

    source: str
    path: str
    content: str
    """Hash of the source's files."""
    index: int = 0
    span: tuple[int, ...] | None = None
    """Of :class:`~qwen_ray.data.formats.Span`."""


@dataclass(frozen=True)
class Task:
    """What is done with every part. Small: the benchmarks' index lies in a file."""

    domain: str
    limits: quality.Limits
    folder: str
    index: str | None = None
    """File of the pickled :class:`~qwen_ray.data.decontamination.index.Index`."""
    index_hash: str = ""
    remove: tuple[str, ...] = ()
    """Which parts of a benchmark's item must not be in the data: question, passage."""
    near: bool = True
    """Whether near-duplicates are looked for."""

    def key(self, part: Part, version: str) -> str:
        """Names the part's shard."""
        decides = replace(part, path="", index=0)
        return sha256_json(
            [
                version,
                asdict(decides),
                self.domain,
                self.limits.model_dump(),
                self.index_hash,
                self.remove,
                self.near,
            ]
        )[:32]


@dataclass(frozen=True)
class Shard:
    """The files of one part."""

    folder: Path
    key: str

    @property
    def records(self) -> Path:
        return self.folder / f"{self.key}.jsonl"

    @property
    def features(self) -> Path:
        return self.folder / f"{self.key}.parquet"

    @property
    def account(self) -> Path:
        return self.folder / f"{self.key}.json"

    @property
    def complete(self) -> bool:
        return self.account.is_file()


def work(part: Part, task: Task, version: str) -> Shard:
    """Make the shard of a part, unless it is there. Raises :class:`UserError` for an unreadable source."""
    shard = Shard(Path(task.folder), task.key(part, version))
    if shard.complete:
        return shard
    drops, hits, rows, place = Drops(), list[dict[str, Any]](), list[dict[str, Any]](), 0
    mark = f".{os.getpid()}"
    records = shard.records.with_suffix(mark)
    with open(records, "wb") as out:
        for found in _kept(part, task, drops, hits):
            line = found.record.line()
            out.write(line)
            rows.append(_features(found, place, len(line), near=task.near))
            place += len(line)
    _write_features(shard.features.with_suffix(mark + ".parquet"), rows)
    shard.features.with_suffix(mark + ".parquet").replace(shard.features)
    records.replace(shard.records)
    write_json(
        shard.account,
        {
            "source": part.source,
            "read": len(rows) + len(drops.log),
            "drops": [list(d) for d in drops.log],
            "hits": hits,
        },
    )
    return shard


def _kept(part: Part, task: Task, drops: Drops, hits: list[dict[str, Any]]) -> Iterator[Found]:
    """What passes the checks and is in no benchmark."""
    index = _index(task.index, task.index_hash) if task.index else None
    sound = _sound(part, task, drops)
    if index is None:
        yield from sound
        return
    while batch := list(islice(sound, BATCH)):
        for found, its_hits in zip(batch, index.hits_batch([f.record for f in batch]), strict=True):
            hits += [_hit(found, hit) for hit in its_hits]
            bad = [hit for hit in its_hits if hit.part in task.remove]
            if bad:
                first = bad[0]
                shown = f"{first.benchmark} {first.item} ({first.kind}): {first.text}"
                drops.add(decontaminate.REASON[first.part], shown, where=found.where)
            else:
                yield found


def _sound(part: Part, task: Task, drops: Drops) -> Iterator[Found]:
    source = get_source(part.source)
    options = {"span": Span(*part.span)} if part.span else {}
    for found in source.reader(Path(part.path), domain=task.domain, drops=drops, **options):
        checked = quality.check(found, task.limits, task.domain)
        if isinstance(checked, Drop):
            drops.log.append(checked)
        else:
            yield checked


def _hit(found: Found, hit: decontaminate.Hit) -> dict[str, Any]:
    return {"record": found.record.id, "where": found.where, **asdict(hit)}


def _features(found: Found, start: int, length: int, *, near: bool) -> dict[str, Any]:
    record = found.record
    question, answer = duplicates.keys(record)
    return {
        "id": record.id,
        "where": found.where,
        "source": record.source,
        "license": record.license,
        "place": list(coverage.place(record)),
        "question": question,
        "answer": answer,
        "signature": duplicates.signature(record).tobytes() if near else b"",
        "start": start,
        "length": length,
    }


def _write_features(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("id", pa.string()),
            ("where", pa.string()),
            ("source", pa.string()),
            ("license", pa.string()),
            ("place", pa.list_(pa.string())),
            ("question", pa.binary(16)),
            ("answer", pa.binary(16)),
            ("signature", pa.binary()),
            ("start", pa.int64()),
            ("length", pa.int64()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


@lru_cache(maxsize=1)
def _index(path: str, content: str) -> decontaminate.Index:
    """Read once a process; ``content`` tells one index from the next at the same place."""
    return decontaminate.Index.load(Path(path))


def account(shard: Shard) -> dict[str, Any]:
    """What a complete shard says was read, left out and hit."""
    value: dict[str, Any] = read_json(shard.account)
    return value
