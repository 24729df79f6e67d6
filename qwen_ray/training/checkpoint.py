"""Checkpoints: a folder that is complete when its manifest is there, and verified before it is used.

Layout: ``adapter/`` (a PEFT folder) or ``model/`` (a Hugging Face folder), ``optimizer.pt``,
``manifest.json`` with step, data state, RNG rule, configuration hash, versions, and the size and SHA-256 of
every file. With LoRA and data parallelism nothing in it depends on the number of workers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, fsync_tree, read_json, sha256_file, write_json

MANIFEST = "manifest.json"


class CheckpointStore(Protocol):
    """Where the loop's checkpoints go. Every rank calls both methods, in the same order."""

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        """The newest complete checkpoint as a local folder, or None."""

    def save(self, step: int, write: Callable[[Path], None] | None, metrics: dict[str, Any]) -> None:
        """Store what ``write`` puts into an empty folder (None on ranks that have nothing to write)."""


class LocalStore:
    """Checkpoints in ``ROOT/step-00000100/``, written aside and renamed into place; the newest are kept."""

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root, self.keep = root, keep

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        complete = self._complete()
        yield complete[-1] if complete else None

    def save(self, step: int, write: Callable[[Path], None] | None, metrics: dict[str, Any]) -> None:
        if write is None:
            return
        final = self.root / f"step-{step:08d}"
        staging = self.root / f".step-{step:08d}"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        write(staging)
        fsync_tree(staging)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        for old in self._complete()[: -self.keep]:
            shutil.rmtree(old)

    def _complete(self) -> list[Path]:
        return sorted(p for p in self.root.glob("step-*") if (p / MANIFEST).is_file())


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of everything in ``folder``: last, so that its presence means complete."""
    files = {
        str(rel): {"sha256": sha256_file(folder / rel), "size": (folder / rel).stat().st_size}
        for rel in files_under(folder)
    }
    write_json(folder / MANIFEST, {**manifest, "files": files})


def verify(folder: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against its manifest and return the manifest."""
    manifest: dict[str, Any] = read_json(folder / MANIFEST)
    for rel, want in manifest["files"].items():
        path = folder / rel
        if not path.is_file() or path.stat().st_size != want["size"] or sha256_file(path) != want["sha256"]:
            raise UserError(
                "damaged checkpoint: this file is missing or differs from its checksum",
                where=str(path),
                fix="remove the checkpoint's folder to go on from the one before it, or use a new --out",
            )
    return manifest
