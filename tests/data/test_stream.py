"""Records that stay in their files: the stream is the one from memory, the index is kept and checked."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.config import DataConfig
from qwen_ray.data import stream, stream_index
from qwen_ray.data.dataset import Dataset, build_dataset, load_splits
from qwen_ray.data.records import Message, Record, write_records
from qwen_ray.data.stream import RecordFiles
from qwen_ray.errors import UserError
from tests.conftest import record, sums

TOKENIZER = models.load_tokenizer(models.resolve("tiny"))


def records(n: int, domain: str, seed: int = 0) -> list[Record]:
    """Sums of varied difficulty; of every 20, one is too long and one has no room for its answer."""
    rng = random.Random(seed)
    made = []
    for i, r in enumerate(sums(n, seed=seed, domain=domain)):
        question, answer = (m.content for m in r.messages)
        if i % 20 == 7:
            answer = "yes " * 200
        if i % 20 == 13:
            question = "what? " * 200
        messages = (Message("user", question), Message("assistant", answer))
        made.append(dataclasses.replace(r, messages=messages, difficulty=rng.choice([0.5, rng.random()])))
    return made


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two files; both hold domain x, with an empty line and text beyond ASCII between."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    write_records(one, [*records(60, "x"), record("Où?", "Là.", domain="y", id="é")])
    with open(one, "a", encoding="utf-8") as f:
        f.write("\n")
        f.writelines(
            json.dumps({**r.to_dict(), "difficulty": 0.1}) + "\n" for r in sums(40, seed=1, domain="y")
        )
    write_records(two, [*records(50, "z", seed=2), *sums(30, seed=3, domain="x2")])
    return [str(one), str(two)]


def dataset(files: list[str], *, seed: int = 0, **data: Any) -> Dataset:
    config = DataConfig(**{"train": files, "max_length": 96, "validation_fraction": 0.1, **data})
    return build_dataset(config, TOKENIZER, seed=seed, context=256)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"packing": False},
        {"unit": "tokens", "weights": {"x": 3, "y": 1, "z": 1, "x2": 0}},
        {"packing_window": 2, "max_epochs": {"y": 1.5}, "temperature": 3},
    ],
)
def test_the_stream_is_the_one_from_memory(files: list[str], data: dict[str, Any]) -> None:
    memory, disk = dataset(files, **data), dataset(files, streaming=True, **data)
    assert memory.manifest == disk.manifest
    assert memory.manifest["cut"] > 0
    assert memory.manifest["dropped"] > 0
    assert memory.manifest["validation_records"] > 5
    assert memory.validation == disk.validation
    n = memory.stream.plan(passes=1.2)
    assert disk.stream.plan(passes=1.2) == n
    for _ in range(n + 3):
        assert disk.stream.state() == memory.stream.state()
        assert disk.stream.next_row() == memory.stream.next_row()
    json.dumps(disk.stream.state())  # plain numbers
    resumed = dataset(files, streaming=True, **data).stream
    resumed.plan(passes=1.2)
    resumed.load_state(disk.stream.state())
    assert resumed.next_row() == memory.stream.next_row()


@pytest.mark.parametrize("streaming", [False, True])
def test_records_that_are_all_too_long_are_told(tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "long.jsonl"
    write_records(file, [record("what? " * 200, "It is.", id=str(i)) for i in range(3)])
    with pytest.raises(UserError, match="no answer of the 3 training records begins within 96 tokens") as e:
        dataset([str(file)], streaming=streaming, validation_fraction=0)
    assert e.value.where == "data.max_length"


def test_a_curriculum_from_disk(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    write_records(path, [*records(60, "x"), *records(50, "z", seed=2)])
    memory, disk = (
        dataset([str(path)], curriculum="hard_to_easy", streaming=streaming).stream
        for streaming in (False, True)
    )
    assert memory.plan(rows=30) == disk.plan(rows=30)
    assert [memory.next_row() for _ in range(30)] == [disk.next_row() for _ in range(30)]


def test_validation_files_leave_all_records_to_training(files: list[str]) -> None:
    config = DataConfig(train=files[:1], validation=files[1:], streaming=True)
    train, validation = load_splits(config, seed=0)
    assert (len(train), len(validation)) == (101, 80)
    assert [r.id for r in train] == [r.id for r in load_splits(config, seed=1)[0]]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_is_named_once(files: list[str], tmp_path: Path, streaming: bool) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(Path(files[1]).read_bytes())
    for again in (files[1], f"{tmp_path}/../{tmp_path.name}/two.jsonl", str(copy)):
        with pytest.raises(UserError, match=r"twice|already at|two records have the id") as e:
            load_splits(DataConfig(train=[*files, again], streaming=streaming), seed=0)
        assert e.value.where.startswith(again)
        assert "name each file once" in e.value.fix


def test_files_without_ids_may_share_examples(tmp_path: Path) -> None:
    """As repeats within a file: under another name. Other ids stay as they are."""

    def write(name: str, *numbers: int, **keys: str) -> str:
        rows = [{"instruction": f"Say {n}.", "output": str(n), **keys} for n in numbers]
        (tmp_path / name).write_text(json.dumps(rows))
        return str(tmp_path / name)

    def ids(*files: str) -> list[str]:
        config = DataConfig(train=list(files), validation_fraction=0)
        return [r.id for r in load_splits(config, seed=0)[0]]

    one, two = write("one.json", 1, 2, 2), write("two.json", 3, 2, 2, 2)
    first, second, third = ids(one)[0], ids(one)[1], ids(two)[0]
    assert ids(one) == [first, second, f"{second}-2"]
    assert ids(one, two) == [*ids(one), third, *(f"{second}-{n}" for n in (3, 4, 5))]
    with pytest.raises(UserError, match="named twice"):
        ids(one, f"{tmp_path}/./one.json")
    with pytest.raises(UserError, match="already at"):
        ids(write("three.json", 1, id="a"), write("four.json", 2, id="a"))


@pytest.mark.parametrize("streaming", [False, True])
def test_what_is_trained_on_does_not_validate(files: list[str], tmp_path: Path, streaming: bool) -> None:
    both = tmp_path / "both.jsonl"
    write_records(both, [record("Quoi?", "Rien.", id="é"), *records(60, "x")[:3]])

    def split(train: list[str]) -> tuple[Any, list[Record]]:
        return load_splits(DataConfig(train=train, validation=[str(both)], streaming=streaming), seed=0)

    with pytest.raises(UserError, match=r"3 of the validation records are trained on, among them 'x-0'") as e:
        split(files)
    assert e.value.where == "data.validation"
    assert len(split(files[1:])[1]) == 4


def test_threads_read_their_own_records(files: list[str]) -> None:
    """Runs that share the files, as a pack's trials do, each draw ahead in a thread."""
    shared = RecordFiles(files, seed=0, held_fraction=0.0)
    ids = [shared.read(n).id for n in range(len(shared))]
    wrong: list[str] = []

    def draw(seed: int) -> None:
        for n in random.Random(seed).choices(range(len(ids)), k=3000):
            try:
                if (found := shared.read(n).id) != ids[n]:
                    wrong.append(f"{found}, not {ids[n]}")
            except UserError as e:  # half a line
                wrong.append(e.what)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []


