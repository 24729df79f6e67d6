"""The text files of a source, read where they lie: a folder, a file, an archive that is never unpacked."""

from __future__ import annotations

import json
import tarfile
import zlib
from collections.abc import Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Any

from qwen_ray.data.formats import read_text
from qwen_ray.data.sources.base import Drops
from qwen_ray.errors import UserError

LARGEST = 4 * 1024 * 1024
"""Bytes of one text file. The largest of the sources here has 73 kB."""
TOO_LARGE, NOT_TEXT = "the file is too large to be text", "the file is not UTF-8 text"
_ARCHIVES = (".tar.gz", ".tgz", ".tar", ".tar.xz", ".tar.bz2")


def text_files(path: Path, suffix: str, *, drops: Drops, fix: str) -> Iterator[tuple[str, str]]:
    """``(where, text)`` of every ``*suffix`` file of a folder, an archive or an archive in a folder.

    ``where`` is ``archive:member`` or the file. An archive is streamed, in its own order, and nothing of
    it is written to disk; a folder is read in the order of names. Raises :class:`UserError`, with ``fix``,
    where there is no such file.
    """
    archives = [path] if path.name.endswith(_ARCHIVES) else []
    if path.is_dir():
        archives = sorted(file for file in path.iterdir() if file.name.endswith(_ARCHIVES))
    raw = (found for archive in archives for found in _members(archive, suffix, drops))
    count = 0
    for where, data in raw if archives else _plain_files(path, suffix, drops):
        count += 1
        try:
            yield where, data.decode("utf-8-sig").replace("\r\n", "\n")
        except UnicodeDecodeError as e:
            drops.add(NOT_TEXT, str(e.reason), where=where)
    if not count:
        raise UserError(f"no {suffix} file here", where=str(path), fix=fix)


def load_json(path: Path, names: tuple[str, ...], *, fix: str) -> tuple[Path, Any]:
    """The JSON file ``path`` or the first of ``names`` in the folder ``path``; ``*.gz`` is gunzipped."""
    if path.is_dir():
        found = [path / name for name in names if (path / name).is_file()]
        if not found:
            raise UserError(f"no {' or '.join(names)} in this folder", where=str(path), fix=fix)
        path = found[0]
    try:
        return path, json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as e:
        raise UserError(f"not valid JSON ({e})", where=str(path), fix=fix) from None


def _members(archive: Path, suffix: str, drops: Drops) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, "r|*") as stream:
            for member in stream:
                where = f"{archive}:{member.name}"
                if not member.isfile() or not member.name.endswith(suffix):
                    continue
                if member.size > LARGEST:
                    drops.add(TOO_LARGE, f"{member.size} bytes", where=where)
                elif data := stream.extractfile(member):
                    yield where, data.read()
    except FileNotFoundError:
        raise UserError("no such file", where=str(archive), fix="check the path") from None
    except (tarfile.TarError, EOFError, OSError, zlib.error, LZMAError, ValueError) as e:
        raise UserError(f"damaged archive ({e})", where=str(archive), fix="get it again") from None


def _plain_files(path: Path, suffix: str, drops: Drops) -> Iterator[tuple[str, bytes]]:
    if not path.exists():
        raise UserError("no such file or folder", where=str(path), fix="check the path")
    for file in sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]:
        if not file.is_file():
            continue
        if file.stat().st_size > LARGEST:
            drops.add(TOO_LARGE, f"{file.stat().st_size} bytes", where=str(file))
        else:
            yield str(file), file.read_bytes()
