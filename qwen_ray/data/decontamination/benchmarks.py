"""Benchmark items, read so that training data can be searched for them.

What counts as a benchmark is told by names and layout: a file or folder named ``train`` is training data.
Nothing read here may enter a training set.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from qwen_ray.data.formats import read_text
from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under

LETTERS = "ABCDEFGH"
TINY = ("arithmetic", "biology", "control", "history", "reasoning", "security")
GENERATED = ("tiny/arithmetic", "tiny/reasoning")

_MMLU = re.compile(r"(?P<subject>\w+)_(?P<split>test|val|dev)\.csv")
_CALCULATOR = re.compile(r"<<[^>]*>>")  # GSM8K's marks for an external calculator, which no text repeats
_PASSAGE = re.compile(r"\s*This question refers to the following information\.\s*")
_TRAINING = re.compile(r"(?:^|[^a-z])train(?:ing|set)?(?:[^a-z]|$)")
_PLAIN = (".jsonl", ".jsonl.gz", ".csv")


class Item(NamedTuple):
    """One question of a benchmark."""

    benchmark: str
    """``mmlu/college_biology``, ``gsm8k``, ``tiny/history``, or the folder or file it was read from."""
    id: str
    question: str
    passage: str = ""
    """The quoted text that the question is about; empty where there is none."""
    choices: tuple[str, ...] = ()
    answer: str = ""
    """The text of the right answer, not its letter; empty where it is not known."""
    generated: bool = False
    """Made of a template and numbers: another item of the template is not this one."""


def load_benchmarks(folder: Path | None) -> list[Item]:
    """Items of the embedded suites and, with a ``folder``, those of :func:`read_benchmarks`."""
    return [*_embedded(), *(read_benchmarks(folder) if folder else ())]


def read_benchmarks(folder: Path) -> list[Item]:
    """Items of every benchmark file below ``folder``, or of that one file.

    Read are: MMLU's ``SUBJECT_{test,val,dev}.csv`` (question, A, B, C, D, letter; no header), held-out sets
    (``items.jsonl`` beside a ``suite.yaml``), and any other JSONL or CSV whose rows have a ``question``,
    such as GSM8K's ``test.jsonl``. Never read is what has ``train`` in the name of the file or of a folder
    on the way.

    Raises :class:`UserError` where ``folder`` has no benchmark or a benchmark has a faulty row.
    """
    if not folder.exists():
        raise UserError("no such file or folder", where=str(folder), fix="check the path of the benchmarks")
    paths = [Path(folder.name)] if folder.is_file() else files_under(folder)
    root = folder.parent if folder.is_file() else folder
    found = [item for path in paths if not _is_training(path) for item in _read(root, path)]
    if not found:
        raise UserError(
            "no benchmark here",
            where=str(folder),
            fix="give a folder with MMLU's *_test.csv, GSM8K's test.jsonl, a held-out set, or JSONL or CSV "
            "with a 'question' in each row; files named 'train' are never taken",
        )
    return found


def counts(items: Iterable[Item]) -> dict[str, int]:
    """Number of items of each benchmark, by name."""
    return dict(sorted(Counter(item.benchmark for item in items).items()))


def _is_training(path: Path) -> bool:
    return any(_TRAINING.search(part.lower()) for part in path.parts)


def _embedded() -> Iterator[Item]:
    data = files("qwen_ray.evaluation.suites.tiny") / "data"
    for name in TINY:
        text = (data / f"{name}.jsonl").read_text(encoding="utf-8")
        yield from _jsonl(text, f"tiny/{name}", "", f"tiny suite, {name}.jsonl")


def _read(root: Path, path: Path) -> Iterator[Item]:
    """Items of one file; none where it is no benchmark."""
    where = root / path
    folder = path.parent.name or root.name
    if match := _MMLU.fullmatch(path.name):
        yield from _mmlu(read_text(where), match["subject"], match["split"], str(where))
    elif path.name == "items.jsonl" and (where.parent / "suite.yaml").is_file():
        yield from _jsonl(read_text(where), folder, "", str(where))
    elif path.name.endswith(_PLAIN):
        stem = path.name.split(".")[0]
        text = _text_or_none(where)
        if text is None:
            return
        if path.suffix == ".csv":
            yield from _csv(text, folder, f"{stem}/", str(where))
        elif "question" in _first_object(text):
            yield from _jsonl(text, folder, f"{stem}/", str(where))


def _text_or_none(path: Path) -> str | None:
    """A file that cannot be read is no benchmark we know of: a folder may hold anything."""
    try:
        return read_text(path)
    except UserError:
        return None


def _first_object(text: str) -> dict[str, Any]:
    line = next((line for line in text.split("\n") if line.strip()), "")
    try:
        value = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _mmlu(text: str, subject: str, split: str, where: str) -> Iterator[Item]:
    for number, row in enumerate(_csv_rows(text, where), start=1):
        if len(row) != 6 or row[5].strip() not in tuple("ABCD"):
            raise UserError(
                "not a row of MMLU (question, A, B, C, D, letter)",
                where=f"{where}, row {number}",
                fix="get it again",
            )
        yield _item(f"mmlu/{subject}", f"{split}/{number}", row[0], row[1:5], row[5].strip())


def _csv(text: str, benchmark: str, prefix: str, where: str) -> Iterator[Item]:
    """A CSV with a header that names ``question``, and ``A``, ``B``, … or ``choices`` where it has any."""
    header, *rows = _csv_rows(text, where) or [[]]
    names = [name.strip().lower() for name in header]
    if "question" not in names:
        return
    for number, row in enumerate(rows, start=1):
        if row:
            yield _from_row(
                dict(zip(names, row, strict=False)), benchmark, f"{prefix}{number}", f"{where}, row {number}"
            )


def _csv_rows(text: str, where: str) -> list[list[str]]:
    try:
        return list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as e:
        raise UserError(f"not a readable CSV ({e})", where=where) from None


def _jsonl(text: str, benchmark: str, prefix: str, where: str) -> Iterator[Item]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(
                "malformed item: not a JSON object", where=f"{where}:{number}", fix="one object a line"
            )
        yield _from_row(row, benchmark, f"{prefix}{number}", f"{where}:{number}")


def _from_row(row: dict[str, Any], benchmark: str, id: str, where: str) -> Item:
    question, choices = row.get("question"), row.get("choices")
    if not isinstance(question, str) or not question.strip():
        raise UserError("an item needs a 'question'", where=where, fix="mend or remove the row")
    if isinstance(choices, dict) and isinstance(choices.get("text"), list):  # as in ARC
        choices = choices["text"]
    if not isinstance(choices, list):
        lettered = {str(key).upper(): value for key, value in row.items()}
        choices = [lettered[letter] for letter in LETTERS if isinstance(lettered.get(letter), str)]
    passage = next((row[key] for key in ("passage", "context") if isinstance(row.get(key), str)), "")
    item = _item(benchmark, str(row.get("id") or id), question, choices, row.get("answer"))
    return item._replace(passage=passage) if passage else item


def _item(benchmark: str, id: str, question: str, choices: list[Any], answer: Any) -> Item:
    texts, passage = tuple(str(choice) for choice in choices), ""
    if intro := _PASSAGE.match(question):
        # MMLU's history questions: what is asked stands in the last line, below the quoted source.
        quoted, _, asked = question[intro.end() :].strip().rpartition("\n")
        passage, question = (quoted, asked) if asked else ("", question)
    right, generated = _answer(answer, texts), benchmark in GENERATED
    return Item(benchmark, id, question.strip(), passage.strip(), texts, right, generated)


def _answer(answer: Any, choices: tuple[str, ...]) -> str:
    """The answer's text, from its number in ``choices``, its letter, or itself."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        return choices[answer] if 0 <= answer < len(choices) else str(answer)
    text = str(answer).strip() if isinstance(answer, (str, float)) else ""
    if choices and len(text) == 1 and 0 <= LETTERS.find(text.upper()) < len(choices):
        return choices[LETTERS.index(text.upper())]
    if choices and text.isdecimal() and text not in choices and int(text) < len(choices):
        return choices[int(text)]
    return _CALCULATOR.sub("", text)
