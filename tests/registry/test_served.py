"""A registry in an object store, seen by the server: look-ups download nothing, loading does."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.registry import PRODUCTION, Registry
from qwen_ray.serving.catalog import Catalog
from qwen_ray.serving.settings import ServeSettings

from ..s3 import s3_server
from .conftest import LINEAGE, Made


@pytest.fixture
def two(registry: Registry, made: Made) -> Registry:
    for weights in (b"1", b"2"):
        registry.publish("bio", made(weights), LINEAGE)
    registry.point("bio", PRODUCTION, 1, reason="first")
    return registry


def test_found_where_it_will_be_and_fetched_when_loaded(two: Registry, tmp_path: Path) -> None:
    catalog = Catalog(registry=Registry(two.location))
    found = catalog.look_up("bio", None)
    assert found.name == "bio@1"
    assert found.root is not None
    assert found.place.is_relative_to(found.root)
    assert not (tmp_path / "cache").exists()
    assert (found.folder / "adapter_model.safetensors").read_bytes() == b"1"
    assert found.folder == found.place


def test_moves_are_seen_by_the_next_look_up(two: Registry) -> None:
    catalog = Catalog(registry=Registry(two.location))
    first = catalog.look_up("bio", None)
    two.point("bio", PRODUCTION, 2, reason="better")
    second = catalog.look_up("bio", None)
    assert (first.name, second.name) == ("bio@1", "bio@2")
    assert first.key != second.key
    two.rollback("bio", reason="worse")
    assert catalog.look_up("bio", None) == first


def test_archived_versions_are_not_listed_but_answer(two: Registry) -> None:
    two.archive("bio", 2, reason="old")
    catalog = Catalog(registry=Registry(two.location))
    assert [name for name, _ in catalog.available()] == ["bio", "bio@1"]
    assert catalog.look_up("bio", "2").name == "bio@2"


def test_an_object_store_that_is_away_is_503(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("qwen_ray.object_storage._RETRY", {"max_retries": 0})
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        registry = Registry("s3://bucket/registry")
        registry.publish("bio", made(b"1"), LINEAGE)
        registry.point("bio", PRODUCTION, 1, reason="first")
        catalog = Catalog(registry=Registry("s3://bucket/registry"))
        listed = catalog.available()
        catalog.look_up("bio", None)
    with pytest.raises(UserError) as e:
        catalog.look_up("bio", None)
    assert e.value.status == 503
    assert "bucket" not in str(e.value)  # it is told to clients
    assert catalog.remembered("bio", None) is not None
    assert [(name, facts.get("stale")) for name, facts in catalog.available()] == [
        (name, True) for name, _ in listed
    ]


@pytest.mark.parametrize("given", ["s3://bucket/registry", "registry"])
def test_settings_take_a_folder_or_a_uri(given: str) -> None:
    settings = ServeSettings.of({"model": "tiny", "registry": given, "knowledge": given})
    want = given if "://" in given else str(Path(given).resolve())
    assert (settings.registry, settings.knowledge) == (want, want)
