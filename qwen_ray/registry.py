"""Adapter versions on disk: immutable once published, found by name, alias or number.

Layout::

    ROOT/NAME/versions/0001/          an ordinary PEFT folder + lineage.json + manifest.json
    ROOT/NAME/aliases/production.json {"version": 1, "log": [{"version", "at", "reason"}, ...]}

A version is prepared in a temporary folder and appears by one rename; an alias and its log are one file,
replaced by one rename. A crash at any point leaves the old state or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, fsync_dir, fsync_tree, read_json, sha256_file, write_json

# The same rule guards the API: no slash, no dot first, so no name leads out of the registry.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MANIFEST, LINEAGE = "manifest.json", "lineage.json"
PRODUCTION = "production"


@dataclass(frozen=True)
class AdapterVersion:
    """One published version. ``path`` is a PEFT folder."""

    name: str
    version: int
    path: Path
    lineage: dict[str, Any]

    @property
    def ref(self) -> str:
        """``name@version``, as the API spells it."""
        return f"{self.name}@{self.version}"


class Registry:
    """The versions and aliases under one root folder. Several processes may use it at once."""

    def __init__(self, root: Path | str) -> None:
        if "://" in str(root):
            raise UserError(
                "a registry is a local or mounted folder", where=str(root), fix="give a path, not a URI"
            )
        self.root = Path(root).expanduser().resolve()

    def names(self) -> list[str]:
        """Every adapter name with at least one version."""
        if not self.root.is_dir():
            return []
        return sorted(p.name for p in self.root.iterdir() if NAME.fullmatch(p.name) and self.versions(p.name))

    def versions(self, name: str) -> list[int]:
        """The published version numbers of ``name``, ascending; empty when there is none."""
        folder = self._folder(name) / "versions"
        if not folder.is_dir():
            return []
        return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and (p / MANIFEST).is_file())

    def publish(self, name: str, adapter: Path, lineage: dict[str, Any]) -> AdapterVersion:
        """Copy a PEFT folder in as the next version of ``name`` and return it.

        ``lineage`` must hold ``base`` (``{"id", "fingerprint"}``); the rest is free.
        """
        base = lineage.get("base")
        if not isinstance(base, dict) or not base.get("fingerprint"):
            raise UserError(
                "lineage has no base fingerprint", where=str(adapter), fix="train with qwen-ray, or add it"
            )
        for required in ("adapter_config.json", "adapter_model.safetensors"):
            if not (adapter / required).is_file():
                raise UserError(f"not a PEFT adapter folder: {required} is missing", where=str(adapter))
        folder = self._folder(name) / "versions"
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=folder, prefix=".new-"))
        try:
            for rel in files_under(adapter):
                if rel.name not in (MANIFEST, LINEAGE):
                    (staging / rel).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(adapter / rel, staging / rel)
            write_json(staging / LINEAGE, lineage)
            files = {
                str(rel): {"sha256": sha256_file(staging / rel), "size": (staging / rel).stat().st_size}
                for rel in files_under(staging)
            }
            write_json(staging / MANIFEST, {"files": files, "published_at": _now()})
            fsync_tree(staging)
            staging.chmod(0o755)
            number = self._claim(staging, folder, after=max(self.versions(name), default=0))
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return self.get(name, number)

    @staticmethod
    def _claim(staging: Path, folder: Path, *, after: int) -> int:
        """Rename the staged folder to the first free number; another writer may win one meanwhile."""
        number = after + 1
        while True:
            try:
                os.rename(staging, folder / f"{number:04d}")
            except OSError as e:
                if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                number += 1
            else:
                fsync_dir(folder)
                return number

    def get(self, name: str, version: int) -> AdapterVersion:
        """One version by number; :class:`UserError` (HTTP 404) when there is none."""
        path = self._folder(name) / "versions" / f"{version:04d}"
        if not (path / MANIFEST).is_file():
            have = self.versions(name)
            fix = f"published: {', '.join(map(str, have))}" if have else self._known()
            raise UserError(
                f"adapter '{name}' has no version {version}", where=str(self.root), fix=fix, status=404
            )
        return AdapterVersion(name, version, path, read_json(path / LINEAGE))

    def resolve(self, name: str, at: str | None = None) -> AdapterVersion:
        """``name`` at a version number or alias; without one, at ``production``.

        Raises :class:`UserError` with HTTP status 404 for anything that is not in the registry.
        """
        if not self.versions(name):
            raise UserError(f"unknown adapter '{name}'", where=str(self.root), fix=self._known(), status=404)
        at = at or PRODUCTION
        if at.isdigit():
            return self.get(name, int(at))
        version = self.aliases(name).get(at)
        if version is None:
            have = ", ".join(f"{name}@{v}" for v in self.versions(name))
            raise UserError(
                f"adapter '{name}' has no '{at}' version",
                where=str(self.root),
                fix=f"name one of: {have}",
                status=404,
            )
        return self.get(name, version)

    def aliases(self, name: str) -> dict[str, int]:
        """Alias to version number."""
        folder = self._folder(name) / "aliases"
        return {p.stem: int(read_json(p)["version"]) for p in sorted(folder.glob("[!.]*.json"))}

    def point(self, name: str, alias: str, version: int, *, reason: str) -> None:
        """Move ``alias`` to ``version``, with the reason in its log, in one atomic step."""
        if not NAME.fullmatch(alias) or alias.isdigit():
            raise UserError(
                f"'{alias}' is not an alias", fix="lower-case letters, digits, dot, dash; not a number"
            )
        self.get(name, version)
        path = self._folder(name) / "aliases" / f"{alias}.json"
        log = read_json(path)["log"] if path.is_file() else []
        entry = {"version": version, "at": _now(), "reason": reason}
        write_json(path, {"version": version, "log": [*log, entry]})

    def verify(self, adapter: AdapterVersion) -> None:
        """Check every file against the manifest; :class:`UserError` names the first that differs."""
        for rel, want in read_json(adapter.path / MANIFEST)["files"].items():
            path = adapter.path / rel
            if not path.is_file() or sha256_file(path) != want["sha256"]:
                raise UserError(
                    "damaged or missing file in a registered adapter", where=str(path), status=409
                )

    def _folder(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise UserError(
                f"'{name}' is not an adapter name",
                fix="at most 64 lower-case letters, digits, '.', '_', '-', the first a letter or digit",
                status=404,
            )
        return self.root / name

    def _known(self) -> str:
        names = self.names()
        return (
            f"registered: {', '.join(names)}" if names else "the registry is empty; register an adapter first"
        )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
