"""Checkpoints: a folder that is complete when its manifest is there, and verified before it is used.

Layout of ``step-00000100/``: ``state/`` (trained weights and optimizer state, a file a rank, see
:mod:`qwen_ray.training.shards`, or DeepSpeed's own), ``adapter/`` (a PEFT folder, with LoRA) and
``manifest.json``: step, data state, configuration hash, versions, number of ranks, and the size and SHA-256
of every file.

Ranks write side by side and never wait for one another: each puts its files into a staging folder and then
a note with their checksums; rank 0 sees all notes, writes the manifest and renames the folder. So a rank
whose storage fails strands nobody, and all of it can happen while the next steps are computed.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, fsync_dir, fsync_tree, sha256_file, sha256_json, write_json

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_POLL_SECONDS = 0.02
_SHOWS_SECONDS = 60.0
"""How long storage over a network may take to show on one node what another wrote: as NFS does by default."""
Write = Callable[[Path], None]


class Ranks(Protocol):
    """The part of a strategy that a store needs."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""


class CheckpointStore:
    """Checkpoints in ``ROOT/step-00000100/``, on storage that all ranks share; the newest are kept.

    Every rank makes one and calls its methods in the same order. Raises :class:`UserError`, on all ranks, if
    they do not see the same ``root``.
    """

    def __init__(self, root: Path, ranks: Ranks, *, keep: int, asynchronous: bool = False) -> None:
        self.root, self.keep = root, keep
        self.protected: set[int] = set()
        """Steps whose checkpoints are kept beside the newest."""
        self._ranks, self._asynchronous = ranks, asynchronous
        self._pending: threading.Thread | None = None
        self._staging: Path | None = None  # of the save under way
        self._failure: str | None = None  # this rank's, of the save under way
        self._abandoned = threading.Event()
        self.start: str = ranks.gather(uuid.uuid4().hex[:8])[0]
        """Of this start of the ranks. Staging folders are named by it: a killed start's still hold notes."""
        if ranks.rank == 0:
            for left in root.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        if ranks.world_size > 1:
            self._check_shared()

    def _check_shared(self) -> None:
        mark = self.root / f".step-{self.start}"  # where a kill leaves it, the next start removes it
        if self._ranks.rank == 0:
            with contextlib.suppress(OSError):  # a full disk costs checkpoints, not the run
                mark.mkdir(parents=True)
        if not self._ranks.gather(self._ranks.rank == 0 and os.path.isdir(mark))[0]:
            return
        seen = self._ranks.gather(_shows(mark))
        if self._ranks.rank == 0:
            with contextlib.suppress(OSError):
                mark.rmdir()
        if not all(seen):
            raise UserError(
                "the run's folder is not on storage that all workers mount: "
                f"what rank 0 writes there rank {seen.index(False)} does not see",
                where=str(self.root.parent),
                fix="an --out folder on storage that every node mounts at the same path",
            )

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest complete and undamaged checkpoint with its manifest; damaged ones are named and skipped.

        Raises :class:`UserError` if there are checkpoints and all are damaged.
        """
        # Rank 0's listing: another's view of shared storage may be older.
        names = self._ranks.gather([p.name for p in complete(self.root)])[0]
        damages = []
        for name in reversed(names):
            folder = self.root / name
            problem = next((p for p in self._ranks.gather(self._look(folder)) if p), None)
            if problem is None:
                return folder, read_manifest(folder)
            damages.append(problem)
            log.warning("skipping a damaged checkpoint: %s", problem)
        if damages:
            raise UserError(
                f"every checkpoint of this run is damaged: {damages[0]}",
                where=str(self.root),
                fix="restore the folder from a copy, remove it to start over, or choose a new --out",
            )
        return None

    def folder(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, if there is one."""
        return self.root / f"step-{step:08d}"

    def check(self, step: int) -> Path:
        """The folder of ``step``, each rank having verified its share; called on every rank.

        Raises :class:`UserError`, on all ranks alike, if it is damaged or not there.
        """
        folder = self.folder(step)
        problem = next((p for p in self._ranks.gather(self._look(folder)) if p), None)
        if problem is not None:
            raise UserError(
                f"the checkpoint of step {step} cannot be used: {problem}",
                where=str(folder),
                fix="restore it from a copy, or train into a new --out folder",
            )
        return folder

    def _look(self, folder: Path) -> str | None:
        """What is wrong with this rank's share of the files, if anything."""
        try:
            verify(folder, share=(self._ranks.rank, self._ranks.world_size))
        except (UserError, OSError) as e:
            return str(e).splitlines()[0] + f" ({getattr(e, 'where', folder)})"
        return None

    def save(self, step: int, write: Write, manifest: dict[str, Any]) -> str | None:
        """Store what the ranks' ``write`` put into an empty folder; called on every rank.

        Asynchronous: returns None at once, writes meanwhile, and :meth:`settle` tells of a failure. Else
        returns the failure, if any. Either way it leaves the older checkpoints as they are.
        """
        self.settle()
        staging = self._staging = self.root / f".step-{step:08d}-{self.start}"
        own = staging / f"part-{self._ranks.rank:05d}"
        self._abandoned.clear()

        def guard(work: Callable[[], None]) -> None:
            try:
                work()
            except BaseException as e:
                if self._failure is None:
                    self._failure = f"rank {self._ranks.rank}: {type(e).__name__}: {e}"
                    log.error("the checkpoint of step %d was not written: %s", step, self._failure)

        def write_own() -> None:
            write(own)
            fsync_tree(own)
            write_json(staging / f".note-{self._ranks.rank:05d}.json", _sums(own))

        def commit() -> None:
            if self._asynchronous:
                guard(lambda: own.mkdir(parents=True))
                if self._failure is None:
                    guard(write_own)
            if self._ranks.rank == 0 and self._failure is None:
                guard(lambda: self._commit(staging, step, manifest))

        if not self._asynchronous:
            # In step, as what writes may talk to the other ranks: so either all write or none does.
            guard(lambda: own.mkdir(parents=True))
            if not any(self._ranks.gather(self._failure)):
                guard(write_own)
        self._pending = threading.Thread(target=commit, name=f"checkpoint-{step}", daemon=True)
        self._pending.start()
        return None if self._asynchronous else self.settle()

    def _commit(self, staging: Path, step: int, manifest: dict[str, Any]) -> None:
        files: dict[str, Any] = {}
        ranks = range(self._ranks.world_size)
        for rank in ranks:
            files |= self._note(staging / f".note-{rank:05d}.json")
        for rank in ranks:
            _merge(staging / f"part-{rank:05d}", staging)
            (staging / f".note-{rank:05d}.json").unlink()
        seal(staging, {**manifest, "step": step, "world_size": self._ranks.world_size}, files)
        final = self.folder(step)
        shutil.rmtree(final, ignore_errors=True)
        staging.rename(final)
        fsync_dir(self.root)
        # A later one was damaged when this start skipped it: it must not push out those that are good.
        earlier = [p for p in complete(self.root) if step_of(p) <= step]
        for old in [p for p in earlier if step_of(p) not in self.protected][: -self.keep]:
            try:
                shutil.rmtree(old)
            except OSError as e:  # this one is written all the same
                log.warning("cannot remove %s: %s", old, e)

    def _note(self, path: Path) -> dict[str, Any]:
        """A rank's checksums, once it has written its files."""
        while True:
            try:
                return dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):
                if self._abandoned.wait(_POLL_SECONDS):
                    raise OSError("another rank could not write its part") from None

    def settle(self) -> str | None:
        """Wait for an asynchronous :meth:`save` to end on all ranks; the first rank's failure, or None."""
        if self._pending is None:
            return None
        if self._ranks.rank > 0:
            self._pending.join()
        # Rank 0 may be waiting for the note of a rank that cannot write one.
        told = [f for f in self._ranks.gather(self._failure if self._ranks.rank > 0 else None) if f]
        if told:
            self._abandoned.set()
        self._pending.join()
        self._pending = None
        told += [f for f in self._ranks.gather(self._failure) if f]
        self._failure = None
        if told and self._ranks.rank == 0 and self._staging is not None:
            shutil.rmtree(self._staging, ignore_errors=True)  # it may be what fills the disk
        return told[0] if told else None

    def close(self) -> None:
        """Let a write end whose fate :meth:`settle` will not tell. Without other ranks, which may be lost."""
        if self._pending is not None and self._ranks.world_size == 1:
            self._pending.join()


