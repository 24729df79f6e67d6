"""Garbage collection takes what nothing needs, and no more."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.object_storage import ObjectStorage
from qwen_ray.registry import CANARY, CANDIDATE, PRODUCTION, Registry
from qwen_ray.registry.collect import Retention
from qwen_ray.registry.records import record_verdict
from qwen_ray.registry.state import Change

from .conftest import LINEAGE, Clock, Made, files_below

RULE = Retention(archived_days=30, rollbacks=1)


def publish(registry: Registry, made: Made, count: int) -> None:
    for n in range(1, count + 1):
        registry.publish("bio", made(b"%d" % n), LINEAGE)


def collected(registry: Registry, rule: Retention = RULE) -> list[tuple[str, int | None]]:
    planned = registry.collect(rule, dry_run=True)
    before = registry.versions("bio")
    assert registry.versions("bio") == before
    assert registry.collect(rule, dry_run=False) == planned
    return [(removal.name, removal.version) for removal in planned]


def test_old_archived_versions_go_and_their_story_stays(registry: Registry, made: Made, clock: Clock) -> None:
    publish(registry, made, 3)
    path = registry.get("bio", 1).path
    registry.archive("bio", 1, reason="old")
    clock.days(20)
    registry.archive("bio", 2, reason="old")
    assert collected(registry) == []
    clock.days(11)
    assert collected(registry) == [("bio", 1)]
    assert collected(registry) == []
    assert registry.versions("bio") == [2, 3]
    assert registry.archived("bio") == [2]
    assert not (path / "adapter_model.safetensors").exists()
    assert registry.lineage("bio", 1) == LINEAGE
    assert [e.kind for e in registry.events("bio", version=1)] == ["published", "archived", "removed"]
    for act in (
        lambda: registry.get("bio", 1),
        lambda: registry.point("bio", PRODUCTION, 1, reason="back"),
        lambda: registry.restore("bio", 1, reason="back"),
    ):
        with pytest.raises(UserError, match=r"bio@1 were removed on 2026-02-01") as e:
            act()
        assert e.value.status == 404
    # Its content may come again, as a new version.
    assert registry.publish("bio", made(b"1"), LINEAGE).version == 4


def test_what_aliases_mean_or_meant_stays(registry: Registry, made: Made, clock: Clock) -> None:
    publish(registry, made, 6)
    for version in (1, 2, 3):
        registry.point("bio", PRODUCTION, version, reason="better")
    registry.point("bio", CANDIDATE, 4, reason="new")
    registry.start_canary("bio", 5, 0.5, reason="try")
    for version in (1, 2, 6):
        registry.archive("bio", version, reason="old")
    clock.days(400)
    assert collected(registry) == [("bio", 6), ("bio", 1)]
    assert registry.rollback("bio", reason="errors").version == 2
    assert registry.aliases("bio") == {CANARY: 5, CANDIDATE: 4, PRODUCTION: 2}


def test_what_lineages_need_stays(registry: Registry, made: Made, clock: Clock) -> None:
    publish(registry, made, 2)
    registry.publish("law", made(b"law"), {**LINEAGE, "parents": ["bio@1"]})
    third = registry.publish("bio", made(b"3"), {**LINEAGE, "parent": "bio@2"})
    fourth = registry.publish("bio", made(b"4"), LINEAGE)
    record_verdict(registry, fourth, {"verdict": "promote"}, baseline=third.ref, run=None)
    for version in (1, 2, 3):
        registry.archive("bio", version, reason="old")
    clock.days(400)
    assert collected(registry) == []
    # What needed them goes, and so, in the same pass, do they.
    registry.archive("bio", 4, reason="old")
    clock.days(400)
    assert collected(registry) == [("bio", 4), ("bio", 3), ("bio", 2)]
    assert registry.versions("bio") == [1]


def test_what_is_about_to_be_needed_stays(registry: Registry, made: Made, clock: Clock) -> None:
    """A writer has said that its new version comes from version 1, and is still copying."""
    publish(registry, made, 1)
    registry.archive("bio", 1, reason="old")
    clock.days(400)
    registry._hold("bio@1")
    assert collected(registry) == []
    clock.days(2)
    assert collected(registry) == [("bio", 1)]


class Late(Registry):
    """Somebody else is faster: ``first`` happens just before the first change."""

    first: Callable[[], Any] | None = None

    def change(self, name: str, act: Callable[[Change], Any]) -> None:
        first, self.first = self.first, None
        if first is not None:
            first()
        super().change(name, act)


def test_what_is_restored_meanwhile_stays(registry: Registry, made: Made, clock: Clock) -> None:
    publish(registry, made, 1)
    registry.archive("bio", 1, reason="old")
    clock.days(400)
    late = Late(registry.storage, clock=clock)

    def wanted() -> None:
        registry.restore("bio", 1, reason="wanted")
        registry.point("bio", PRODUCTION, 1, reason="wanted")

    late.first = wanted
    assert late.collect(RULE, dry_run=False) == []
    registry.verify(registry.resolve("bio"))


def test_what_is_removed_meanwhile_gets_no_alias(registry: Registry, made: Made, clock: Clock) -> None:
    publish(registry, made, 1)
    registry.archive("bio", 1, reason="old")
    clock.days(400)
    late = Late(registry.storage, clock=clock)
    for act in (
        lambda: late.point("bio", PRODUCTION, 1, reason="wanted"),
        lambda: late.start_canary("bio", 1, 0.5, reason="wanted"),
        lambda: late.restore("bio", 1, reason="wanted"),
    ):
        late.first = lambda: registry.collect(RULE, dry_run=False)
        with pytest.raises(UserError, match="were removed"):
            act()
    assert registry.aliases("bio") == {}


def test_what_a_writer_names_stays_while_it_writes(
    registry: Registry, made: Made, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collection comes after the writer has said what it needs and before that is to be seen."""
    publish(registry, made, 3)
    for version in (1, 2):
        registry.archive("bio", version, reason="old")
    clock.days(400)
    other = Registry(registry.storage, clock=clock)
    upload, write = registry.files.publish, registry.storage.create
    removed: list[object] = []

    def published(*args: Any, **named: Any) -> int:
        removed.extend(other.collect(RULE, dry_run=False))
        return upload(*args, **named)

    def created(key: str, data: bytes) -> bool:
        if "/events/" in key:
            removed.extend(other.collect(RULE, dry_run=False))
        return write(key, data)

    monkeypatch.setattr(registry.files, "publish", published)
    registry._hold("bio@2")
    registry.publish("law", made(b"law"), {**LINEAGE, "parents": ["bio@1"]})
    monkeypatch.setattr(registry.storage, "create", created)
    clock.days(2)
    record_verdict(registry, registry.get("bio", 3), {"verdict": "hold"}, baseline="bio@2", run=None)
    assert removed == []


