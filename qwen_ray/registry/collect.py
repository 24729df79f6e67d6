"""Garbage collection: the files of archived versions that nothing needs any more.

A version goes when it was archived long enough ago, no alias means it or could be rolled back to it, nothing
that is kept was made from it or judged against it, and nothing that is being made may need it. Only files go:
lineage, events and what is written of it in the log stay for ever.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from qwen_ray.config import Section
from qwen_ray.registry.events import iso
from qwen_ray.registry.state import HELD_HOURS, Change, State, before_now, hours_before
from qwen_ray.registry.version import parents_of, parse_ref

if TYPE_CHECKING:
    from qwen_ray.registry.registry import Registry

_Version = tuple[str, int]


class Retention(Section):
    page: ClassVar[str] = "docs/registry.md"
    archived_days: Annotated[float, Field(ge=0)] = 90
    """For how long after its archiving a version's files stay."""
    rollbacks: Annotated[int, Field(ge=0)] = 2
    """Of what each alias meant before, how many stay, so that it can be rolled back so often."""
    unfinished_hours: Annotated[float, Field(ge=1)] = 24
    """Object stores: after how long an upload that never became a version is taken for dead."""


@dataclass(frozen=True)
class Removal:
    """What was removed, or would be. ``version`` is None for what a writer that died left at ``what``.
    ``size``: in bytes."""

    name: str
    version: int | None
    what: str
    size: int


def collect(registry: Registry, retention: Retention, *, dry_run: bool) -> list[Removal]:
    """See :class:`Retention`. Killed at any point, the next call does the rest."""
    removals = _leftovers(registry, retention, dry_run=dry_run)
    needs = _needs(registry)
    for name in registry.files.names():
        for version in reversed(registry.history(name)):
            if needs[name, version] or not _drop(registry, name, version, retention, dry_run=dry_run):
                continue
            document = registry.files.document(name, version)
            size = 0 if document is None else registry.files.held(name, version, document)
            if document is not None and size:
                if not dry_run:
                    registry.files.remove(name, version, document)
                removals.append(Removal(name, version, f"{name}@{version}", size))
            for needed in needs.values():  # what only this one needed may go in the same pass
                needed.discard((name, version))
    return removals


def _drop(registry: Registry, name: str, version: int, retention: Retention, *, dry_run: bool) -> bool:
    """Decide, in one step with all else that is decided on the name, that the files may go."""
    now = iso(registry.clock())
    may = _may_go(version, registry.state(name), retention, now)
    if may and not dry_run:

        def remove(change: Change) -> None:
            nonlocal may
            may = _may_go(version, change.state, retention, now)
            if may:
                change.remove(version, reason=f"archived for over {retention.archived_days:g} days")

        registry.change(name, remove)
    return may


def _may_go(version: int, state: State, retention: Retention, now: str) -> bool:
    """Whether the state of its name lets a version's files go (or they are going already)."""
    if str(version) in state.removed:
        return True
    archived = state.archived.get(str(version))
    if archived is None or archived > hours_before(now, 24 * retention.archived_days):
        return False
    if state.held.get(str(version), "") > hours_before(now, HELD_HOURS):
        return False
    for alias in {entry["value"]["alias"] for entry in state.log if entry["kind"] == "alias"}:
        now_and_gone = {state.aliases.get(alias), *map(int, state.removed), None}
        before = [v for v in before_now(state, alias) if v not in now_and_gone]
        if version in list(dict.fromkeys(before))[: retention.rollbacks]:
            return False
    return version not in state.aliases.values()


def _needs(registry: Registry) -> defaultdict[_Version, set[_Version]]:
    """For each version those, with files, that were made from it or judged against it."""
    needs: defaultdict[_Version, set[_Version]] = defaultdict(set)
    for name in registry.names():
        here = registry.versions(name)
        needing = [(ref, v) for v in here for ref in parents_of(registry.lineage(name, v))]
        for event in registry.events(name, kind="verdict"):
            if event.version in here:
                needing.append((str(event.value.get("baseline")), event.version))
        for ref, version in needing:
            needed = parse_ref(ref)
            if needed is not None and needed != (name, version):
                needs[needed].add((name, version))
    return needs


def _leftovers(registry: Registry, retention: Retention, *, dry_run: bool) -> list[Removal]:
    removals = []
    for leftover in registry.files.leftovers(retention.unfinished_hours):
        if not dry_run:
            leftover.remove()
        removals.append(Removal("", None, leftover.what, leftover.size))
    return removals
