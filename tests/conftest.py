"""Shared by all tests: small data on the embedded model, and where the public data sets are."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from qwen_ray.data.records import Message, Record, write_records

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


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    """Two domains: 120 sums and 60 more."""
    path = tmp_path / "data.jsonl"
    write_records(path, [*sums(120), *sums(60, seed=1, domain="more")])
    return path


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The public data sets, for tests marked ``shared``.

    They are not part of the project, and too large and too variously licensed to be: a user who has only the
    repository skips these tests. What they cover is also covered by small files written in the tests.
    """
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"the public data sets are not at {path}")
    return path
