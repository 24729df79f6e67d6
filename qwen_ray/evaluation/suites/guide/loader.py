"""Gives lm-eval MMLU and GSM8K from the hub, or from a folder of the original files.

The folder (``--data-dir``) holds ``mmlu/{test,dev}/SUBJECT_{test,dev}.csv`` as in hendrycks/test, and
``gsm8k/{test.jsonl,train.jsonl[.gz]}`` as in openai/grade-school-math.
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import datasets

from qwen_ray.errors import UserError

FEWSHOT_POOL = 64
"""Training problems of GSM8K kept for prompts; only the first few are used."""


def mmlu(*, subject: str, data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Splits ``test`` and ``dev`` (prompts only) with question, choices, answer (index)."""
    if data_dir is None:
        loaded = _hub("cais/mmlu", subject)
        return {split: loaded[split] for split in ("test", "dev")}
    return {split: datasets.Dataset.from_list(_csv(data_dir, subject, split)) for split in ("test", "dev")}


def gsm8k(*, data_dir: str | None = None, **_: Any) -> dict[str, datasets.Dataset]:
    """Splits ``test`` and ``train`` (prompts only) with question, answer."""
    if data_dir is None:
        loaded = _hub("openai/gsm8k", "main")
        return {split: loaded[split] for split in ("test", "train")}
    root = Path(data_dir) / "gsm8k"
    return {
        "test": datasets.Dataset.from_list(_jsonl(root, "test")),
        "train": datasets.Dataset.from_list(_jsonl(root, "train")[:FEWSHOT_POOL]),
    }


def _hub(path: str, name: str) -> datasets.DatasetDict:
    try:
        return datasets.load_dataset(path, name)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as e:
        raise UserError(
            f"cannot load the data set from the hub: {str(e).splitlines()[0][:200]}",
            where=f"{path} ({name})",
            fix="check the network, or give the original files by --data-dir FOLDER (docs/evaluation.md)",
        ) from e


def _csv(data_dir: str, subject: str, split: str) -> list[dict[str, Any]]:
    path = _existing(Path(data_dir) / "mmlu" / split / f"{subject}_{split}.csv")
    with open(path, newline="", encoding="utf-8") as f:
        rows = list(csv.reader(f))
    for number, row in enumerate(rows, start=1):
        if len(row) != 6 or row[5] not in ("A", "B", "C", "D"):
            raise UserError("not an MMLU row: question, A, B, C, D, answer letter", where=f"{path}:{number}")
    return [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows]


def _jsonl(root: Path, split: str) -> list[dict[str, Any]]:
    plain, packed = root / f"{split}.jsonl", root / f"{split}.jsonl.gz"
    if packed.is_file() and not plain.is_file():
        text = gzip.decompress(packed.read_bytes()).decode()
    else:
        text = _existing(plain).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise UserError(
            "no such evaluation file",
            where=str(path),
            fix="--data-dir needs mmlu/{test,dev}/*.csv and gsm8k/{test,train}.jsonl (docs/evaluation.md)",
        )
    return path
