"""Gives lm-eval the items beside this file."""

import json
from pathlib import Path
from typing import Any

import datasets


def load(**_: Any) -> dict[str, datasets.Dataset]:
    """Splits ``test`` and ``dev`` (prompts only): id, question, choices, answer (index), source."""
    text = (Path(__file__).parent / "items.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return {
        split: datasets.Dataset.from_list([row for row in rows if row["split"] == split])
        for split in ("test", "dev")
    }