def complete(root: Path) -> list[Path]:
    """The complete checkpoints in ``root``, oldest first."""
    return sorted(p for p in root.glob("step-" + "[0-9]" * 8) if (p / MANIFEST).is_file())


def _shows(folder: Path) -> bool:
    """Whether ``folder``, which rank 0 has just made, is seen here."""
    deadline = time.monotonic() + _SHOWS_SECONDS
    while not os.path.isdir(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def step_of(folder: Path) -> int:
    """The step after which a checkpoint was taken."""
    return int(folder.name.removeprefix("step-"))


def seal(folder: Path, manifest: dict[str, Any], files: dict[str, Any] | None = None) -> None:
    """Write the manifest of ``folder``: last, so that its presence means complete."""
    content = {**manifest, "files": _sums(folder) if files is None else files}
    write_json(folder / MANIFEST, {**content, "sha256": sha256_json(content)})


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint; :class:`UserError` if its own checksum says it was changed."""
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        content = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = manifest["sha256"] == sha256_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        intact = False
    if not intact:
        raise _damaged(path)
    return content


def verify(folder: Path, *, share: tuple[int, int] = (0, 1)) -> dict[str, Any]:
    """Check files of a checkpoint against its manifest, and return the manifest.

    ``share`` = (rank, ranks): every so many files from the rank-th, so that ranks divide the reading.
    """
    manifest = read_manifest(folder)
    for rel, want in sorted(manifest["files"].items())[share[0] :: share[1]]:
        path = folder / rel
        if not path.is_file() or path.stat().st_size != want["size"] or sha256_file(path) != want["sha256"]:
            raise _damaged(path)
    return manifest


def _damaged(path: Path) -> UserError:
    return UserError(
        f"damaged checkpoint: {path.name} is missing or differs from its checksum",
        where=str(path),
        fix="remove the checkpoint's folder to go on from the one before it, or use a new --out",
    )


def _sums(folder: Path) -> dict[str, Any]:
    return {
        str(rel): {"sha256": sha256_file(folder / rel), "size": (folder / rel).stat().st_size}
        for rel in files_under(folder)
    }


def _merge(source: Path, target: Path) -> None:
    """Move the tree ``source`` into ``target``, joining folders."""
    for rel in files_under(source):
        (target / rel).parent.mkdir(parents=True, exist_ok=True)
        (source / rel).rename(target / rel)
    shutil.rmtree(source)
