"""Gives lm-eval the items of the embedded suite, wherever the package is installed."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(*, category: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The test split of a category: id, kind, question, choices, answer (index)."""
    path = Path(__file__).parent / "data" / f"{category}.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list(rows)}
