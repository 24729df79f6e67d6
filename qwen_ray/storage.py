"""Small documents in a folder or an object store: written whole, created once, replaced only if unchanged.

In a folder one writer at a time (a lock on ``.lock``) writes ``.new`` and renames it, so a writer that dies
leaves the old document or the new one, and at most one file that the next writer takes over. On an object
store every write is one conditional request: there is no rename and no lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from qwen_ray.errors import UserError
from qwen_ray.fsio import fsync_dir

if TYPE_CHECKING:
    from qwen_ray.object_storage import ObjectStorage

_KEY = re.compile(r"[A-Za-z0-9_][^/\\\x00-\x1f]*(/[A-Za-z0-9_][^/\\\x00-\x1f]*)*")
_RETRY_SECONDS = 5.0
_TRIES = 200


class Missing(KeyError):
    """There is no document under this key."""


@dataclass(frozen=True)
class Stored:
    """A document as it was read. ``tag`` names this state of it, for :meth:`Storage.replace`."""

    data: bytes
    tag: str


class Storage(Protocol):
    """Documents by key: relative posix paths of which no part starts with a dot.

    Each write is atomic, and durable when it returns. Where the storage cannot be reached or refuses, each
    method raises :class:`UserError` with HTTP status 503.
    """

    @property
    def location(self) -> str:
        """Full path or URI."""

    def read(self, key: str) -> Stored:
        """The document; :class:`Missing` where there is none."""

    def create(self, key: str, data: bytes) -> bool:
        """Write a document that is not there yet; False if it is.

        False may also mean that this very write was taken and its answer lost on the way: put something of
        your own into the data where that matters, and look.
        """

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        """Write a new state of the document read with ``tag``; False if it has changed since, or is gone.
        False may mean what it may for :meth:`create`."""

    def delete(self, key: str) -> None:
        """Remove the document, if it is there."""

    def keys(self, prefix: str = "") -> list[str]:
        """All keys that start with ``prefix``, sorted."""


def is_uri(location: str | Path) -> bool:
    """Whether this names an object store and not a folder."""
    return "://" in str(location)


def open_storage(location: str | Path) -> LocalStorage | ObjectStorage:
    """The storage at a folder, which need not exist, or at ``s3://``, ``gs://``, ``az://`` or ``memory://``.

    Keys and endpoints of object stores come from the environment (``AWS_ACCESS_KEY_ID``,
    ``AWS_ENDPOINT_URL`` ...), as the providers' own tools read them. ``memory://NAME`` lasts as long as the
    process and is the same for all who open it there.
    """
    from qwen_ray.object_storage import ObjectStorage

    return ObjectStorage(str(location)) if is_uri(location) else LocalStorage(location)


def read_document(storage: Storage, key: str) -> Any:
    """A JSON document; :class:`Missing` where there is none, :class:`UserError` where it is not JSON."""
    return decoded(storage, key, storage.read(key))


def create_document(storage: Storage, key: str, value: Any) -> bool:
    """Write JSON under a new key (see :meth:`Storage.create`)."""
    return storage.create(key, _encoded(value))


def update(storage: Storage, key: str, change: Callable[[Any | None], Any]) -> Any:
    """Replace a JSON document by ``change(document)``, None where there is none yet; returns the new one.

    Called again with the newer document when another writer was faster, so ``change`` must have no other
    effect; what it raises leaves the document as it is. A result equal to the document writes nothing.
    """
    for tries in range(_TRIES):
        time.sleep(min(0.005 * 2**tries, 0.5) * secrets.randbelow(1000) / 1000 if tries else 0)
        try:
            stored = storage.read(key)
        except Missing:
            value = change(None)
            if storage.create(key, _encoded(value)):
                return value
            continue
        before = decoded(storage, key, stored)
        value = change(decoded(storage, key, stored))  # decoded again: it may change what it is given
        if value == before or storage.replace(key, _encoded(value), stored.tag):
            return value
    raise RuntimeError(
        f"{storage.location}/{key} was changed by others each of {_TRIES} times it was to be changed"
    )


def _encoded(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decoded(storage: Storage, key: str, stored: Stored) -> Any:
    """What was read under ``key``, as JSON; :class:`UserError` where it is none."""
    try:
        return json.loads(stored.data)
    except ValueError as e:
        where = f"{storage.location}/{key}"
        raise UserError(f"not valid JSON ({e})", where=where, fix="write it again") from None


def check_key(key: str) -> str:
    """The key; :class:`UserError` if it is none."""
    if not _KEY.fullmatch(key):
        raise UserError(f"'{key}' is not a key", fix="a relative path of which no part starts with a dot")
    return key


def folder_of(prefix: str) -> str:
    """The folder that all keys with this prefix are in."""
    folder = prefix.rpartition("/")[0]
    return check_key(folder) if folder else ""


class LocalStorage:
    """A folder, on any file system of POSIX with ``flock``; on several machines where it is mounted."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()

    @property
    def location(self) -> str:
        return str(self.root)

    def read(self, key: str) -> Stored:
        with self._answering():
            try:
                data = (self.root / check_key(key)).read_bytes()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise Missing(key) from None
        return Stored(data, _tag(data))

    def create(self, key: str, data: bytes) -> bool:
        return self._write(key, data, None)

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        return self._write(key, data, tag)

    def delete(self, key: str) -> None:
        path = self.root / check_key(key)
        if not self.root.is_dir():
            return
        with self.locked(), self._answering(), contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            fsync_dir(path.parent)

    def keys(self, prefix: str = "") -> list[str]:
        top = self.root / folder_of(prefix)
        with self._answering():
            found = [Path(where, name) for where, _, names in _walk(top) for name in names]
        keys = (path.relative_to(self.root).as_posix() for path in found)
        return sorted(key for key in keys if key.startswith(prefix))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all writers to this folder."""
        with self._answering():
            make_folder(self.root)
            lock = os.open(self.root / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with self._answering():
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def _write(self, key: str, data: bytes, tag: str | None) -> bool:
        path = self.root / check_key(key)
        with self.locked(), self._answering():
            now = _tag(path.read_bytes()) if path.is_file() else None
            if now != tag:
                return False
            new = self.root / ".new"
            new.unlink(missing_ok=True)  # a dead writer's, whose file it may be
            with open(new, "wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            make_folder(path.parent)
            os.replace(new, path)
            fsync_dir(path.parent)
        return True

    @contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise unavailable(self.location, e.strerror or str(e)) from e


def _walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As ``os.walk``, without what starts with a dot. A folder that cannot be read is an error."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise error

    for where, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield where, folders, [name for name in names if not name.startswith(".")]


def make_folder(path: Path) -> None:
    """Make a folder and those that it is in, to last."""
    missing = [p for p in (path, *path.parents) if not p.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


def _tag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def unavailable(location: str, reason: str) -> UserError:
    """The error of a storage that does not answer, or refuses."""
    return UserError(
        f"the storage cannot be used now ({reason})",
        where=location,
        fix="check that it can be reached, and the rights to it",
        status=503,
        retry_after=_RETRY_SECONDS,
    )
