"""OpenTriviaQA: crowd-made trivia in blocks of text, one file a category.

A block is ``#Q`` and the question, which may run over several lines, then ``^`` and the answer, then the
choices, ``A`` to ``D``. Some lines of the files are Latin-1 and the rest UTF-8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from qwen_ray.data.formats.lines import opened
from qwen_ray.data.questions import LETTERS, lay_out
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Found, Source
from qwen_ray.errors import UserError
from qwen_ray.fsio import sha256_json

NAME, LICENCE = "opentriviaqa", "CC-BY-SA-4.0"

BROKEN = "block without a question, an answer or two choices"
NOT_AMONG = "the answer is not among the choices"
ALIKE = "two choices are alike"
NEEDS_CHOICES = "a question of its choices, which are not four"
AGAIN = "repeated in the file"

_CHOICE = re.compile(r"([A-H])(?: (.*)|$)")
_OF_CHOICES = re.compile(
    r"\b(?:these|following|statements?|choices?|options?|answers?|sentences?|odd one|does ?n.?t belong|false|"
    r"incorrect|true about|except|(?:is|are) not|above|below|both|neither)\b|____",
    re.I,
)


class _Block(NamedTuple):
    line: int
    question: str
    answer: str
    choices: tuple[str, ...]


def _read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
    count = 0
    for file in _files(path):
        seen: set[str] = set()
        for block in _blocks(file):
            count += 1
            where = f"{file}:{block.line}"
            pair = _ask(block)
            item = f"{NAME}/{file.stem}/{sha256_json([block.question, *sorted(block.choices)])[:16]}"
            if isinstance(pair, str) or item in seen:
                drops.add(pair if isinstance(pair, str) else AGAIN, _shown(block), where=where)
                continue
            seen.add(item)
            messages = (Message("user", pair[0]), Message("assistant", pair[1]))
            yield Found(Record(item, messages, domain, NAME, LICENCE), where)
    if not count:
        raise UserError("no OpenTriviaQA question (#Q) here", where=str(path), fix=SOURCE.where_to_get)


def _files(path: Path) -> list[Path]:
    """A category's file, or all of a folder or of the ``categories`` in it."""
    if not path.is_dir():
        return [path]
    folder = path / "categories" if (path / "categories").is_dir() else path
    return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))


def _blocks(path: Path) -> Iterator[_Block]:
    with opened(path) as file:
        lines = [_decode(line) for line in file.read().split(b"\n")]
    starts = [i for i, line in enumerate(lines) if line.startswith("#Q")]
    for start, end in zip(starts, [*starts, len(lines)][1:], strict=True):
        yield _block(start + 1, lines[start:end])


def _decode(line: bytes) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("cp1252", errors="replace")
    return text.replace("\ufeff", "").strip()


def _block(line: int, lines: list[str]) -> _Block:
    """A block whose answer or choices are empty is broken; :func:`_ask` says so."""
    marks = [i for i, text in enumerate(lines) if text.startswith("^")]
    end = marks[0] if marks else len(lines)
    choices = [match[2] or "" for text in lines[end + 1 :] if (match := _CHOICE.fullmatch(text))]
    if len(choices) != sum(bool(text) for text in lines[end + 1 :]):
        choices = []  # something else stands among them
    return _Block(
        line,
        _clean(" ".join([lines[0][2:], *lines[1:end]])),
        _clean(lines[end][1:]) if marks else "",
        tuple(map(_clean, choices)),
    )


def _ask(block: _Block) -> tuple[str, str] | str:
    """Question and answer, or why there is none."""
    _, question, answer, choices = block
    folded = [choice.casefold() for choice in choices]
    if fault := _fault(question, answer.casefold(), folded):
        return fault
    right = folded.index(answer.casefold())
    if len(choices) == 4:
        return lay_out(question, choices), f"{LETTERS[right]}. {choices[right]}"
    if set(folded) == {"true", "false"}:
        return f"True or false: {question}", choices[right]
    # Without the others, a choice is an answer only to a question that does not speak of them.
    if set(folded) != {"yes", "no"} and _OF_CHOICES.search(f"{question} {answer}"):
        return NEEDS_CHOICES
    return question, choices[right]


def _fault(question: str, answer: str, choices: list[str]) -> str:
    if not question or not answer or len(choices) < 2 or not all(choices):
        return BROKEN
    if answer not in choices:
        return NOT_AMONG
    return ALIKE if len(set(choices)) < len(choices) else ""


def _clean(text: str) -> str:
    return re.sub(r"_{2,}", "____", " ".join(text.split()))


def _shown(block: _Block) -> str:
    return f"{block.question} ^ {block.answer} ({'; '.join(block.choices)})"


SOURCE = Source(
    name=NAME,
    title="OpenTriviaQA: crowd-made multiple-choice trivia by category",
    licence=LICENCE,
    domain_hint="general",
    where_to_get=(
        "GitHub repository uberspot/OpenTriviaQA, commit dd31530bfbb19f9505b160b89c9df4b1127e3c70: "
        "a checkout, its categories folder, or one category's file (categories/history)"
    ),
    reader=_read,
    size="10,500 questions, most with four choices; the largest categories: general, science-technology",
)
