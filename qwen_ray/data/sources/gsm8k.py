"""GSM8K, grade-school mathematics: the training split only."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from qwen_ray.data.formats import read_text
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json

NAME, LICENCE = "gsm8k", "MIT"
_FILES = ("train.jsonl", "train.jsonl.gz")
_CALCULATOR = re.compile(r"<<[^>]*>>")  # marks for an external calculator, not meant to be said
_FINAL = re.compile(r"^#### \S", re.M)


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    file, count = _train_file(path), 0
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            drops.add("not JSON", line, where=where)
            continue
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) and row[key].strip() for key in ("question", "answer")
        ):
            drops.add("no question or no answer", line, where=where)
            continue
        count += 1
        if not _FINAL.search(row["answer"]):
            drops.add("no final answer after ####", row["question"], where=where)
            continue
        messages = (
            Message("user", row["question"].strip()),
            Message("assistant", _CALCULATOR.sub("", row["answer"]).strip()),
        )
        record = Record(f"{NAME}/{sha256_json(row['question'])[:16]}", messages, domain, NAME, LICENCE)
        yield Found(record, where)
    if not count:
        raise UserError("no GSM8K question and answer here", where=str(file), fix=SOURCE.where_to_get)


def _train_file(path: Path) -> Path:
    """The training file itself or in a folder. The test split is refused: it is what scores are taken on."""
    if path.is_dir():
        found = [path / name for name in _FILES if (path / name).is_file()]
        if not found:
            raise UserError(
                f"no {' or '.join(_FILES)} in this folder", where=str(path), fix=SOURCE.where_to_get
            )
        path = found[0]
    if "test" in path.name.lower():
        raise UserError(
            "this is the GSM8K test split, which is for evaluation only",
            where=str(path),
            fix="give train.jsonl",
        )
    return path


SOURCE = Source(
    name=NAME,
    title="GSM8K: grade-school mathematics problems, training split",
    licence=LICENCE,
    domain_hint="mathematics",
    where_to_get=(
        "GitHub repository openai/grade-school-math, commit 3101c7d5072418e28b9008a6636bde82a006892c: "
        "grade_school_math/data/train.jsonl"
    ),
    reader=_read,
    size="7,473 problems with their working",
)
