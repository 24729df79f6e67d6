"""Versions in a folder: ``NAME/versions/0001/`` is a PEFT folder with lineage.json and manifest.json.

A version is prepared in a folder ``.new-...`` beside the others and appears by one rename. Its writer holds a
lock on that folder, so what a dead one left can be told from what a live one is writing.
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

_STAGING = ".new-"


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
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())

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
            lock = _lock(staging)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if lock is not None:
                os.close(lock)

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
        for path in sorted(self.root.glob(f"*/versions/{_STAGING}*")):
            with self._storage.locked():
                lock = _lock(path)
            if lock is None:
                continue
            try:
                size = sum((path / rel).stat().st_size for rel in files_under(path))
                yield Leftover(str(path), size, partial(shutil.rmtree, path, ignore_errors=True))
            finally:
                os.close(lock)

    def _model_files(self, name: str, version: int) -> list[Path]:
        folder = self._folder(name, version)
        return [folder / rel for rel in files_under(folder) if str(rel) not in (MANIFEST, LINEAGE)]

    def _versions(self, name: str) -> Path:
        return self.root / name / "versions"

    def _folder(self, name: str, version: int) -> Path:
        return self._versions(name) / f"{version:04d}"


def _lock(folder: Path) -> int | None:
    """An open lock on a folder; None if another has it, or it is gone."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return fd


def _renamed(staging: Path, to: Path) -> bool:
    """Whether the folder got this name; another writer's version may have it."""
    try:
        os.rename(staging, to)
    except OSError as e:
        if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        return False
    return True
