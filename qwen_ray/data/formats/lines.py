"""The bytes of a file: opened, gunzipped, split into lines, cut into ranges of whole lines."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from qwen_ray.errors import UserError

MAX_LINE = 1 << 24  # bytes; a line that has no end would fill the memory
CHUNK = 1 << 20
_BOM = b"\xef\xbb\xbf"


class Item(NamedTuple):
    """A row of a file: ``where`` it is, its JSON value or a :class:`Fault`, and the line it was read from."""

    where: str
    value: Any
    raw: bytes = b""


class Span(NamedTuple):
    """A part of a file: bytes ``[start, end)``, whole lines, the first of them line ``first_line``.

    Of a Parquet file: row groups, and the first row.
    """

    start: int
    end: int
    first_line: int


def read_text(path: Path) -> str:
    """The text of a file, gunzipped where its name ends in ``.gz``."""
    with opened(path) as file:
        data = file.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise UserError(f"not UTF-8 text ({e.reason})", where=str(path), fix="convert it to UTF-8") from None


@contextmanager
def opened(path: Path) -> Iterator[IO[bytes]]:
    """The bytes of a file, gunzipped where its name ends in ``.gz``; what fails is a :class:`UserError`."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            yield file  # type: ignore[misc]
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("no such data file", where=str(path), fix="check the path") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        raise UserError(f"damaged gzip file ({e})", where=str(path), fix="get it again") from None
    except OSError as e:
        raise UserError(
            f"cannot be read ({e.strerror or e})", where=str(path), fix="check the file"
        ) from None


def stem(path: Path) -> str:
    """The name of a file without what its format adds."""
    return path.name.removesuffix(".gz").rsplit(".", 1)[0]


def kind(path: Path) -> str:
    """The last suffix of a name, but for ``.gz``, in lower case."""
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def byte_lines(path: Path, span: Span | None = None) -> Iterator[tuple[int, bytes]]:
    """``(number, line)`` from 1. Of a line longer than :data:`MAX_LINE` the first that many bytes and one."""
    with opened(path) as file:
        if span is not None:
            file.seek(span.start)
        left = None if span is None else span.end - span.start
        number = 1 if span is None else span.first_line
        while (left is None or left > 0) and (line := file.readline(MAX_LINE + 1)):
            size, rest = len(line), line
            while not rest.endswith(b"\n") and (rest := file.readline(CHUNK)):
                size += len(rest)
            yield number, line.removeprefix(_BOM) if number == 1 else line
            number += 1
            left = None if left is None else left - size


def cut_lines(file: IO[bytes], size: int) -> Iterator[Span]:
    """Spans of at least ``size`` bytes and whole lines, in one pass that counts newlines."""
    total = file.seek(0, 2)
    file.seek(0)
    start, first_line = 0, 1
    while start < total:
        lines, left = 0, max(size, 1)
        while left > 0 and (chunk := file.read(min(left, CHUNK))):
            lines += chunk.count(b"\n")
            left -= len(chunk)
        ended = chunk.endswith(b"\n")
        while not ended and (chunk := file.readline(CHUNK)):
            ended = chunk.endswith(b"\n")
            lines += ended
        yield Span(start, file.tell(), first_line)
        start, first_line = file.tell(), first_line + lines
