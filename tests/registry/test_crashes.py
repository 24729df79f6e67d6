"""A writer that dies at any write point leaves the old state or the new one, and the next one works.

In a folder: a child process ends, without a word, before its first change of the file system, before its
second, and so on through all of them. In an object store: each request fails before it is done, and each is
done and its answer lost, and nothing after it is done.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.object_storage import ObjectStorage
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.registry.collect import Retention
from qwen_ray.storage import Stored

from .conftest import LINEAGE, Clock, Made, files_below

COLLECT = Retention(archived_days=30, rollbacks=0, unfinished_hours=1)


@dataclass(frozen=True)
class Step:
    """Something done to the registry that :func:`prepared` makes."""

    act: Callable[[Registry, Made], Any]
    changed: Callable[[Registry], Any]
    """What is to be seen of it."""
    repeated: bool = False
    """Whether it is done again whatever was seen: files may be left to remove."""


def _production(registry: Registry) -> Any:
    return registry.aliases("bio"), [
        (e.version, e.value["reason"]) for e in registry.events("bio", kind="alias")
    ]


STEPS = {
    "publish": Step(
        lambda r, made: r.publish("bio", made(b"new"), {**LINEAGE, "parents": ["bio@1"]}),
        lambda r: r.versions("bio"),
    ),
    "publish the first": Step(lambda r, made: r.publish("law", made(b"new"), LINEAGE), lambda r: r.names()),
    "point": Step(lambda r, _: r.point("bio", PRODUCTION, 3, reason="better", was=2), _production),
    "unpoint": Step(lambda r, _: r.unpoint("bio", PRODUCTION, reason="off"), _production),
    "rollback": Step(lambda r, _: r.rollback("bio", reason="errors"), _production),
    "record": Step(
        lambda r, _: r.record("bio", 2, "note", {"n": 1}), lambda r: len(r.events("bio", kind="note"))
    ),
    "verdict": Step(
        lambda r, _: r.record("bio", 3, "verdict", {"baseline": "bio@2"}),
        lambda r: len(r.events("bio", kind="verdict")),
    ),
    "archive": Step(lambda r, _: r.archive("bio", 3, reason="old"), lambda r: r.archived("bio")),
    "restore": Step(lambda r, _: r.restore("bio", 4, reason="wanted"), lambda r: r.archived("bio")),
    "collect": Step(
        lambda r, _: r.collect(COLLECT, dry_run=False), lambda r: r.versions("bio"), repeated=True
    ),
    "start_canary": Step(
        lambda r, _: r.start_canary("bio", 3, 0.1, reason="try"),
        lambda r: (r.canary("bio"), r.aliases("bio"), len(r.events("bio", kind="alias"))),
    ),
}


def prepared(registry: Registry, made: Made, clock: Clock) -> None:
    """Four versions: 1 was production, 2 is, 4 is archived and old."""
    for weights in (b"1", b"2", b"3", b"4"):
        registry.publish("bio", made(weights), LINEAGE)
    for version in (1, 2):
        registry.point("bio", PRODUCTION, version, reason="first")
    registry.archive("bio", 4, reason="old")
    clock.days(60)


def check_and_go_on(registry: Registry, step: Step, made: Made, old: Any, new: Any) -> bool:
    """The state is old or new and whole, and what was broken off can be done. Whether it was done."""
    seen = step.changed(registry)
    assert seen in (old, new)
    for name in registry.names():
        for version in registry.versions(name):
            if name != "bio" or version != 4 or version in registry.archived("bio"):
                registry.verify(registry.get(name, version))
        assert set(registry.aliases(name).values()) <= set(registry.versions(name))
        assert len({event.id for event in registry.events(name)}) == len(registry.events(name))
    if seen == old or step.repeated:
        step.act(registry, made)
    assert step.changed(registry) == new
    return bool(seen == new)


# -- a folder

# Built-in functions that change files, or decide how much of a change is on the disk.
CHANGES = {"write", "flush", "fsync", "sendfile", "truncate", "chmod"}
CHANGES |= {"rename", "replace", "link", "remove", "unlink", "mkdir", "rmdir"}


def ends_before(change: int, act: Callable[[], Any]) -> bool:
    """Run ``act`` in a child that ends before its change number ``change``; whether it came that far."""
    child = os.fork()
    if child == 0:
        left = change

        def count(_: object, event: str, function: Any) -> None:
            nonlocal left
            if event == "c_call" and function.__name__ in CHANGES:
                if left == 0:
                    os._exit(9)  # what was written and not flushed is lost
                left -= 1

        sys.setprofile(count)
        try:
            act()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.parametrize("name", STEPS)
def test_killed_at_each_change_of_a_folder(name: str, local: Registry, made: Made, clock: Clock) -> None:
    step = STEPS[name]
    prepared(local, made, clock)
    made(b"new")  # what the child reads is not written by it
    kept = local.root.with_name("kept")
    shutil.copytree(local.root, kept)
    old = step.changed(local)
    step.act(local, made)
    new, whole = step.changed(local), len(files_below(local.root))
    done = []
    for change in range(1000):
        shutil.rmtree(local.root)
        shutil.copytree(kept, local.root)
        if not ends_before(change, lambda: step.act(local, made)):
            break
        done.append(check_and_go_on(local, step, made, old, new))
        local.publish("bio", made(b"another"), LINEAGE)  # takes away what the dead writer left
        extra = [file for file in files_below(local.root) if "/.new-" in file or "/.lock-" in file]
        assert not extra
        assert len(files_below(local.root)) <= whole + 4 + 1  # that version's files, and `.new`
    assert len(done) >= 2
    assert done == sorted(done)  # from some point on it is done
    assert not done[0]


# -- an object store


class Killed(BaseException):
    """The process is no more."""


class Dying(ObjectStorage):
    """Dies at one request that writes: before the store has it, or after and before its answer. With
    ``lost`` it does not die: an answer is lost and the request is made again, as clients do."""

    left: int | None = None
    taken = False
    lost = False
    dead = False

    def _die(self, write: Callable[[], Any]) -> Any:
        if self.dead:
            raise Killed
        if self.left is None:
            return write()
        self.left -= 1
        if self.left >= 0:
            return write()
        self.left = None
        if self.taken or self.lost:
            write()
        if self.lost:
            return write()
        self.dead = True
        raise Killed

    def read(self, key: str) -> Stored:
        return self._alive(super().read)(key)

    def keys(self, prefix: str = "") -> list[str]:
        return self._alive(super().keys)(prefix)

    def _alive(self, ask: Callable[..., Any]) -> Callable[..., Any]:
        if self.dead:
            raise Killed
        return ask

    def create(self, key: str, data: bytes) -> bool:
        create = super().create
        return bool(self._die(lambda: create(key, data)))

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        replace = super().replace
        return bool(self._die(lambda: replace(key, data, tag)))

    def delete(self, key: str) -> None:
        delete = super().delete
        self._die(lambda: delete(key))

    def upload(self, key: str, path: Path) -> None:
        upload = super().upload
        self._die(lambda: upload(key, path))


@pytest.fixture
def stores(made: Made, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Dying]:
    """Each call gives a store of its own with the prepared registry in it."""
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    count: Iterator[int] = iter(range(10_000))
    first = ObjectStorage(f"memory://{tmp_path}/prepared")
    prepared(Registry(first, clock=clock), made, clock)

    def store() -> Dying:
        copy = Dying(f"memory://{tmp_path}/{next(count)}")
        for key in first.keys(""):
            copy.create(key, first.read(key).data)
        return copy

    return store


@pytest.mark.parametrize("taken", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("name", STEPS)
def test_killed_at_each_request_to_an_object_store(
    name: str, taken: bool, stores: Callable[[], Dying], made: Made, clock: Clock
) -> None:
    step, store = STEPS[name], stores()
    old = step.changed(Registry(store, clock=clock))
    step.act(Registry(store, clock=clock), made)
    new, done = step.changed(Registry(store, clock=clock)), []
    for request in range(1000):
        store = stores()
        store.left, store.taken = request, taken
        try:
            step.act(Registry(store, clock=clock), made)
        except Killed:
            after = Registry(ObjectStorage(store.location), clock=clock)
            done.append(check_and_go_on(after, step, made, old, new))
            continue
        break
    assert len(done) >= 1
    assert done == sorted(done)
    assert done[-1] == (taken or step.repeated)


@pytest.mark.parametrize("name", STEPS)
def test_answers_lost_on_the_way(name: str, stores: Callable[[], Dying], made: Made, clock: Clock) -> None:
    """A request is made twice, as by a client that got no answer: it is as if made once."""
    step, store = STEPS[name], stores()
    step.act(Registry(store, clock=clock), made)
    new, events = step.changed(Registry(store, clock=clock)), len(Registry(store).events("bio"))
    for request in range(1000):
        store = stores()
        store.left, store.lost = request, True
        registry = Registry(store, clock=clock)
        step.act(registry, made)
        assert step.changed(registry) == new
        assert len(registry.events("bio")) == events
        for version in registry.versions("bio"):
            registry.verify(registry.get("bio", version))
        if store.left is not None:
            break
    assert request >= 1
