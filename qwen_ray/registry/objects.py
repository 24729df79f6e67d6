"""Versions in an object store, which has no rename, and their copies on this machine.

A version's files are put under ``NAME/content/DIGEST/ATTEMPT/``, a prefix of their own. Then one conditional
write, ``NAME/versions/0001.json``, makes them a version. To be read they are copied to a cache folder, each
checked against its SHA-256; the copy appears by one rename, whatever other processes do.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import fsync_tree, write_json
from qwen_ray.object_storage import ObjectStorage
from qwen_ray.registry.version import (
    LINEAGE,
    MANIFEST,
    NAME,
    AdapterVersion,
    Document,
    Leftover,
    Same,
    check_files,
    digest_of,
    files_of,
    hashed,
)
from qwen_ray.storage import Missing, check_key, create_document, read_document

CACHE = "QWEN_RAY_CACHE"
"""Environment variable: the folder of local copies (``~/.cache/qwen-ray``)."""
_VERSION = re.compile(r"([^/]+)/versions/(\d+)\.json")
_TIME = "%Y%m%dT%H%M%S"


def cache_folder() -> Path:
    """Where local copies of what object stores hold may lie."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.environ.get(CACHE) or Path(base) / "qwen-ray").expanduser().resolve()


class Objects:
    """Implements :class:`~qwen_ray.registry.version.VersionFiles` in an object store."""

    def __init__(self, storage: ObjectStorage) -> None:
        self._storage = storage
        place = hashlib.sha256(storage.location.encode()).hexdigest()[:16]
        self.root = cache_folder() / "registry" / place
        self._documents: dict[str, Document] = {}  # they never change

    def names(self) -> list[str]:
        found = (_VERSION.fullmatch(key) for key in self._storage.keys(""))
        return sorted({match[1] for match in found if match and NAME.fullmatch(match[1])})

    def numbers(self, name: str) -> list[int]:
        found = (_VERSION.fullmatch(key) for key in self._storage.keys(f"{name}/versions/"))
        return sorted(int(match[2]) for match in found if match)

    def document(self, name: str, version: int) -> Document | None:
        key = _key(name, version)
        if key not in self._documents:
            try:
                self._documents[key] = Document(**read_document(self._storage, key))
            except Missing:
                return None
        return self._documents[key]

    def publish(
        self, name: str, adapter: Path, lineage: dict[str, Any], *, at: str, after: int, same: Same
    ) -> int:
        files = hashed(adapter, files_of(adapter))
        digest = digest_of(files, lineage)
        # Nobody else's, not even where the content is the same: so nobody else needs it, or removes it.
        attempt = f"{datetime.now(UTC).strftime(_TIME)}-{secrets.token_hex(4)}"
        content = f"{name}/content/{digest}/{attempt}"
        mine = Document(files, lineage, at, digest, content)
        for rel in files:
            self._storage.upload(f"{content}/{rel}", adapter / rel)
        number = after + 1
        while not create_document(self._storage, _key(name, number), asdict(mine)):
            other = self.document(name, number)
            if other == mine:  # ours; the answer was lost
                break
            if other is not None and same(number, other):
                self._delete(content)
                break
            number += 1
        return number

    def open(self, name: str, version: int, document: Document) -> AdapterVersion:
        folder = self.root / name / f"{version:04d}-{document.digest[:16]}"
        fetch = partial(self._fetch, folder, document)
        return AdapterVersion(name, version, folder, document.lineage, document.digest, fetch)

    def _fetch(self, folder: Path, document: Document) -> None:
        """Have a whole copy in ``folder``; one whose sizes are wrong is made again."""
        keys = {rel: check_key(f"{document.content}/{rel}") for rel in document.files}  # none leads elsewhere
        if folder.is_dir():
            sizes = {rel: (folder / rel).stat().st_size for rel in document.files if (folder / rel).is_file()}
            if sizes == {rel: facts["size"] for rel, facts in document.files.items()}:
                return
            shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".new-"))
        try:
            for rel, key in keys.items():
                (staging / rel).parent.mkdir(parents=True, exist_ok=True)
                self._storage.download(key, staging / rel)
            check_files(staging, document.files)
            write_json(staging / LINEAGE, document.lineage)
            write_json(staging / MANIFEST, {"files": document.files, "published_at": document.at})
            fsync_tree(staging)
            staging.chmod(0o755)
            with contextlib.suppress(OSError):  # another process was faster, with the same files
                staging.rename(folder)
        except Missing as e:
            where = f"{self._storage.location}/{e.args[0]}"
            raise UserError("missing file in a registered adapter", where=where, status=409) from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        if not folder.is_dir():
            raise UserError("this cache folder cannot be written", where=str(folder), fix=f"set {CACHE}")

    def held(self, name: str, version: int, document: Document) -> int:
        there = self._storage.keys(f"{document.content}/")
        sizes = {f"{document.content}/{rel}": int(facts["size"]) for rel, facts in document.files.items()}
        return sum(sizes.get(key, 0) for key in there)

    def remove(self, name: str, version: int, document: Document) -> int:
        size = self.held(name, version, document)
        self._delete(document.content)
        shutil.rmtree(self.open(name, version, document).folder, ignore_errors=True)
        return size

    def leftovers(self, hours: float) -> Iterator[Leftover]:
        keys = self._storage.keys()
        used = set()
        for key in keys:
            if match := _VERSION.fullmatch(key):
                document = self.document(match[1], int(match[2]))
                used.add(document.content if document else "")
        attempts = {"/".join(key.split("/")[:4]) for key in keys if key.split("/")[1:2] == ["content"]}
        youngest = (datetime.now(UTC) - timedelta(hours=hours)).strftime(_TIME)
        for content in sorted(attempts - used):
            if content.rpartition("/")[2][: len(youngest)] <= youngest:
                yield Leftover(content, 0, partial(self._delete, content))

    def _delete(self, content: str) -> None:
        for key in self._storage.keys(f"{content}/"):
            self._storage.delete(key)


def _key(name: str, version: int) -> str:
    return f"{name}/versions/{version:04d}.json"
