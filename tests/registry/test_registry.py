"""The registry, in a folder and in an object store: versions are immutable and whole, moves are logged."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.fsio import write_json
from qwen_ray.registry import CANARY, CANDIDATE, PRODUCTION, Registry
from qwen_ray.registry.collect import Retention
from qwen_ray.registry.version import Document
from qwen_ray.storage import read_document, update

from .conftest import LINEAGE, Clock, Made


def three(registry: Registry, made: Made) -> None:
    for weights in (b"1", b"2", b"3"):
        registry.publish("bio", made(weights), LINEAGE)


def moves(registry: Registry, alias: str = PRODUCTION) -> list[tuple[int | None, int | None, str]]:
    values = [event.value for event in registry.events("bio", kind="alias")]
    return [(v["was"], v["version"], v["reason"]) for v in values if v["alias"] == alias]


def test_versions_count_up_and_keep_their_bytes(registry: Registry, made: Made) -> None:
    adapter = made(b"weights")
    (adapter / "tokenizer").mkdir()
    (adapter / "tokenizer" / "vocab.json").write_text("{}")
    first = registry.publish("bio", adapter, LINEAGE)
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    second = registry.publish("bio", adapter, LINEAGE)
    assert (first.version, second.version) == (1, 2)
    assert (first.path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert (first.path / "tokenizer" / "vocab.json").read_text() == "{}"
    assert first.path.is_relative_to(registry.root)
    assert registry.versions("bio") == [1, 2]
    assert registry.get("bio", 1).lineage == LINEAGE
    assert registry.names() == ["bio"]
    registry.verify(first)


def test_the_same_content_is_the_same_version(registry: Registry, made: Made) -> None:
    first = registry.publish("bio", made(b"1"), LINEAGE)
    assert registry.publish("bio", made(b"1"), LINEAGE) == first
    assert registry.publish("bio", made(b"1"), {**LINEAGE, "step": 2}).version == 2
    assert registry.publish("bio", made(b"1"), LINEAGE) == first
    assert registry.publish("law", made(b"1"), LINEAGE).digest == first.digest
    published = registry.events("bio", kind="published")
    assert published[0].value["digest"] == first.digest


def test_production_moves_and_logs(registry: Registry, made: Made) -> None:
    three(registry, made)
    with pytest.raises(UserError, match="no 'production' version") as e:
        registry.resolve("bio")
    assert "bio@1, bio@2" in e.value.fix
    registry.point("bio", PRODUCTION, 1, reason="first", was=None)
    registry.point("bio", PRODUCTION, 2, reason="better", by="gate", was=1)
    assert registry.resolve("bio").version == 2
    assert registry.resolve("bio", "1").version == 1
    assert registry.aliases("bio") == {PRODUCTION: 2}
    assert moves(registry) == [(None, 1, "first"), (1, 2, "better")]
    assert [event.value["by"] for event in registry.events("bio", kind="alias")] == [None, "gate"]


def test_a_move_that_comes_too_late_is_refused(registry: Registry, made: Made) -> None:
    three(registry, made)
    registry.point("bio", PRODUCTION, 1, reason="first")
    for was in (None, 2):
        with pytest.raises(UserError, match="means version 1 now") as e:
            registry.point("bio", PRODUCTION, 3, reason="late", was=was)
        assert e.value.status == 409
    assert moves(registry) == [(None, 1, "first")]


def test_an_alias_is_taken_away(registry: Registry, made: Made) -> None:
    three(registry, made)
    registry.point("bio", CANDIDATE, 2, reason="new")
    registry.unpoint("bio", CANDIDATE, reason="refused")
    registry.unpoint("bio", CANDIDATE, reason="again")
    assert registry.aliases("bio") == {}
    assert moves(registry, CANDIDATE) == [(None, 2, "new"), (2, None, "refused")]
    assert [event.kind for event in registry.events("bio", version=2)] == ["published", "alias", "alias"]


def test_alias_to_a_missing_version_changes_nothing(registry: Registry, made: Made) -> None:
    three(registry, made)
    registry.point("bio", PRODUCTION, 1, reason="first")
    with pytest.raises(UserError, match="no version 7"):
        registry.point("bio", PRODUCTION, 7, reason="typo")
    for alias in ("7", "Prod", "a/b"):
        with pytest.raises(UserError, match="not an alias"):
            registry.point("bio", alias, 1, reason="typo")
    assert registry.aliases("bio") == {PRODUCTION: 1}


def test_rollback_goes_back_move_by_move(registry: Registry, made: Made) -> None:
    three(registry, made)
    for version in (1, 2, 3):
        registry.point("bio", PRODUCTION, version, reason="better")
    registry.archive("bio", 2, reason="old")
    assert registry.rollback("bio", reason="errors").version == 2
    assert registry.archived("bio") == []
    assert registry.rollback("bio", reason="more errors").version == 1
    with pytest.raises(UserError, match="meant no other version before") as e:
        registry.rollback("bio", reason="again")
    assert e.value.status == 409
    registry.point("bio", PRODUCTION, 3, reason="mended")
    assert registry.rollback("bio", reason="not mended").version == 1
    assert moves(registry)[3:5] == [(3, 2, "errors"), (2, 1, "more errors")]
    registry.unpoint("bio", PRODUCTION, reason="off")
    assert registry.rollback("bio", reason="on").version == 1


def test_a_canary_has_a_share(registry: Registry, made: Made) -> None:
    three(registry, made)
    assert registry.canary("bio") is None
    with pytest.raises(UserError, match="has a share"):
        registry.point("bio", CANARY, 2, reason="try")
    for share in (0, 1, -0.1, 1.5):
        with pytest.raises(UserError, match="no share"):
            registry.start_canary("bio", 2, share, reason="try")
    registry.start_canary("bio", 2, 0.1, reason="try")
    canary = registry.canary("bio")
    assert canary is not None
    assert (canary.version, canary.share) == (2, 0.1)
    assert registry.resolve("bio", CANARY).version == 2
    registry.stop_canary("bio", reason="enough")
    assert registry.canary("bio") is None
    assert [event.value["share"] for event in registry.events("bio", kind="alias")] == [0.1, None]
    with pytest.raises(UserError, match="has a share"):
        registry.rollback("bio", reason="again", alias=CANARY)
    assert registry.aliases("bio") == {}


def test_a_name_that_is_not_there_gets_no_state(registry: Registry) -> None:
    for act in (
        lambda: registry.unpoint("bio", PRODUCTION, reason="typo"),
        lambda: registry.stop_canary("bio", reason="typo"),
        lambda: registry.rollback("bio", reason="typo"),
    ):
        with pytest.raises(UserError, match="unknown adapter 'bio'") as e:
            act()
        assert e.value.status == 404
    assert registry.storage.keys() == []


def test_archive_and_restore(registry: Registry, made: Made) -> None:
    three(registry, made)
    registry.point("bio", PRODUCTION, 1, reason="first")
    with pytest.raises(UserError, match="bio@1 is 'production'") as e:
        registry.archive("bio", 1, reason="old")
    assert e.value.status == 409
    for _ in range(2):
        registry.archive("bio", 2, reason="old")
    assert registry.archived("bio") == [2]
    assert registry.versions("bio") == [1, 2, 3]
    with pytest.raises(UserError, match="archived"):
        registry.point("bio", PRODUCTION, 2, reason="back")
    registry.restore("bio", 2, reason="wanted")
    registry.point("bio", PRODUCTION, 2, reason="back")
    kinds = [event.kind for event in registry.events("bio", version=2)]
    assert kinds == ["published", "archived", "restored", "alias"]


def test_events_are_in_order_and_stay(registry: Registry, made: Made) -> None:
    registry.publish("bio", made(b"1"), LINEAGE)
    registry.point("bio", PRODUCTION, 1, reason="first")
    noted = registry.record("bio", 1, "note", {"text": "looks good"})
    registry.publish("bio", made(b"2"), {**LINEAGE, "parents": ["bio@1"]})
    registry.point("bio", PRODUCTION, 2, reason="better")
    events = registry.events("bio")
    assert [e.kind for e in events] == ["published", "alias", "note", "published", "alias"]
    assert events[2] == noted
    assert [e.at for e in events] == sorted(e.at for e in events)
    assert len({e.id for e in events}) == 5
    assert events[3].value["parents"] == ["bio@1"]
    # A move is about the version that the alias leaves, too.
    assert [e.kind for e in registry.events("bio", version=1)] == ["published", "alias", "note", "alias"]
    with pytest.raises(UserError, match="no kind of event"):
        registry.record("bio", 1, "rumour", {})
    with pytest.raises(UserError, match="no version 9"):
        registry.record("bio", 9, "note", {})


@pytest.mark.parametrize("name", ["../bio", "/etc", "Bio", "", ".hidden", "a/b", "bio:x", "a" * 65])
def test_names_that_lead_elsewhere_are_refused(local: Registry, made: Made, name: str) -> None:
    with pytest.raises(UserError, match="not an adapter name") as e:
        local.publish(name, made(b"1"), LINEAGE)
    assert e.value.status == 404
    with pytest.raises(UserError, match="not an adapter name"):
        local.resolve(name)


def test_unknown_names_list_the_known(registry: Registry, made: Made) -> None:
    with pytest.raises(UserError, match="unknown adapter 'law'") as e:
        registry.resolve("law")
    assert "empty" in e.value.fix
    registry.publish("bio", made(b"1"), LINEAGE)
    for at in (None, "1"):
        with pytest.raises(UserError, match="unknown adapter 'law'") as e:
            registry.resolve("law", at)
        assert "bio" in e.value.fix
        assert e.value.status == 404


def test_not_an_adapter_leaves_no_trace(registry: Registry, made: Made) -> None:
    adapter = made(b"1")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        registry.publish("bio", adapter, LINEAGE)
    for lineage, what in (
        ({}, "fingerprint"),
        ([], "fingerprint"),
        ({"base": {"id": "tiny", "fingerprint": 1}}, "fingerprint"),
        ({"base": {"fingerprint": "f" * 64}}, "base id"),
    ):
        with pytest.raises(UserError, match=what):
            registry.publish("bio", made(b"1"), lineage)  # type: ignore[arg-type]
    assert registry.names() == []


def test_an_unfinished_version_is_not_seen(local: Registry, made: Made) -> None:
    """As a crash between copying and renaming leaves it; the next writer takes it away."""
    local.publish("bio", made(b"1"), LINEAGE)
    folder = local.root / "bio" / "versions"
    os.mkdir(folder / ".new-crashed")
    os.mkdir(folder / "0009")  # no manifest
    os.mkdir(folder / "²")
    (folder / "²" / "manifest.json").write_text("{}")
    (folder / ".lock-crashed-later").touch()
    assert local.versions("bio") == [1]
    assert local.publish("bio", made(b"2"), LINEAGE).version == 2
    assert not list(folder.glob(".*"))


def test_what_a_writer_prepares_is_left_to_it(local: Registry, made: Made) -> None:
    """The lock is on a regular file, as other machines that have the folder see no other."""
    local.publish("bio", made(b"1"), LINEAGE)
    folder = local.root / "bio" / "versions"
    seen = []

    def look(number: int, document: Document) -> bool:
        before = sorted(path.name for path in folder.glob(".*"))
        assert local.collect(Retention(), dry_run=False) == []
        assert Registry(local.root).publish("law", made(b"3"), LINEAGE).version == 1
        seen.append((before, sorted(path.name for path in folder.glob(".*"))))
        return False

    assert local.files.publish("bio", made(b"2"), LINEAGE, at="2026-01-01", after=0, same=look) == 2
    [(before, after)] = seen
    assert before == after
    assert [name.partition("-")[0] for name in before] == [".lock", ".new"]
    assert len({name.partition("-")[2] for name in before}) == 1
    (folder / ".new-elsewhere").mkdir()
    with open(folder / ".lock-elsewhere", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        local.publish("bio", made(b"4"), LINEAGE)
        assert (folder / ".new-elsewhere").is_dir()
    (removal,) = local.collect(Retention(), dry_run=True)
    assert removal.what == str(folder / ".new-elsewhere")
    assert local.collect(Retention(), dry_run=False) == [removal]
    assert not list(folder.glob(".*"))


def test_damage_is_named(registry: Registry, made: Made) -> None:
    version = registry.publish("bio", made(b"weights"), LINEAGE)
    (version.path / "adapter_model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match="damaged") as e:
        registry.verify(version)
    assert "adapter_model.safetensors" in e.value.where


def test_a_registry_made_before_is_read(local: Registry, made: Made) -> None:
    """Aliases were a file each, versions had the same files; the first move takes the logs over."""
    three(local, made)
    log = [{"version": v, "at": f"2026-01-0{v}T00:00:00+00:00", "reason": "r"} for v in (1, 2)]
    write_json(local.root / "bio" / "aliases" / "production.json", {"version": 2, "log": log})
    (local.root / "bio" / "state.json").unlink(missing_ok=True)
    assert local.resolve("bio").version == 2
    assert moves(local) == [(None, 1, "r"), (1, 2, "r")]
    local.point("bio", CANDIDATE, 3, reason="new")
    shutil.rmtree(local.root / "bio" / "aliases")
    assert local.aliases("bio") == {CANDIDATE: 3, PRODUCTION: 2}
    assert local.rollback("bio", reason="back").version == 1


def test_local_copies_are_whole(tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    registry = Registry("memory://copies")
    version = registry.publish("bio", made(b"weights"), LINEAGE)
    assert not version.folder.exists()
    assert version.path == version.folder
    weights = version.folder / "adapter_model.safetensors"
    weights.write_bytes(b"cut")
    assert version.path == version.folder
    assert weights.read_bytes() == b"weights"
    # What the store holds is checked, not trusted.
    shutil.rmtree(version.folder)
    (key,) = [key for key in registry.storage.keys("bio/content/") if key.endswith(".safetensors")]
    registry.storage.replace(key, b"weightz", registry.storage.read(key).tag)
    with pytest.raises(UserError, match="damaged"):
        _ = version.path
    registry.storage.delete(key)
    with pytest.raises(UserError, match="missing file"):
        _ = version.path
    assert not version.folder.exists()


@pytest.mark.parametrize("elsewhere", ["../../../../elsewhere", "{}/elsewhere", "a/../../elsewhere"])
def test_a_document_that_leads_elsewhere_writes_nothing(
    elsewhere: str, tmp_path: Path, made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    place = f"memory://{tmp_path}"
    registry = Registry(place)
    registry.publish("bio", made(b"1"), LINEAGE)
    (tmp_path / "elsewhere").write_text("mine")
    rel = elsewhere.format(tmp_path)
    facts = {"sha256": "0" * 64, "size": 1}
    key = "bio/versions/0001.json"
    document = read_document(registry.storage, key)
    document["files"][rel] = facts
    update(registry.storage, key, lambda _: document)
    with pytest.raises(UserError, match="is not a key"):
        _ = Registry(place).get("bio", 1).path
    assert (tmp_path / "elsewhere").read_text() == "mine"
    assert not (tmp_path / "cache").exists()


def test_times_are_the_clocks(registry: Registry, made: Made, clock: Clock) -> None:
    registry.publish("bio", made(b"1"), LINEAGE)
    clock.days(30)
    registry.point("bio", PRODUCTION, 1, reason="first")
    assert [event.at[:10] for event in registry.events("bio")] == ["2026-01-01", "2026-01-31"]
