"""Data sets of the Hugging Face hub, by ``datasets`` or as files that were downloaded before.

``--source NAME=hub`` streams the set from the hub, ``NAME=owner/name`` a copy of it there, and ``NAME=PATH``
reads a folder or file in the hub's own layout, which needs no network. Only splits meant for training are
read: a file of another split is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from qwen_ray.data.formats.fields import Fault
from qwen_ray.data.formats.items import Item, items
from qwen_ray.data.records import Message, Record
from qwen_ray.data.sources.base import Drops, Found, Reader, Source
from qwen_ray.data.sources.entries import slug
from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under, sha256_json

FROM_HUB = "hub"
MALFORMED, AGAIN = "not a row of this data set", "the same conversation again"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# How the splits that scores are taken on, or prompts are made of, are named in files and folders.
_NOT_TRAINING = re.compile(r"(?:^|[/_.-])(?:test|valid|validation|val|dev|eval)(?=[/_.-]|$)", re.I)


@dataclass(frozen=True)
class Conversation:
    """What a row says: its turns, beginning with the user's, and what it is about."""

    turns: tuple[str, ...]
    topic: str = ""


@dataclass(frozen=True)
class HubSet:
    """One data set. ``row`` turns a row into a conversation; ``None`` where it is malformed."""

    name: str
    repo: str
    licence: str
    layouts: tuple[tuple[str, ...], ...]
    """Patterns of the training files in the repository, a tuple for each layout; the first found is read."""
    row: Callable[[dict[str, Any]], Conversation | None]
    config: str | None = None
    split: str = "train"
    hub_files: tuple[str, ...] = ()
    """Patterns of the files to load from the hub, where neither config nor split selects them."""
    join: Callable[[Iterable[Item]], Iterator[Item]] = iter
    """Makes rows of rows, where a conversation takes several."""

    @property
    def expected(self) -> str:
        """The training files by name."""
        return ", or ".join(" and ".join(patterns) for patterns in self.layouts)

    @property
    def fix(self) -> str:
        """How to get the set without a network on this machine."""
        command = f"hf download --repo-type dataset {self.repo} --local-dir FOLDER"
        return f"where there is a network: `{command}`; then --source {self.name}=FOLDER"


def hub_source(described: HubSet, *, title: str, domain_hint: str, size: str) -> Source:
    """The catalogue's entry for a set of the hub."""
    return Source(
        name=described.name,
        title=title,
        licence=described.licence,
        domain_hint=domain_hint,
        where_to_get=f"Hugging Face hub: {described.repo}; {described.fix}",
        reader=_reader(described),
        size=size,
        requires=f"a network for --source {described.name}=hub; none for downloaded files",
    )


def _reader(described: HubSet) -> Reader:
    def read(path: Path, *, domain: str, drops: Drops) -> Iterator[Found]:
        seen: set[str] = set()
        for item in described.join(_rows(described, path)):
            if isinstance(item.value, Fault):
                drops.add(item.value.reason, item.value.what, where=item.where)
                continue
            said = described.row(item.value) if isinstance(item.value, dict) else None
            if said is None or len(said.turns) < 2 or not all(turn.strip() for turn in said.turns):
                drops.add(MALFORMED, str(item.value), where=item.where)
                continue
            name = sha256_json(said.turns)[:16]
            if name in seen:
                drops.add(AGAIN, said.turns[0], where=item.where)
                continue
            seen.add(name)
            messages = tuple(
                Message("assistant" if i % 2 else "user", turn.strip()) for i, turn in enumerate(said.turns)
            )
            key = "/".join(filter(None, (described.name, said.topic and slug(said.topic), name)))
            yield Found(Record(key, messages, domain, described.name, described.licence), item.where)

    return read


def _rows(described: HubSet, path: Path) -> Iterator[Item]:
    if str(path) == FROM_HUB:
        return _from_hub(described, described.repo)
    if not path.exists() and _HUB_ID.fullmatch(str(path)):
        return _from_hub(described, str(path))
    return (item for file in _training_files(described, path) for item in items(file))


def _training_files(described: HubSet, path: Path) -> list[Path]:
    """The file ``path`` or, in the folder ``path``, the files of the first pattern that matches any."""
    if not path.is_dir():
        if not path.exists():
            fix = f"give --source {described.name}={FROM_HUB}, or, {described.fix}"
            raise UserError("no such file or folder", where=str(path), fix=fix)
        _refuse_other_split(described, path)
        return [path]
    _refuse_other_split(described, path)
    names = {
        name: path / name
        for name in map(Path.as_posix, files_under(path))
        if not _NOT_TRAINING.search(name) and not name.startswith(".")
    }
    for patterns in described.layouts:
        # The folder may be the repository, or the one in it that holds the files.
        for wanted in (patterns, [pattern.rsplit("/", 1)[-1] for pattern in patterns]):
            if found := [file for name, file in names.items() if any(fnmatch(name, one) for one in wanted)]:
                return found
    raise UserError(f"no {described.expected} in this folder", where=str(path), fix=described.fix)


def _refuse_other_split(described: HubSet, path: Path) -> None:
    if path.is_dir() and not _NOT_TRAINING.fullmatch(path.name):
        return
    if _NOT_TRAINING.search(path.name):
        raise UserError(
            f"this is a split of {described.repo} that is not for training",
            where=str(path),
            fix=f"give {described.expected}",
        )


def _from_hub(described: HubSet, repo: str) -> Iterator[Item]:
    import datasets

    try:
        rows = datasets.load_dataset(
            repo,
            described.config,
            split=described.split,
            data_files=list(described.hub_files) or None,
            streaming=True,
        )
        for number, row in enumerate(rows, start=1):
            yield Item(f"{repo}:{described.split}:{number}", row)
    except (OSError, ValueError, RuntimeError) as e:
        why = (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(
            f"the data set cannot be had from the hub: {why}",
            where=repo,
            fix=described.fix,
        ) from None