def count_calls(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[str]:
    calls: list[str] = []
    real = getattr(module, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_the_index_is_kept_until_the_file_changes(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    scans = count_calls(monkeypatch, stream_index, "_scan")
    lengths = count_calls(monkeypatch, stream, "_tokenise")
    first = dataset(files, streaming=True)
    assert (len(scans), len(lengths)) == (2, 2)
    again = dataset(files, streaming=True)
    assert (len(scans), len(lengths)) == (2, 2)
    assert [again.stream.next_row() for _ in range(9)] == [first.stream.next_row() for _ in range(9)]
    dataset(files, streaming=True, max_length=64)  # other lengths, the same places
    assert (len(scans), len(lengths)) == (2, 4)
    # Another content of the same size and time of change.
    path, stat = Path(files[0]), Path(files[0]).stat()
    path.write_text(path.read_text(encoding="utf-8").replace("yes", "nay"), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = dataset(files, streaming=True, max_length=64)
    assert (len(scans), len(lengths)) == (3, 5)
    assert changed.manifest["files"] != first.manifest["files"]


@pytest.mark.parametrize("damage", [b"", b"not an index", None])
def test_a_damaged_index_is_made_anew(files: list[str], damage: bytes | None) -> None:
    first = dataset(files, streaming=True)
    for kept in ("one.jsonl.idx", "two.jsonl.tokens.idx"):
        path = Path(files[0]).parent / kept
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] if damage is None else damage)
    again = dataset(files, streaming=True)
    assert again.manifest == first.manifest
    assert [again.stream.next_row() for _ in range(9)] == [first.stream.next_row() for _ in range(9)]


def test_a_folder_that_cannot_be_written_to(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PermissionError("read-only")

    monkeypatch.setattr(stream_index.tempfile, "mkstemp", refuse)
    memory, disk = dataset(files), dataset(files, streaming=True)
    assert memory.stream.next_row() == disk.stream.next_row()
    assert not list(Path(files[0]).parent.glob("*.idx"))


def test_what_is_in_memory_is_the_index(tmp_path: Path) -> None:
    """A file of 10 MB in records of 5 kB: less than 64 bytes of each are kept."""
    path, n = tmp_path / "large.jsonl", 2000
    write_records(path, (record(f"{i}? " + "x" * 5000, "yes", id=f"r{i}") for i in range(n)))
    RecordFiles([str(path)], seed=0, held_fraction=0)
    tracemalloc.start()
    kept = RecordFiles([str(path)], seed=0, held_fraction=0)
    used, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == n
    assert used < 64 * n + 100_000
    assert peak < path.stat().st_size / 10


@pytest.mark.parametrize(
    ("text", "message", "fix"),
    [
        ("", "holds no record", ""),
        ('{"instruction": "a", "input": "", "output": "b"}\n', "unknown key 'instruction'", "streaming"),
        ("[1, 2]\n", "a record is a JSON object", "streaming"),
        ("{broken\n", r"data.jsonl:1: malformed record: not JSON", "Record JSONL"),
        ("\xff\n", "malformed record", "Record JSONL"),
    ],
)
def test_files_that_cannot_be_streamed(tmp_path: Path, text: str, message: str, fix: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=message) as e:
        dataset([str(path)], streaming=True)
    assert fix in e.value.fix
    assert "data.jsonl" in e.value.where


def test_missing_files_and_repeated_ids(files: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data file"):
        dataset([*files, str(tmp_path / "missing.jsonl")], streaming=True)
    copy = tmp_path / "copy.jsonl"
    write_records(copy, sums(3, domain="x2"))
    with pytest.raises(UserError, match="two records have the id 'x2-0'") as e:
        dataset([*files, str(copy)], streaming=True)
    assert e.value.where == str(copy)
