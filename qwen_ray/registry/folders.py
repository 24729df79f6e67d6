"""Versions in a folder: ``NAME/versions/0001/`` is a PEFT folder with lineage.json and manifest.json.

A version is prepared in a folder ``.new-...`` beside the others and appears by one rename. Its writer holds a
lock on a file ``.lock-...`` of the same ending, so what a dead one left can be told from what a live one is
writing. It is not a lock on the folder: shared file systems pass on locks of regular files only.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ray.fsio import files_under, fsync_dir, fsync_tree, read_json, write_json
from qwen_ray.registry.version import (
    LINEAGE,
    MANIFEST,
    NAME,
    AdapterVersion,
    Document,
    Files,
    Leftover,
    Same,
    digest_of,
    files_of,
    hashed,
)
from qwen_ray.storage import LocalStorage, make_folder

_STAGING, _LOCK = ".new-", ".lock-"


class Folders:
    """Implements :class:`~qwen_ray.registry.version.VersionFiles` below a folder."""

    def __init__(self, storage: LocalStorage) -> None:
        self._storage = storage
        self.root = storage.root

    def names(self) -> list[str]:
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if NAME.fullmatch(p.name) and self.numbers(p.name))

    def numbers(self, name: str) -> list[int]:
        folder = self._versions(name)
        if not folder.is_dir():
            return []
        return sorted(
            int(p.name) for p in folder.iterdir() if p.name.isdecimal() and (p / MANIFEST).is_file()
        )

    def document(self, name: str, version: int) -> Document | None:
        path = self._folder(name, version)
        if not (path / MANIFEST).is_file():
            return None
        manifest, lineage = read_json(path / MANIFEST), read_json(path / LINEAGE)
        files: Files = manifest["files"]
        return Document(files, lineage, manifest["published_at"], digest_of(files, lineage))

    def publish(
        self, name: str, adapter: Path, lineage: dict[str, Any], *, at: str, after: int, same: Same
    ) -> int:
        folder = self._versions(name)
        with self._staging(folder) as staging:
            for rel in files_of(adapter):
                (staging / rel).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(adapter / rel, staging / rel)
            write_json(staging / LINEAGE, lineage)
            files = hashed(staging, files_under(staging))
            write_json(staging / MANIFEST, {"files": files, "published_at": at})
            fsync_tree(staging)
            staging.chmod(0o755)
            number = after + 1
            while not _renamed(staging, self._folder(name, number)):
                other = self.document(name, number)
                if other is not None and same(number, other):
                    return number
                number += 1
            fsync_dir(folder)
            return number

    @contextmanager
    def _staging(self, folder: Path) -> Iterator[Path]:
        """A new folder that is ours until the block ends; gone then, unless it was renamed."""
        for leftover in self.leftovers():
            leftover.remove()
        with self._storage.locked():  # between the two nobody may take it for a dead writer's
            make_folder(folder)
            staging = Path(tempfile.mkdtemp(dir=folder, prefix=_STAGING))
            lock = _Lock(staging)
            lock.take()
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            lock.remove()

    def open(self, name: str, version: int, document: Document) -> AdapterVersion:
        folder = self._folder(name, version)
        return AdapterVersion(name, version, folder, document.lineage, document.digest)

    def held(self, name: str, version: int, document: Document) -> int:
        return sum(path.stat().st_size for path in self._model_files(name, version))

    def remove(self, name: str, version: int, document: Document) -> int:
        size = self.held(name, version, document)
        for path in self._model_files(name, version):
            path.unlink(missing_ok=True)
        fsync_dir(self._folder(name, version))
        return size

    def leftovers(self, hours: float = 0) -> Iterator[Leftover]:
        found = {*self.root.glob(f"*/versions/{_STAGING}*")}
        found |= {_named(path, _LOCK, _STAGING) for path in self.root.glob(f"*/versions/{_LOCK}*")}
        for path in sorted(found):
            lock = _Lock(path)
            with self._storage.locked():
                if not lock.take():
                    continue
            try:
                if path.is_dir():
                    size = sum((path / rel).stat().st_size for rel in files_under(path))
                    yield Leftover(str(path), size, partial(shutil.rmtree, path, ignore_errors=True))
            finally:
                lock.remove()

    def _model_files(self, name: str, version: int) -> list[Path]:
        folder = self._folder(name, version)
        return [folder / rel for rel in files_under(folder) if str(rel) not in (MANIFEST, LINEAGE)]

    def _versions(self, name: str) -> Path:
        return self.root / name / "versions"

    def _folder(self, name: str, version: int) -> Path:
        return self._versions(name) / f"{version:04d}"


class _Lock:
    """What the writer of a staging folder holds: a lock on a regular file beside it."""

    def __init__(self, staging: Path) -> None:
        self._path = _named(staging, _STAGING, _LOCK)
        self._fd = -1

    def take(self) -> bool:
        """Whether it is ours now. To be called under the storage's lock, as no writer has its folder and not
        yet its lock then."""
        self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            return False
        return True

    def remove(self) -> None:
        """Let go of it. A folder without the file has no writer."""
        self._path.unlink(missing_ok=True)
        os.close(self._fd)


def _named(path: Path, before: str, after: str) -> Path:
    """The path beside this one with the other start of the name."""
    return path.with_name(after + path.name.removeprefix(before))


def _renamed(staging: Path, to: Path) -> bool:
    """Whether the folder got this name; another writer's version may have it."""
    try:
        os.rename(staging, to)
    except OSError as e:
        if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True
