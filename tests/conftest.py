"""Shared by all tests: small data on the embedded model, and where the public data sets are."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.data.records import Message, Record, write_records
from tests.browser import chromium

# Tests run beside one another's Ray processes on two cores: more threads than that only wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # exactness is tested in float32, on the CPU

ROOT = Path(__file__).parent.parent


def record(question: str, answer: str, *, domain: str = "general", id: str | None = None) -> Record:
    """A one-turn record."""
    messages = (Message("user", question), Message("assistant", answer))
    return Record(id or question, messages, domain, "test", "CC0-1.0")


def sums(n: int, *, seed: int = 0, domain: str = "sums") -> list[Record]:
    """Additions, of varied length."""
    rng = random.Random(seed)
    pairs = [(rng.randint(0, 999), rng.randint(0, 99)) for _ in range(n)]
    return [
        record(f"What is {a} + {b}?", str(a + b), domain=domain, id=f"{domain}-{i}")
        for i, (a, b) in enumerate(pairs)
    ]


def disk_full(*_: object) -> None:
    """What a write does where the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Two domains: 120 sums and 60 more."""
    path = tmp_path / "data.jsonl"
    write_records(path, [*sums(120), *sums(60, seed=1, domain="more")])
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data sets, for tests marked ``shared``."""
    path = ROOT.parent / "shared" / "data"
    # They are too large and too variously licensed to be part of the project: a user who has only the
    # repository skips these tests. What they cover is also covered by small files written in the tests.
    if not path.is_dir():
        pytest.skip("the public data sets are not here")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Playwright's; the test is skipped where there is none."""
    with chromium() as running:
        yield running
