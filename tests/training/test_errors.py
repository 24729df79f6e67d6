"""Which rank failed first, and of what."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from ray.train.v2._internal.util import construct_user_exception_with_traceback
from ray.train.v2.api.exceptions import WorkerGroupError

from qwen_ray.training import errors


def fail(out: Path, rank: int, error: Exception) -> Exception:
    """What Ray Train reports of a rank that raised ``error`` and noted it."""
    try:
        raise error
    except Exception as e:
        errors.note(out, rank, e)
        reported: Exception = construct_user_exception_with_traceback(e)
        return reported


def test_the_cause_comes_before_its_consequences(tmp_path: Path) -> None:
    failures = {
        0: fail(tmp_path, 0, RuntimeError("[gloo] Connection closed by peer [127.0.0.1]:1")),
        1: fail(tmp_path, 1, OSError(28, "No space left on device")),
    }
    text = errors.explain(WorkerGroupError("", failures), tmp_path)
    assert text.startswith("training failed on rank 1: OSError: [Errno 28] No space left on device")
    assert "rank-00001.json" in text


def test_a_note_of_an_earlier_start_is_not_taken_for_the_last(tmp_path: Path) -> None:
    fail(tmp_path, 1, ValueError("of the first start"))
    text = errors.explain(WorkerGroupError("", {1: RuntimeError("the worker was killed")}), tmp_path)
    assert text == "training failed on rank 1: RuntimeError: the worker was killed"


def test_an_error_is_reported_where_its_note_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / errors.FOLDER).touch()  # no folder can be made here
    with caplog.at_level(logging.ERROR):
        failures = {2: fail(tmp_path, 2, ValueError("the cause"))}
    assert "cannot write" in caplog.text
    assert "the cause" in errors.explain(WorkerGroupError("", failures), tmp_path)
