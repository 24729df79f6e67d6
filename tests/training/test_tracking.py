"""What is written beside a run while it trains: lines that a kill tore, or that the disk had no room for."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest

from qwen_ray.training.tracking import METRICS, Lines, Tracker, read_examples, read_metrics
from tests.training.test_checkpoint import files_up_to
from tests.training.test_loop import config


def test_a_full_disk_costs_lines_and_not_the_run(
    tmp_path: Path, data_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The disk takes a part of the second line, none of the third, and has room again."""
    tracker = Tracker(tmp_path, config(data_file, tmp_path, "tracking.wandb=off"), "x")
    tracker({"step": 1})
    with files_up_to(len('{"step": 1}\n') + 5), caplog.at_level(logging.ERROR):
        for step in (2, 3):
            tracker({"step": step})
    for step in (4, 5):
        tracker({"step": step})
    tracker.close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 4, 5]
    (told,) = caplog.messages
    assert "metrics.jsonl lacks lines" in told


def test_a_line_that_a_kill_tore_costs_no_other(tmp_path: Path) -> None:
    path = tmp_path / "examples-0.jsonl"
    path.write_text('{"step": 1, "start": "a", "ids": ["x"]}\n{"step": 2, "st')
    lines = Lines(path)
    lines.write({"step": 2, "start": "b", "ids": ["y"]})
    lines.close()
    assert read_examples(tmp_path) == {1: ["x"], 2: ["y"]}


def test_a_line_is_json_whatever_the_numbers(tmp_path: Path, data_file: Path) -> None:
    tracker = Tracker(tmp_path, config(data_file, tmp_path, "tracking.wandb=off"), "x")
    tracker({"step": 1, "loss": 2.0, "grad_norm": math.inf})
    tracker.close()
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 1, "loss": 2.0}