def test_an_interrupted_collection_is_finished(local: Registry, made: Made, clock: Clock) -> None:
    publish(local, made, 2)
    kept = local.get("bio", 1).path
    copy = kept.with_name("copy")
    shutil.copytree(kept, copy)
    local.archive("bio", 1, reason="old")
    clock.days(400)
    assert collected(local) == [("bio", 1)]
    shutil.copy(copy / "adapter_model.safetensors", kept)  # as if it had ended before this file
    shutil.rmtree(copy)
    assert local.versions("bio") == [2]
    assert collected(local) == [("bio", 1)]
    assert files_below(kept) == ["lineage.json", "manifest.json"]


def test_uploads_that_died_go_after_a_while(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry("memory://uploads")
    registry.publish("bio", made(b"1"), LINEAGE)
    content = set(registry.storage.keys("bio/content/"))
    assert isinstance(registry.storage, ObjectStorage)
    old, new = "bio/content/abc/20200101T000000-0000/x", "bio/content/abc/29990101T000000-0000/x"
    registry.storage.create(old, b"")
    registry.storage.create(new, b"")
    (removal,) = registry.collect(RULE, dry_run=False)
    assert (removal.what, removal.version) == ("bio/content/abc/20200101T000000-0000", None)
    assert set(registry.storage.keys("bio/content/")) == {*content, new}
