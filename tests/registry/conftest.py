"""Adapters of a few bytes, and a registry of each kind."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from qwen_ray.registry import Registry

LINEAGE = {"base": {"id": "tiny", "fingerprint": "f" * 64}}
START = datetime(2026, 1, 1, tzinfo=UTC)


class Clock:
    """Each look at it is a second later; ``days`` moves it on."""

    def __init__(self, now: datetime = START) -> None:
        self.now = now

    def __call__(self) -> datetime:
        self.now += timedelta(seconds=1)
        return self.now

    def days(self, count: float) -> None:
        self.now += timedelta(days=count)


Made = Callable[[bytes], Path]


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """``made(b"weights")``: an adapter folder with these weights."""

    def make(weights: bytes = b"weights") -> Path:
        folder = tmp_path / f"adapter-{weights.hex()[:40]}"
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return folder

    return make


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["folder", "objects"])
def registry(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Registry:
    """Empty, in a folder and in an object store."""
    monkeypatch.setenv("QWEN_RAY_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "registry" if request.param == "folder" else f"memory://{secrets.token_hex(8)}"
    return Registry(root, clock=clock)


@pytest.fixture
def local(tmp_path: Path, clock: Clock) -> Registry:
    """Empty, in a folder."""
    return Registry(tmp_path / "registry", clock=clock)


def files_below(root: Path) -> list[str]:
    """Every file, hidden ones too."""
    found = (Path(where, name) for where, _, names in os.walk(root) for name in names)
    return sorted(path.relative_to(root).as_posix() for path in found)
