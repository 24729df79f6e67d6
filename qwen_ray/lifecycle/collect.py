"""Collecting: what the sources hold now, copied into the work folder under the hash of its content.

A copy does not change while a run goes on, whatever is written to its source meanwhile; and the same content
is copied once.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qwen_ray.data.sources import get_source
from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, fsync_dir, fsync_tree
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.state import digest
from qwen_ray.storage import Storage, is_uri, open_storage

COLLECTED = "collected"
_HUB = re.compile(r"hub|[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Item:
    """One path of a source. ``sha256`` is of its content; None for a data set of the hub, which is a name."""

    domain: str
    source: str
    path: str
    sha256: str | None


def look(spec: PipelineSpec) -> Iterator[Item]:
    """What the sources of every domain hold now. What is in an object store is fetched for that.

    Raises :class:`UserError` for a path or pattern that finds nothing.
    """
    for domain, settings in sorted(spec.data.items()):
        for source, given in sorted(settings["sources"].items()):
            for pattern in [given] if isinstance(given, str) else given:
                yield from _look(spec, domain, source, str(pattern))


def _look(spec: PipelineSpec, domain: str, source: str, pattern: str) -> Iterator[Item]:
    if is_uri(pattern):
        folder = _fetch(spec, open_storage(pattern))
        # The source `file` reads one file at a time, the others their own folders.
        for one in [folder / rel for rel in files_under(folder)] if source == "file" else [folder]:
            yield Item(domain, source, str(one), digest(one))
        return
    found = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    for path in found:
        yield Item(domain, source, str(Path(path).resolve()), digest(Path(path)))
    if found:
        return
    if "network" in get_source(source).requires and _HUB.fullmatch(pattern):
        yield Item(domain, source, pattern, None)
        return
    raise UserError(
        "there is nothing here", where=f"data.{domain}.sources.{source}: {pattern}", fix="check the path"
    )


def copy(spec: PipelineSpec, item: Item) -> Path:
    """The item's copy in the work folder, made unless it is there. It keeps its name: records have it in
    their ids."""
    assert item.sha256 is not None
    path = Path(item.path)
    target = spec.folder(COLLECTED, item.sha256[:32], path.name)
    if path == target or (target.exists() and digest(target) == item.sha256):
        return target
    with _appearing(target) as new:
        if path.is_dir():
            shutil.copytree(path, new)
        else:
            shutil.copyfile(path, new)
        if digest(new) != item.sha256:
            raise RuntimeError(f"{path} changed while it was copied")
    return target


def _fetch(spec: PipelineSpec, storage: Storage) -> Path:
    """What an object store holds below a URI, as a folder named by its content."""
    keys = storage.keys()
    if not keys:
        raise UserError("there is nothing here", where=storage.location, fix="check the URI")
    spec.folder(COLLECTED).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=spec.folder(COLLECTED), prefix=".fetched-") as scratch:
        whole = Path(scratch, "whole")
        for key in keys:
            file = whole / key
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(storage.read(key).data)
        target = spec.folder(COLLECTED, digest(whole)[:32], storage.location.rpartition("/")[2])
        if not target.exists():
            with _appearing(target) as new:
                whole.rename(new)
    return target


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A path to write a file or folder at, which then takes the name ``target``; what had it goes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=".new-"))
    try:
        new = scratch / target.name
        yield new
        if new.is_dir():
            fsync_tree(new)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(new, target)
        fsync_dir(target.parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
