"""Storage: one document at a time, whole, created once, replaced only if it did not change."""

from __future__ import annotations

import json
import multiprocessing
import os
import secrets
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.errors import UserError
from qwen_ray.storage import Missing, Storage, create_document, open_storage, read_document, update

from .s3 import NO_BUCKET, s3_server


@pytest.fixture(params=["folder", "memory", "s3"])
def storage(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Storage]:
    if request.param == "s3":
        with s3_server() as server:
            for name, value in server.environment.items():
                monkeypatch.setenv(name, value)
            yield open_storage("s3://bucket/some/prefix")
    elif request.param == "memory":
        yield open_storage(f"memory://{secrets.token_hex(8)}")
    else:
        yield open_storage(tmp_path / "not" / "there")


def test_created_once_and_replaced_if_unchanged(storage: Storage) -> None:
    assert storage.create("a/b.json", b"first")
    assert not storage.create("a/b.json", b"second")
    first = storage.read("a/b.json")
    assert first.data == b"first"
    assert storage.replace("a/b.json", b"second", first.tag)
    assert not storage.replace("a/b.json", b"third", first.tag)
    assert open_storage(storage.location).read("a/b.json").data == b"second"


def test_what_is_gone_is_missing(storage: Storage) -> None:
    with pytest.raises(Missing):
        storage.read("a/b")
    storage.delete("a/b")
    storage.create("a/b", b"x")
    tag = storage.read("a/b").tag
    storage.delete("a/b")
    with pytest.raises(Missing):
        storage.read("a/b")
    assert not storage.replace("a/b", b"y", tag)
    assert storage.keys() == []
    assert storage.create("a/b", b"z")


def test_keys_start_with_their_prefix(storage: Storage) -> None:
    assert storage.keys() == storage.keys("none/") == []
    for key in ("b", "a/2", "a/1", "ab/1", "a/c/3"):
        storage.create(key, b"")
    assert storage.keys() == ["a/1", "a/2", "a/c/3", "ab/1", "b"]
    assert storage.keys("a/") == ["a/1", "a/2", "a/c/3"]
    assert storage.keys("a") == ["a/1", "a/2", "a/c/3", "ab/1"]
    assert storage.keys("a/c") == ["a/c/3"]


@pytest.mark.parametrize("key", ["", "/a", "../a", "a/../b", ".lock", "a/.b", "a//b", "a/", "a\nb", "a\\b"])
def test_keys_that_lead_elsewhere_are_refused(tmp_path: Path, key: str) -> None:
    for storage in (open_storage(tmp_path), open_storage("memory://keys")):
        with pytest.raises(UserError, match="is not a key"):
            storage.read(key)
        with pytest.raises(UserError, match="is not a key"):
            storage.create(key, b"")
        with pytest.raises(UserError, match="is not a key"):
            storage.delete(key)


def append(storage: Storage, writer: int, times: int) -> None:
    """Add (writer, 0), (writer, 1) ... to the log, one at a time."""
    for _ in range(times):
        update(storage, "log", lambda log: [*(log or []), [writer, sum(w == writer for w, _ in log or [])]])


def test_documents_are_updated_in_turn(storage: Storage) -> None:
    """Eight writers, each update seen: none is lost, none done twice."""

    def work(writer: int) -> None:
        append(open_storage(storage.location), writer, 5)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    log = read_document(storage, "log")
    assert sorted(log) == [[writer, n] for writer in range(8) for n in range(5)]
    for writer in range(8):
        assert [n for w, n in log if w == writer] == list(range(5))


def test_a_change_that_is_refused_changes_nothing(storage: Storage) -> None:
    assert create_document(storage, "d", {"n": 1})
    tag = storage.read("d").tag

    def refuse(found: Any) -> Any:
        found["n"] = 2
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        update(storage, "d", refuse)
    assert update(storage, "d", lambda found: found) == {"n": 1}
    assert storage.read("d").tag == tag
    storage.create("bad", b"{")
    with pytest.raises(UserError, match="not valid JSON") as e:
        read_document(storage, "bad")
    assert e.value.where.endswith("/bad")


def test_processes_write_a_folder_in_turn(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=append, args=(open_storage(tmp_path), writer, 25)) for writer in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0] * 4
    assert sorted(read_document(open_storage(tmp_path), "log")) == [
        [w, n] for w in range(4) for n in range(25)
    ]


def _write_for_ever(root: Path, ready: Any) -> None:
    storage = open_storage(root)
    storage.create("d", json.dumps([0] * 5000).encode())
    ready.set()
    while True:
        update(storage, "d", lambda found: [found[0] + 1] * 5000)


def test_a_writer_killed_leaves_a_whole_document_and_no_lock(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    for _ in range(5):
        ready = context.Event()
        writer = context.Process(target=_write_for_ever, args=(tmp_path, ready))
        writer.start()
        assert ready.wait(60)
        os.kill(writer.pid or 0, signal.SIGKILL)
        writer.join(60)
        storage = open_storage(tmp_path)
        found = read_document(storage, "d")
        assert found == [found[0]] * 5000
        assert storage.keys() == ["d"]
        storage.delete("d")
    assert sorted(os.listdir(tmp_path)) in ([".lock"], [".lock", ".new"])


def test_files_of_any_size(tmp_path: Path) -> None:
    storage = open_storage("memory://files")
    data = bytes(range(256)) * 50_000  # larger than one part of an upload
    (tmp_path / "file").write_bytes(data)
    storage.upload("a/file", tmp_path / "file")  # type: ignore[union-attr]
    storage.download("a/file", tmp_path / "copy")  # type: ignore[union-attr]
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(Missing):
        storage.download("a/none", tmp_path / "none")  # type: ignore[union-attr]
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="is not a key"):
        storage.download("../copy", tmp_path / "copy")  # type: ignore[union-attr]
    assert (tmp_path / "copy").read_bytes() == data


def test_a_folder_that_cannot_be_read_is_not_empty(tmp_path: Path) -> None:
    """As without the rights to it or with the file server away: what is there is not known."""
    storage = open_storage(tmp_path)
    storage.create("a/b", b"")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="cannot be used") as e:
        storage.keys("loop/")
    assert e.value.status == 503
    assert storage.keys("none/") == storage.keys("a/b/") == []


def test_a_bucket_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        storage = open_storage(f"s3://{NO_BUCKET}/prefix")
        for write in (lambda: storage.create("a", b""), lambda: create_document(storage, "a", {})):
            with pytest.raises(UserError, match="cannot be used") as e:
                write()
            assert e.value.status == 503
        assert not storage.replace("a", b"", '{"e_tag": "read before"}')


def test_places_that_cannot_be_used_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for location in ("ftp://host/x", "s3://", "file:///x"):
        with pytest.raises(UserError, match="no storage"):
            open_storage(location)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used") as e:
        open_storage(tmp_path / "file").create("a", b"")
    assert e.value.status == 503
    with socket.socket() as taken:  # nobody listens
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        monkeypatch.setattr("qwen_ray.object_storage._RETRY", {"max_retries": 0})
        with pytest.raises(UserError, match="cannot be used") as e:
            open_storage("s3://bucket/p").read("a")
    assert e.value.status == 503
