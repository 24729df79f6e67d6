"""Chunks embedded on a Ray cluster by Ray Data: a pool of actors, each with the model loaded once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from qwen_ray import cluster
from qwen_ray.retrieval.build import BATCH, Embed
from qwen_ray.retrieval.chunks import Chunk


def on_cluster(embedder_name: str, *, workers: int, address: str | None = None) -> Embed:
    """Embeds on ``workers`` actors of one CPU each, of the cluster at ``address`` or of one started here.

    Batches come back as they are done, and are written: this process never holds all vectors.
    """

    def embed(missing: Sequence[Chunk]) -> Iterator[tuple[Sequence[Chunk], Any]]:
        if not missing:
            return
        cluster.connect(address, num_cpus=workers)
        cluster.check_room({"CPU": 1}, workers, "embedding workers", where="--workers")
        import ray.data

        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        texts = [{"number": number, "text": chunk.searched} for number, chunk in enumerate(missing)]
        done = ray.data.from_items(texts).map_batches(
            _Embed,
            fn_constructor_args=(embedder_name,),
            compute=ray.data.ActorPoolStrategy(size=workers),
            batch_size=BATCH,
            num_cpus=1,
        )
        for batch in done.iter_batches(batch_size=BATCH, batch_format="numpy"):
            yield [missing[number] for number in batch["number"]], batch["vector"]

    return embed


class _Embed:
    """One actor."""

    def __init__(self, name: str) -> None:
        from qwen_ray.embedder import Embedder

        self._embedder = Embedder.load(name)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"number": batch["number"], "vector": self._embedder.embed(list(batch["text"]))}
