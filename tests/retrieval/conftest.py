"""The real embedder, loaded once, and a folder of notes as anyone might keep them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from qwen_ray.embedder import Embedder

NOTES = {
    "rivers.md": "# Rivers\n\nThe Okavango ends in a delta.\n\n## Length\n\nThe Nile is 6,650 km long.",
    "glaciers.txt": "Aletsch is the largest glacier of the Alps.\n",
    "birds/swift.md": "# The common swift\n\nSwifts sleep on the wing and land only to nest.\n",
}


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    from qwen_ray.embedder import Embedder

    return Embedder.load()


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    folder = tmp_path / "notes"
    for name, text in NOTES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def texts(embedder: Embedder) -> Callable[..., list[list[str]]]:
    """The texts that a search finds, for each question."""

    def search(
        bases: Any, name: str | None, *questions: str, k: int = 1, by: str = "hybrid"
    ) -> list[list[str]]:
        found = bases.search(name, questions, embedder.embed(questions), k, by=by)
        return [[passage.text for passage in passages] for passages in found]

    return search
