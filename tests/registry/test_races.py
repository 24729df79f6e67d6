"""Two writers at once: no version is lost, no alias torn, every entry of the log is there."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.object_storage import ObjectStorage
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.registry.collect import Retention

from ..s3 import s3_server
from .conftest import LINEAGE, Clock, Made

ROUNDS = 100


def write(registry: Registry, adapter: Path, writer: int, rounds: int) -> None:
    """Publish, point ``production`` at it and note it, again and again."""
    for n in range(rounds):
        version = registry.publish("bio", adapter, {**LINEAGE, "writer": writer, "round": n})
        registry.point("bio", PRODUCTION, version.version, reason=f"{writer}/{n}")
        registry.record("bio", version.version, "note", {"writer": writer, "round": n})


def check(registry: Registry, rounds: int) -> None:
    expected = sorted((writer, n) for writer in (0, 1) for n in range(rounds))
    versions = registry.versions("bio")
    assert versions == list(range(1, 2 * rounds + 1))
    lineages = {version: registry.lineage("bio", version) for version in versions}
    assert sorted((made["writer"], made["round"]) for made in lineages.values()) == expected
    for version in versions[-3:]:
        registry.verify(registry.get("bio", version))
    moves = [event.value for event in registry.events("bio", kind="alias")]
    assert [move["was"] for move in moves] == [None, *(move["version"] for move in moves[:-1])]
    assert sorted(move["version"] for move in moves) == versions
    for move in moves:
        made = lineages[move["version"]]
        assert move["reason"] == f"{made['writer']}/{made['round']}"
    assert registry.aliases("bio") == {PRODUCTION: moves[-1]["version"]}
    notes = [event.value for event in registry.events("bio", kind="note")]
    assert sorted((note["writer"], note["round"]) for note in notes) == expected


def test_two_processes_on_a_folder(tmp_path: Path, made: Made) -> None:
    registry, adapter = Registry(tmp_path / "registry"), made(b"1")
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write, args=(registry, adapter, n, ROUNDS)) for n in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    check(registry, ROUNDS)


def test_two_threads_on_an_object_store(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    adapter = made(b"1")
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda n: write(Registry("memory://races"), adapter, n, ROUNDS), (0, 1)))
    check(Registry("memory://races"), ROUNDS)


def test_two_processes_on_an_object_store(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import sys; from pathlib import Path; from qwen_ray.registry import Registry\n"
        "from tests.registry.test_races import write\n"
        "write(Registry('s3://bucket/registry'), Path(sys.argv[1]), int(sys.argv[2]), 20)"
    )
    with s3_server() as server:
        for name, value in {**server.environment, "QWEN_RAY_CACHE": str(tmp_path / "cache")}.items():
            monkeypatch.setenv(name, value)
        root = Path(__file__).parents[2]
        command = [sys.executable, "-c", code, str(made(b"1"))]
        writers = [subprocess.Popen([*command, str(n)], cwd=root, env=os.environ) for n in (0, 1)]
        assert [writer.wait(120) for writer in writers] == [0, 0]
        check(Registry("s3://bucket/registry"), 20)
        assert {key.split("/")[0] for key in server.objects} == {"bucket"}


def test_the_same_content_at_once_is_one_version(registry: Registry, made: Made) -> None:
    adapter = made(b"1")
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: registry.publish("bio", adapter, LINEAGE).version, range(8)))
    assert found == [1] * 8
    assert registry.versions("bio") == [1]


def test_the_same_content_uploaded_twice_is_one_version(
    tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writers have uploaded it before either makes it a version; what the second put is taken away."""
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    both = threading.Barrier(2)

    class Together(ObjectStorage):
        def upload(self, key: str, path: Path) -> None:
            super().upload(key, path)
            if key.endswith(".safetensors"):
                both.wait(30)

    store, adapter = Together("memory://twice"), made(b"1")
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: Registry(store).publish("bio", adapter, LINEAGE), range(2)))
    assert [version.version for version in found] == [1, 1]
    registry = Registry("memory://twice")
    assert registry.versions("bio") == [1]
    registry.verify(registry.get("bio", 1))
    assert len({key.split("/")[3] for key in store.keys("bio/content/")}) == 1


def test_of_moves_that_say_what_was_one_wins(registry: Registry, made: Made) -> None:
    for weights in (b"1", b"2", b"3", b"4"):
        registry.publish("bio", made(weights), LINEAGE)
    registry.point("bio", PRODUCTION, 1, reason="first")

    def promote(version: int) -> bool:
        try:
            registry.point("bio", PRODUCTION, version, reason="better", was=1)
        except UserError as e:
            return e.status != 409
        return True

    with ThreadPoolExecutor(3) as threads:
        assert sum(threads.map(promote, (2, 3, 4))) == 1
    assert len(registry.events("bio", kind="alias")) == 2


def test_no_alias_means_what_was_collected(registry: Registry, made: Made, clock: Clock) -> None:
    """Restored and promoted while it is collected: it is promoted and there, or gone and refused."""
    keep_nothing = Retention(archived_days=0, rollbacks=0)
    versions = range(1, 21)
    for n in versions:
        registry.publish("bio", made(b"%d" % n), LINEAGE)
        registry.archive("bio", n, reason="old")
    clock.days(1)

    def promote(_: int) -> None:
        for version in versions:
            try:
                registry.restore("bio", version, reason="wanted")
                registry.point("bio", f"a{version}", version, reason="wanted")
            except UserError as e:
                if e.status != 404:
                    raise

    def collect(_: int) -> None:
        for _ in range(3):
            registry.collect(keep_nothing, dry_run=False)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda act: act(0), (promote, collect)))
    assert set(registry.aliases("bio").values()) == set(registry.versions("bio"))
    for version in registry.versions("bio"):
        registry.verify(registry.get("bio", version))
