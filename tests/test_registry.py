"""The registry: versions are immutable and whole, aliases move in one step."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json
from qwen_ray.registry import PRODUCTION, Registry

LINEAGE = {"base": {"id": "tiny", "fingerprint": "f" * 64}}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    return folder


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "registry")


def test_versions_count_up_and_keep_their_bytes(registry: Registry, adapter: Path) -> None:
    first = registry.publish("bio", adapter, LINEAGE)
    (adapter / "adapter_model.safetensors").write_bytes(b"other weights")
    second = registry.publish("bio", adapter, LINEAGE)
    assert (first.version, second.version) == (1, 2)
    assert (first.path / "adapter_model.safetensors").read_bytes() == b"weights"
    assert registry.versions("bio") == [1, 2]
    assert first.lineage == LINEAGE
    registry.verify(first)


def test_production_moves_and_logs(registry: Registry, adapter: Path) -> None:
    for _ in range(2):
        registry.publish("bio", adapter, LINEAGE)
    with pytest.raises(UserError, match="no 'production' version") as e:
        registry.resolve("bio")
    assert "bio@1, bio@2" in e.value.fix
    registry.point("bio", PRODUCTION, 1, reason="first")
    registry.point("bio", PRODUCTION, 2, reason="better")
    assert registry.resolve("bio").version == 2
    assert registry.resolve("bio", "1").version == 1
    log = read_json(registry.root / "bio" / "aliases" / "production.json")["log"]
    assert [(entry["version"], entry["reason"]) for entry in log] == [(1, "first"), (2, "better")]


def test_alias_to_a_missing_version_changes_nothing(registry: Registry, adapter: Path) -> None:
    registry.publish("bio", adapter, LINEAGE)
    registry.point("bio", PRODUCTION, 1, reason="first")
    with pytest.raises(UserError, match="no version 7"):
        registry.point("bio", PRODUCTION, 7, reason="typo")
    assert registry.resolve("bio").version == 1


@pytest.mark.parametrize("name", ["../bio", "/etc", "Bio", "", ".hidden", "a/b", "bio:x", "a" * 65])
def test_names_that_lead_elsewhere_are_refused(registry: Registry, adapter: Path, name: str) -> None:
    with pytest.raises(UserError, match="not an adapter name") as e:
        registry.publish(name, adapter, LINEAGE)
    assert e.value.status == 404
    with pytest.raises(UserError):
        registry.resolve(name)


def test_unknown_names_list_the_known(registry: Registry, adapter: Path) -> None:
    with pytest.raises(UserError, match="unknown adapter 'law'") as e:
        registry.resolve("law")
    assert "empty" in e.value.fix
    registry.publish("bio", adapter, LINEAGE)
    with pytest.raises(UserError) as e:
        registry.resolve("law")
    assert "bio" in e.value.fix
    assert e.value.status == 404


def test_not_an_adapter_leaves_no_trace(registry: Registry, adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is missing"):
        registry.publish("bio", adapter, LINEAGE)
    with pytest.raises(UserError, match="fingerprint"):
        registry.publish("bio", adapter, {})
    assert registry.names() == []


def test_an_unfinished_version_is_not_seen(registry: Registry, adapter: Path) -> None:
    """As a crash between copying and renaming leaves it."""
    registry.publish("bio", adapter, LINEAGE)
    folder = registry.root / "bio" / "versions"
    os.mkdir(folder / ".new-crashed")
    os.mkdir(folder / "0009")  # no manifest
    assert registry.versions("bio") == [1]
    assert registry.publish("bio", adapter, LINEAGE).version == 2


def test_damage_is_named(registry: Registry, adapter: Path) -> None:
    version = registry.publish("bio", adapter, LINEAGE)
    (version.path / "adapter_model.safetensors").write_bytes(b"weightz")
    with pytest.raises(UserError, match="damaged") as e:
        registry.verify(version)
    assert "adapter_model.safetensors" in e.value.where


def _publish(root: Path, adapter: Path) -> None:
    Registry(root).publish("bio", adapter, LINEAGE)


def test_writers_at_once_get_different_numbers(registry: Registry, adapter: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_publish, args=(registry.root, adapter)) for _ in range(6)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
    assert [w.exitcode for w in writers] == [0] * 6
    assert registry.versions("bio") == [1, 2, 3, 4, 5, 6]
