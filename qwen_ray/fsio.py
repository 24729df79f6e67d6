"""Files that are whole or absent: atomic writes, checksums, canonical JSON."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from qwen_ray.errors import UserError


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value in canonical form (sorted keys, no spaces)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def output_path(path: str | Path, *, folder: bool = False, inputs: Iterable[str | Path] = ()) -> Path:
    """Where a file (``folder``: a folder) will be written, ``~`` expanded, looked at before the work for it.

    Raises :class:`UserError` for an empty name, a folder where a file is written and the other way round, a
    place that cannot be written, and a file that is one of ``inputs``, or in a folder that is one.
    """
    where, kind = str(path), "folder" if folder else "file"
    if not where:
        raise UserError("no name given", where="--out", fix=f"name a {kind}")
    out = Path(path).expanduser()
    if folder and os.path.exists(out) and not out.is_dir():
        raise UserError("this is a file, and a folder is written", where=where, fix="name a folder")
    if not folder and os.path.exists(out) and not out.is_file():
        what = "a folder" if out.is_dir() else "a device"
        raise UserError(f"this is {what}, and a file is written", where=where, fix="name a file")
    whole = out.absolute()
    near = next(p for p in ([whole] if folder else []) + [*whole.parents] if os.path.lexists(p))
    if not os.path.isdir(near):
        raise UserError(f"{near} is no folder", where=where, fix=f"name another {kind}")
    if not os.access(near, os.W_OK | os.X_OK):
        fix = f"name another {kind}, or change the permissions"
        raise UserError(f"nothing may be written in {near}", where=where, fix=fix)
    real = Path(os.path.realpath(out))
    for given in inputs:
        source = Path(os.path.realpath(given))
        if source == real:
            raise UserError("this is what is read, and would be lost", where=where, fix="name another file")
        if source in real.parents and source.is_dir():
            raise UserError(f"this is in {given}, which is read", where=where, fix="name a file elsewhere")
    return out


def whole_path(path: str | Path) -> str:
    """A path that means the same in whatever folder it is used next."""
    return str(Path(path).expanduser().resolve())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` so that a crash leaves the old file or the new one, nothing between."""
    with replacing(path, "w") as f:
        f.write(text)


@contextmanager
def replacing(path: Path, mode: Literal["w", "wb"]) -> Iterator[IO[Any]]:
    """A file to write that takes the place of ``path`` when it is whole and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, tmp = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(fd, mode, encoding="utf-8" if mode == "w" else None) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(tmp, 0o666 & ~_umask())
        os.replace(tmp, path)
    except BaseException as e:
        Path(tmp).unlink(missing_ok=True)
        if isinstance(e, OSError) and e.errno == errno.ENOSPC and e.filename is None:
            e.filename = str(path)  # a full disk does not say of what file
        raise
    fsync_dir(path.parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``path`` when it is whole and on the disk; nothing may be there.

    If the block raises, nothing is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}-"))
    try:
        yield staging
        fsync_tree(staging)
        staging.chmod(0o777 & ~_umask())
        staging.rename(path)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically (see :func:`write_text`)."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON; a missing or damaged file is a :class:`UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise UserError("no such file", where=str(path), fix="check the path") from None
    except PermissionError:
        raise UserError("may not be read", where=str(path), fix="check its permissions") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise UserError(f"not valid JSON ({e})", where=str(path), fix="write it again") from None


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> int:
    """Write one JSON object a line, atomically. Returns the number of lines."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_text(path, "".join(line + "\n" for line in lines))
    return len(lines)


def beside(path: Path, ending: str) -> Path:
    """What belongs to a file: ``data/biology.jsonl`` -> ``data/biology.jsonl.card.json``."""
    return path.with_name(f"{path.name}.{ending}")


def files_under(root: Path) -> Iterator[Path]:
    """Every regular file below ``root``, sorted, relative to it."""
    yield from sorted(p.relative_to(root) for p in root.rglob("*") if p.is_file())


def fsync_dir(path: Path) -> None:
    """Make a rename inside ``path`` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Flush every file below ``root`` and the directories that hold them."""
    for rel in files_under(root):
        fd = os.open(root / rel, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    for directory in {root, *(p for p in root.rglob("*") if p.is_dir())}:
        fsync_dir(directory)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
