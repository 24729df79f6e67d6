"""The same work in one process, by Ray Data, and interrupted: the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qwen_ray.data.preparation import prepare as prepare_module
from qwen_ray.data.preparation.prepare import PrepareConfig, prepare
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.fsio import beside

LINES = 3000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Records of which some repeat, contradict or are empty, in a file of several parts."""
    path = tmp_path / "large.jsonl"
    with open(path, "w") as f:
        for i in range(LINES):
            answer = "" if i % 500 == 7 else f"It weighs {i % 7} grams and {i} grains."
            messages = [
                {"role": "user", "content": f"What does stone number {i % 2500} of the collection weigh?"},
                {"role": "assistant", "content": answer},
            ]
            f.write(json.dumps({"messages": messages, "domain": "stones"}) + "\n")
    return path


def settings(large: Path, out: Path, workers: int = 0) -> dict[str, object]:
    return {
        "domain": "stones",
        "sources": {"file": str(large)},
        "out": str(out),
        "near_duplicates": None,
        "workers": workers,
    }


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SPAN", 40_000)


@pytest.mark.cluster
def test_ray_data_writes_the_same_bytes(large: Path, tmp_path: Path, small_parts: None) -> None:
    from qwen_ray import cluster

    alone, spread = tmp_path / "alone.jsonl", tmp_path / "spread.jsonl"
    done: list[tuple[int, int]] = []
    prepare(PrepareConfig(**settings(large, alone)))
    try:
        prepare(PrepareConfig(**settings(large, spread, 2)), progress=lambda *at: done.append(at))
    finally:
        cluster.disconnect()
    assert done[-1][0] == done[-1][1] > 5
    assert spread.read_bytes() == alone.read_bytes()
    for ending in ("manifest.json", "dropped.jsonl"):
        assert beside(spread, ending).read_bytes() == beside(alone, ending).read_bytes()


def test_parts_of_any_size_give_the_same(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(PrepareConfig(**settings(large, tmp_path / "whole.jsonl")))
    monkeypatch.setattr(prepare_module, "SPAN", 5_000)
    prepare(PrepareConfig(**settings(large, tmp_path / "cut.jsonl")))
    assert (tmp_path / "cut.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    for ending in ("manifest.json", "dropped.jsonl"):
        one, two = (beside(tmp_path / f"{name}.jsonl", ending) for name in ("whole", "cut"))
        assert one.read_bytes() == two.read_bytes()


def test_killed_it_goes_on_with_what_is_done(large: Path, tmp_path: Path, small_parts: None) -> None:
    """kill -9 in the middle of the parts; the next run keeps the shards that are there."""
    out = tmp_path / "out.jsonl"
    script = (
        "import sys, json, time\n"
        "from qwen_ray.data.preparation import prepare\n"
        "prepare.SPAN = 40_000\n"
        "real = prepare.work\n"
        "def slow(*args):\n"
        "    time.sleep(0.2)\n"
        "    return real(*args)\n"
        "prepare.work = slow\n"
        "prepare.prepare(prepare.PrepareConfig(**json.loads(sys.argv[1])))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, json.dumps(settings(large, out))])
    folder = beside(out, "parts")
    deadline = time.monotonic() + 120
    while len(list(folder.glob("*.json"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    before = {f: f.stat().st_mtime_ns for f in folder.glob("*.parquet") if f.with_suffix(".json").exists()}
    seen = {}
    real_load = prepare_module.choose.load

    def load(shards):
        seen.update({s.features: s.features.stat().st_mtime_ns for s in shards})
        return real_load(shards)

    prepare_module.choose.load = load
    try:
        prepare(PrepareConfig(**settings(large, out)))
    finally:
        prepare_module.choose.load = real_load
    assert len(before) >= 3
    assert len(seen) > len(before)
    resolved = {f.resolve(): at for f, at in before.items()}
    assert {f: at for f, at in seen.items() if f in resolved} == resolved
    prepare(PrepareConfig(**settings(large, tmp_path / "undisturbed.jsonl")))
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def test_a_part_that_cannot_be_read_ends_with_its_words(tmp_path: Path) -> None:
    from qwen_ray.errors import UserError

    write_records(
        tmp_path / "a.jsonl",
        [Record("1", (Message("user", "What is it?"), Message("assistant", "This.")), "stones", "s", "MIT")],
    )
    (tmp_path / "b.jsonl.gz").write_bytes(b"\x1f\x8b broken")
    config = PrepareConfig(
        domain="stones",
        sources={"file": [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]},
        out=str(tmp_path / "out.jsonl"),
    )
    with pytest.raises(UserError, match="damaged gzip"):
        prepare(config)
