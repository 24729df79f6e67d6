"""Make, update and roll back knowledge bases: each leaves a version."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from qwen_ray.data.sources import Drops
from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.retrieval.chunks import Chunk, chunks
from qwen_ray.retrieval.documents import Origin, read_documents
from qwen_ray.retrieval.manifest import Manifest
from qwen_ray.retrieval.store import Snapshot, Store

BATCH = 1024
"""Chunks that are embedded, and written, at a time."""

INDEXED = 50_000
"""Chunks from which on vectors are indexed (IVF_FLAT). With fewer a question is compared with all of them,
which is exact; docs/retrieval.md has the times."""

Embed = Callable[[Sequence[Chunk]], Iterable[tuple[Sequence[Chunk], Any]]]
"""Turns chunks into batches of chunks with their vectors, in any order."""


def build(
    store: Store, name: str, origins: Sequence[Origin], embedder: Embedder, *, embed: Embed | None = None
) -> Manifest:
    """Make a knowledge base, or all of it again as the next version.

    ``embed``: see :func:`here`, the default, and :mod:`qwen_ray.retrieval.at_scale`. Raises
    :class:`UserError` where the sources cannot be read or hold no text, or another process writes it.
    """
    return _write(store, name, origins, embedder, embed or here(embedder), current=None)


def update(
    store: Store,
    name: str,
    embedder: Embedder,
    *,
    origins: Sequence[Origin] = (),
    embed: Embed | None = None,
) -> Manifest:
    """Bring a knowledge base to what its sources hold now; ``origins`` replace those it was made of.

    Passages that are still there keep their vectors, new ones are embedded, vanished ones leave. Where
    nothing changed there is no new version: the current one's manifest comes back.
    """
    current = store.open(name)
    if current.manifest.embedder != embedder.id:
        raise UserError(
            f"'{name}' was made with the embedder '{current.manifest.embedder}', not '{embedder.id}'",
            fix="update it with that one, or build it again",
        )
    origins = origins or [Origin(**origin) for origin in current.manifest.origins]
    return _write(store, name, origins, embedder, embed or here(embedder), current=current)


def here(embedder: Embedder) -> Embed:
    """Embeds in this process."""

    def embed(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        remaining = iter(missing)
        while batch := list(islice(remaining, BATCH)):
            yield batch, embedder.embed([chunk.searched for chunk in batch])

    return embed


def _write(
    store: Store,
    name: str,
    origins: Sequence[Origin],
    embedder: Embedder,
    embed: Embed,
    *,
    current: Snapshot | None,
) -> Manifest:
    drops = Drops()
    with store.writing(name):
        wanted = list(chunks(read_documents(origins, drops)))
        if not wanted:
            raise UserError("the sources hold no text", where=name, fix="check --source")
        writer = store.start(name, _schema(embedder.dimensions), fresh=current is None)
        there = set(writer.ids())
        missing = [chunk for chunk in wanted if chunk.id not in there]
        gone = sorted(there - {chunk.id for chunk in wanted})
        listed = [origin.to_dict() for origin in origins]
        if current is not None and not missing and not gone and listed == current.manifest.origins:
            return current.manifest
        writer.remove(gone)
        for batch, vectors in embed(missing):
            writer.add(_rows(batch, vectors, embedder.dimensions))
        _index(writer.table, len(wanted))
        manifest = Manifest(
            name=name,
            version=writer.version,
            action="build" if current is None else "update",
            parent=writer.parent,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            embedder=embedder.id,
            embedder_name=embedder.name,
            dimensions=embedder.dimensions,
            chunks=len(wanted),
            documents=len({chunk.id.rpartition("#")[0] for chunk in wanted}),
            embedded=len(missing),
            removed=len(gone),
            origins=listed,
            sources=_sources(wanted),
            dropped=dict(sorted(drops.counts.items())),
        )
        writer.publish(manifest)
        return manifest


def _sources(wanted: Sequence[Chunk]) -> dict[str, dict[str, Any]]:
    counts = Counter((chunk.source, chunk.license) for chunk in wanted)
    licenses: dict[str, list[str]] = {}
    for source, license in sorted(counts):
        licenses.setdefault(source, []).append(license)
    return {
        source: {"license": " AND ".join(names), "chunks": sum(counts[source, name] for name in names)}
        for source, names in licenses.items()
    }


def _schema(dimensions: int) -> Any:
    import pyarrow as pa

    text = ("id", "text", "title", "source", "license", "searched")
    vector = pa.field("vector", pa.list_(pa.float32(), dimensions))
    return pa.schema([*(pa.field(name, pa.string()) for name in text), vector])


def _rows(batch: Sequence[Chunk], vectors: Any, dimensions: int) -> Any:
    import pyarrow as pa

    flat = pa.array(vectors.reshape(-1), pa.float32())
    columns: dict[str, Any] = {
        key: [getattr(chunk, key) for chunk in batch]
        for key in ("id", "text", "title", "source", "license", "searched")
    }
    columns["vector"] = pa.FixedSizeListArray.from_arrays(flat, dimensions)
    return pa.table(columns)


def _index(table: Any, rows: int) -> None:
    """Of words always, of vectors from :data:`INDEXED` on, unless there already."""
    from lancedb.index import FTS, IvfFlat

    there = {column for index in table.list_indices() for column in index.columns}
    if "searched" not in there:
        table.create_index("searched", config=FTS())
    if rows >= INDEXED and "vector" not in there:
        table.create_index("vector", config=IvfFlat(distance_type="cosine"))
