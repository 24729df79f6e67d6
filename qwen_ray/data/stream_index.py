"""The index of a Record JSONL file: where each record stands and what must be known before it is drawn.

Made in one pass and kept beside the file. What is kept holds for the very bytes it was made of: the key in
it names the file's SHA-256. Where it cannot be written, each start makes it anew.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import zipfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.data.lots import integer
from qwen_ray.data.records import Record
from qwen_ray.data.split import MAX_VALIDATION, lowest, number_of
from qwen_ray.errors import UserError
from qwen_ray.fsio import beside, fsync_dir, sha256_json

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]
    Arrays = dict[str, np.ndarray[Any, Any]]

log = logging.getLogger(__name__)
_FIX = "data.streaming reads Record JSONL, as `qwen-ray data prepare` writes it; or set data.streaming=false"


def index_of(path: Path, digest: str, *, seed: int, held_fraction: float) -> Arrays:
    """The index of ``path``, whose SHA-256 is ``digest``.

    Of each record: ``place`` (bytes before it), ``domain`` (a position in ``names``), ``difficulty`` (NaN
    where it has none) and ``digest`` (8 bytes of the SHA-256 of its id). Of those that may be held out:
    ``held`` (number of the record), ``held_number`` (:func:`~qwen_ray.data.split.number_of`) and ``held_id``.

    Raises :class:`UserError` naming the line at fault.
    """
    return cached(
        beside(path, "idx"),
        sha256_json([digest, seed, held_fraction]),
        lambda: _scan(path, seed=seed, held_fraction=held_fraction),
    )


def cached(path: Path, key: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays in ``path`` if they were stored under ``key``, else those of ``make``, stored there."""
    import numpy as np

    unusable = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile)
    with contextlib.suppress(*unusable), np.load(path, allow_pickle=False) as stored:
        if str(stored["key"]) == key:
            return {name: stored[name] for name in stored.files if name != "key"}
    made = make()
    arrays: dict[str, Any] = {"key": np.array(key), **made}
    try:
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as e:
        log.info("%s is not kept: %s", path, e)
        return made
    try:
        with os.fdopen(fd, "wb") as file:
            np.savez(file, **arrays)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except OSError as e:
        log.info("%s is not kept: %s", path, e)
        Path(temporary).unlink(missing_ok=True)
    return made


def parse_line(line: bytes, where: str) -> Record:
    """The Record of one line. Raises :class:`UserError`."""
    try:
        row = json.loads(line)
    except ValueError as e:
        raise UserError(f"malformed record: not JSON ({e})", where=where, fix=_FIX) from None
    try:
        return Record.from_dict(row, where=where)
    except UserError as e:
        raise UserError(e.what, where=where, fix=f"{e.fix}; {_FIX}" if e.fix else _FIX) from None


def _scan(path: Path, *, seed: int, held_fraction: float) -> Arrays:
    import numpy as np

    place, domain, difficulty, digest = array("Q"), array("H"), array("d"), array("Q")
    names: dict[str, int] = {}
    held: list[tuple[float, str, int]] = []
    at = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                record = parse_line(line, f"{path}:{number}")
                drawn = number_of(record.id, seed=seed)
                if drawn < held_fraction:
                    held.append((drawn, record.id, len(place)))
                    if len(held) > 2 * MAX_VALIDATION:
                        held = lowest(held)
                place.append(at)
                domain.append(names.setdefault(record.domain, len(names)))
                difficulty.append(float("nan") if record.difficulty is None else record.difficulty)
                digest.append(integer(record.id))
            at += len(line)
    if not place:
        raise UserError("the file holds no record", where=str(path))
    held = lowest(held)
    return {
        "place": np.array(place, dtype=np.int64),
        "domain": np.array(domain, dtype=np.uint16),
        "difficulty": np.array(difficulty),
        "digest": np.array(digest, dtype=np.uint64),
        "names": np.array(list(names)),
        "held_number": np.array([drawn for drawn, _, _ in held]),
        "held_id": np.array([i for _, i, _ in held], dtype=str),
        "held": np.array([n for _, _, n in held], dtype=np.int64),
    }
