"""What an adapter version is: an ordinary PEFT folder with its lineage, named by a hash of both."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, sha256_file, sha256_json
from qwen_ray.peft_folder import CONFIG, WEIGHTS, check_adapter

# The same rule guards the API: no slash, no dot first, so no name leads out of the registry.
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MANIFEST, LINEAGE = "manifest.json", "lineage.json"
Files = dict[str, dict[str, Any]]
"""Relative posix path -> {"sha256", "size" in bytes}."""


@dataclass(frozen=True)
class AdapterVersion:
    """One published version."""

    name: str
    version: int
    folder: Path
    """Where its files are, or will be once :attr:`path` was asked for."""
    lineage: dict[str, Any]
    digest: str
    """Hex SHA-256 of the files' hashes and the lineage: the same content has the same digest."""
    fetch: Callable[[], None] | None = field(default=None, compare=False, repr=False)

    @property
    def ref(self) -> str:
        """``name@version``, as the API spells it."""
        return f"{self.name}@{self.version}"

    @property
    def path(self) -> Path:
        """The PEFT folder on this machine; from an object store it is copied here first, and checked."""
        if self.fetch is not None:
            self.fetch()
        return self.folder


@dataclass(frozen=True)
class Document:
    """What is kept of a version for ever, also when its files are gone. ``at``: when it was published (ISO,
    UTC). ``content``: where an object store has its files."""

    files: Files
    lineage: dict[str, Any]
    at: str
    digest: str
    content: str = ""

    @property
    def size(self) -> int:
        """Bytes of the adapter's files."""
        return sum(int(facts["size"]) for rel, facts in self.files.items() if rel != LINEAGE)


@dataclass(frozen=True)
class Leftover:
    """What a writer that died left behind."""

    what: str
    size: int
    remove: Callable[[], None]


class VersionFiles(Protocol):
    """Where versions lie: folders, or an object store."""

    root: Path
    """The local folder below which all files of all versions are."""

    def names(self) -> list[str]:
        """Everything that has a version, removed ones included; sorted."""

    def numbers(self, name: str) -> list[int]:
        """Every version ever published, ascending."""

    def document(self, name: str, version: int) -> Document | None:
        """What is known of a version; None if there never was one."""

    def publish(
        self, name: str, adapter: Path, lineage: dict[str, Any], *, at: str, after: int, same: Same
    ) -> int:
        """Add the version after ``after``, or a later one if other writers are faster; the number of theirs
        if ``same`` accepts it."""

    def open(self, name: str, version: int, document: Document) -> AdapterVersion:
        """A version to be read."""

    def remove(self, name: str, version: int, document: Document) -> int:
        """Delete the files and keep the document. Returns the bytes of what was there."""

    def held(self, name: str, version: int, document: Document) -> int:
        """The bytes of the files that are there."""

    def leftovers(self, hours: float) -> Iterable[Leftover]:
        """What dead writers left; where that cannot be told from a live one's, what is older than this."""


Same = Callable[[int, Document], bool]
"""Whether this version is what is being published."""


def files_of(adapter: Path) -> list[Path]:
    """The files of a PEFT folder that become a version's, relative to it."""
    check_adapter(adapter, CONFIG, WEIGHTS, fix="name the adapter/ folder of a training run")
    return [rel for rel in files_under(adapter) if rel.name not in (MANIFEST, LINEAGE)]


def hashed(folder: Path, files: Iterable[Path]) -> Files:
    """The hashes and sizes of files below a folder."""
    return {
        rel.as_posix(): {"sha256": sha256_file(folder / rel), "size": (folder / rel).stat().st_size}
        for rel in files
    }


def digest_of(files: Files, lineage: dict[str, Any]) -> str:
    """What names a version's content."""
    hashes = {rel: facts["sha256"] for rel, facts in files.items() if rel != LINEAGE}
    return sha256_json({"files": hashes, "lineage": lineage})


def check_lineage(lineage: Any, adapter: Path) -> None:
    """:class:`UserError` where a lineage does not name its base: ``base`` with ``id`` and ``fingerprint``."""
    base = lineage.get("base") if isinstance(lineage, dict) else None
    for key in ("fingerprint", "id"):
        if not isinstance(base, dict) or not base.get(key) or not isinstance(base[key], str):
            raise UserError(
                f"lineage has no base {key}", where=str(adapter), fix="train with qwen-ray, or add it"
            )


def check_files(folder: Path, files: Files) -> None:
    """:class:`UserError` (409) names the first file that is not what was published."""
    for rel, want in files.items():
        path = folder / rel
        if not path.is_file() or sha256_file(path) != want["sha256"]:
            raise UserError("damaged or missing file in a registered adapter", where=str(path), status=409)


def parents_of(lineage: dict[str, Any]) -> list[str]:
    """The versions (``NAME@VERSION``) that a lineage says it was made from."""
    given = [*(lineage.get("parents") or []), lineage.get("parent")]
    return [ref for ref in dict.fromkeys(given) if isinstance(ref, str) and parse_ref(ref) is not None]


def parse_ref(ref: str) -> tuple[str, int] | None:
    """``NAME@VERSION`` in two; None for anything else."""
    name, _, number = ref.partition("@")
    return (name, int(number)) if NAME.fullmatch(name) and number.isdecimal() else None
