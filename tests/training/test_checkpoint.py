"""Checkpoints: whole or absent, verified, the damaged named and skipped; a failing disk strands none."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.fsio import files_under
from qwen_ray.training import checkpoint as ckpt
from qwen_ray.training import strategy as strategies
from tests.training.ranks import launch
from tests.training.test_loop import Store, config, run, weights


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """As a disk that is full: the kernel refuses to let files grow beyond ``size`` bytes."""
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_only_the_newest_are_kept_and_the_unfinished_are_not_seen(tmp_path: Path) -> None:
    store = Store(tmp_path, keep=2)
    store.protected = {1}
    for step in (1, 2, 3, 4):
        store.save(step, lambda folder: (folder / "x").touch(), {})
    assert store.settle() is None
    (tmp_path / "step-00000009").mkdir()  # no manifest
    shutil.copytree(store.folder(4), tmp_path / "step-00000004.copy")  # somebody's own
    names = ["step-00000001", "step-00000003", "step-00000004", "step-00000004.copy", "step-00000009"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    found = store.newest()
    assert found is not None
    assert found[0] == tmp_path / "step-00000004"
    assert found[1]["step"] == 4


def test_a_later_one_that_was_skipped_does_not_push_out_the_good(tmp_path: Path) -> None:
    """Steps 10 and 30 were saved, 30 is damaged, and the run goes on from 10."""
    store = Store(tmp_path, keep=1)
    for step in (10, 30):
        store.keep = 2
        store.save(step, lambda folder: (folder / "x").write_text("good"), {})
    assert store.settle() is None
    (tmp_path / "step-00000030" / "x").write_text("evil")
    store = Store(tmp_path, keep=1)
    store.save(20, lambda folder: (folder / "x").write_text("good"), {})
    assert store.settle() is None
    found = store.newest()
    assert found is not None
    assert found[1]["step"] == 20
    assert not (tmp_path / "step-00000010").exists()


def test_every_file_damaged_in_turn_is_named_and_the_one_before_is_used(
    tmp_path: Path, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Each file of the newest checkpoint truncated, or one bit of it flipped; the manifest too."""
    settings = config(data_file, tmp_path, "optim.max_steps=8", "checkpoint.keep=2")
    store = Store(tmp_path / "c", keep=2)
    run(settings, store)
    newest = tmp_path / "c" / "step-00000008"
    names = list(files_under(newest))
    assert {str(n) for n in names} >= {
        "manifest.json",
        "state/rank-00000.safetensors",
        "adapter/adapter_model.safetensors",
    }
    shutil.copytree(newest, tmp_path / "kept")
    for name in names:
        content = (newest / name).read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        for damaged in (content[: len(content) // 2], bytes(flipped), None):
            if damaged is None:
                (newest / name).unlink()
            else:
                (newest / name).write_bytes(damaged)
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                found = store.newest()
            assert found is not None
            assert found[1]["step"] == 4, name
            # Without its manifest a folder is no checkpoint: as a save that was killed.
            named = damaged is None and name.name == "manifest.json"
            assert named or str(newest / name) in caplog.text, name
            (newest / name).write_bytes(content)
    expected = weights(store)
    (newest / names[-1]).unlink()
    _, result = run(settings, Store(tmp_path / "c", keep=2))
    assert result.resumed_from == 4
    assert weights(store) == expected  # steps 5 to 8 again


def test_if_all_are_damaged_nothing_starts_over_silently(tmp_path: Path, data_file: Path) -> None:
    settings = config(data_file, tmp_path, "optim.max_steps=4")
    store = Store(tmp_path / "c")
    run(settings, store)
    (file,) = (tmp_path / "c").glob("*/state/*")
    os.truncate(file, 100)
    with pytest.raises(UserError, match="every checkpoint of this run is damaged") as e:
        run(settings, Store(tmp_path / "c"))
    assert file.name in str(e.value)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_disk_that_is_full_costs_no_older_checkpoint(
    asynchronous: bool, tmp_path: Path, data_file: Path
) -> None:
    """The save fails, is reported, and the older one stays."""
    store = Store(tmp_path, keep=1, asynchronous=asynchronous)
    store.save(1, lambda folder: (folder / "x").write_bytes(b"x" * 10), {})
    assert store.settle() is None
    with files_up_to(50_000):
        told = store.save(2, lambda folder: (folder / "x").write_bytes(b"x" * 100_000), {})
        failure = told or store.settle()
    assert failure is not None
    assert "rank 0: OSError" in failure
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []  # nothing keeps the disk full
    found = store.newest()
    assert found is not None
    assert found[1]["step"] == 1
    store.save(3, lambda folder: (folder / "x").write_bytes(b"x"), {})
    assert store.settle() is None


def _one_rank_cannot_write(root: Path, asynchronous: bool) -> None:
    ranks = strategies.make("ddp")
    store = ckpt.CheckpointStore(root, ranks, keep=2, asynchronous=asynchronous)

    def write(folder: Path) -> None:
        (folder / f"rank-{ranks.rank}").touch()
        if broken and ranks.rank == 1:
            raise OSError(28, "No space left on device")

    told: list[Any] = []
    for step in (1, 2, 3):
        broken = step == 2
        told.append(store.save(step, write, {}) or store.settle())
    assert told[0] is None
    assert told[2] is None
    assert told[1] == "rank 1: OSError: [Errno 28] No space left on device"  # on both ranks
    assert [ckpt.step_of(p) for p in ckpt.complete(root)] == [1, 3]
    found = store.newest()
    assert found is not None
    assert {"rank-0", "rank-1"} <= set(found[1]["files"])


@pytest.mark.parametrize("asynchronous", [True, False])
def test_one_rank_that_cannot_write_strands_nobody(asynchronous: bool, tmp_path: Path) -> None:
    launch(2, _one_rank_cannot_write, tmp_path, asynchronous)


def _one_rank_sees_damage(root: Path) -> None:
    ranks = strategies.make("ddp")
    store = ckpt.CheckpointStore(root, ranks, keep=2)
    assert store.save(1, lambda folder: (folder / f"{ranks.rank}").touch(), {}) is None
    assert store.check(1) == store.folder(1)
    if ranks.rank == 0:
        (store.folder(1) / "1").write_text("x")  # in rank 1's share
    ranks.gather(None)
    for step in (1, 2):
        with pytest.raises(UserError, match=f"step {step} cannot be used"):
            store.check(step)


def test_damage_that_one_rank_sees_is_an_error_on_all(tmp_path: Path) -> None:
    launch(2, _one_rank_sees_damage, tmp_path)


def _one_rank_has_no_folder(root: Path) -> None:
    ranks = strategies.make("ddp")
    store = ckpt.CheckpointStore(root, ranks, keep=2)
    shared: list[list[str]] = []
    if ranks.rank == 1:
        taken = root / f".step-00000001-{store.start}" / "part-00001"
        taken.parent.mkdir()
        taken.touch()
    ranks.gather(None)
    told = []
    for step in (1, 2):  # the writing talks to the other ranks, as DeepSpeed's does
        told.append(store.save(step, lambda folder: shared.append(ranks.gather("written")), {}))
    assert told[0] is not None
    assert told[0].startswith("rank 1: FileExistsError")
    assert told[1] is None
    assert shared == [["written", "written"]]
    assert [ckpt.step_of(p) for p in ckpt.complete(root)] == [2]


def test_writing_in_step_begins_on_all_ranks_or_on_none(tmp_path: Path) -> None:
    launch(2, _one_rank_has_no_folder, tmp_path)


def test_a_missing_shard_is_refused(tmp_path: Path) -> None:
    import torch

    from qwen_ray.training.shards import Shards, snapshot

    weight = torch.nn.Parameter(torch.randn(6, 3))
    write = snapshot({"w": weight}, torch.optim.SGD([weight]), rank=0)
    write(tmp_path)
    assert Shards(tmp_path).shape("w//") == (6, 3)
    from safetensors.torch import save_file

    metadata = {"qwen-ray": '{"layout": {"w//": [3, 6]}, "scalars": {}, "extra": {}}'}
    save_file({"w//": torch.zeros(3, 3)}, tmp_path / "rank-00000.safetensors", metadata=metadata)
    with pytest.raises(RuntimeError, match="a shard is missing"):
        Shards(tmp_path)
