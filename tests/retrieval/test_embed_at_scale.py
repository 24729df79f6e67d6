"""Ray Data's workers give the vectors that this process gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.embedder import Embedder
from qwen_ray.errors import UserError
from qwen_ray.retrieval import build as kb
from qwen_ray.retrieval.chunks import Chunk
from qwen_ray.retrieval.documents import Origin
from qwen_ray.retrieval.knowledge_base import KnowledgeBases
from qwen_ray.retrieval.store import Store


@pytest.mark.cluster
def test_ray_data_embeds_the_same(
    notes: Path, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_ray import cluster
    from qwen_ray.retrieval import at_scale

    monkeypatch.setattr(at_scale, "BATCH", 2)
    store, origins = Store(tmp_path / "knowledge"), [Origin("text", str(notes))]
    kb.build(store, "here", origins, embedder)
    embed = at_scale.on_cluster(embedder.name, workers=2)
    assert list(embed([])) == []
    try:
        manifest = kb.build(store, "there", origins, embedder, embed=embed)
        too_many = at_scale.on_cluster(embedder.name, workers=500)
        with pytest.raises(UserError, match="embedding workers"):
            list(too_many([Chunk("a#1", "a", "", "s", "l")]))
    finally:
        cluster.disconnect()
    assert (manifest.chunks, manifest.embedded) == (4, 4)
    here, there = (_vectors(store, name) for name in ("here", "there"))
    assert here.keys() == there.keys()
    for id, vector in here.items():
        assert there[id] == pytest.approx(vector, abs=1e-5)
    asked = ["How long is the Nile?"]
    (found,) = KnowledgeBases(store.root).search("there", asked, embedder.embed(asked), 1)
    assert found[0].text == "The Nile is 6,650 km long."


def _vectors(store: Store, name: str) -> dict[str, list[float]]:
    rows = store.open(name).table.to_arrow().to_pylist()
    return {row["id"]: row["vector"] for row in rows}
