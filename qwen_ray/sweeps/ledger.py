"""What is known of a sweep's trials, in plain files: the truth that a resumed sweep is replayed from.

Each trial's folder holds ``trial.json`` (values, origin, state) and ``reports.jsonl`` (a report a line). A
process may die at any point: a file is the old one or the new one, and a line that was being written is as
good as not written. Each trial has one writer at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from qwen_ray.errors import UserError
from qwen_ray.fsio import fsync_dir, read_json, write_json

TRIALS, TRIAL, REPORTS = "trials", "trial.json", "reports.jsonl"
BASE_LOSSES = "base_losses.json"
"""Held-out losses of the base, in the sweep's folder."""
State = Literal["new", "running", "stopped", "done", "failed"]
"""``stopped``: early; ``done``: at its full length; ``failed``: see the error."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial: ``values`` maps dotted RunConfig keys to what they are set to; ``origin`` says who
    proposed them."""

    index: int
    values: dict[str, Any]
    origin: str
    state: State
    error: str | None
    folder: Path


class Ledger:
    """The trials below ``OUT/trials/``."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def folder(self, index: int) -> Path:
        """Where trial ``index`` is, or would be."""
        return self.out / TRIALS / f"{index:04d}"

    def trial(self, index: int) -> TrialRecord:
        """Trial ``index``; :class:`UserError` if it was never opened or its file is damaged."""
        folder = self.folder(index)
        found = read_json(folder / TRIAL)
        return TrialRecord(index, found["values"], found["origin"], found["state"], found["error"], folder)

    def has(self, index: int) -> bool:
        """Whether trial ``index`` has been opened."""
        return (self.folder(index) / TRIAL).is_file()

    def trials(self) -> list[TrialRecord]:
        """All trials, by index."""
        opened = (self.out / TRIALS).glob(f"*/{TRIAL}")
        return [self.trial(index) for index in sorted(int(path.parent.name) for path in opened)]

    def open(self, index: int, values: dict[str, Any], origin: str) -> TrialRecord:
        """Record a trial before it starts. One that is there stays as it is, and must be the same."""
        if self.has(index):
            known = self.trial(index)
            if known.values != json.loads(json.dumps(values)):
                raise UserError(
                    f"trial {index} was recorded with other values",
                    where=str(known.folder / TRIAL),
                    fix="resume the sweep as it was started, or choose another --out",
                )
            return known
        self._write(TrialRecord(index, values, origin, "new", None, self.folder(index)))
        return self.trial(index)

    def set_state(self, index: int, state: State, error: str | None = None) -> None:
        """Say how far a trial is; ``error`` in words, if it failed."""
        if state not in get_args(State):
            raise ValueError(f"{state} is not one of {get_args(State)}")
        known = self.trial(index)
        if (known.state, known.error) != (state, error):
            self._write(TrialRecord(index, known.values, known.origin, state, error, known.folder))

    def _write(self, trial: TrialRecord) -> None:
        fields = ("index", "values", "origin", "state", "error")
        write_json(trial.folder / TRIAL, {name: getattr(trial, name) for name in fields})

    def reports(self, index: int) -> list[dict[str, Any]]:
        """The reports of a trial, first to last."""
        return list(read_lines(self.folder(index) / REPORTS))

    def append_report(self, index: int, report: dict[str, Any]) -> None:
        """Add a report; it is on the disk when this returns."""
        append_line(self.folder(index) / REPORTS, report)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file that :func:`append_line` wrote; none if there is no file."""
    if path.is_file():
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last newline is torn
            yield json.loads(line)


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Add a line of JSON to a file that is read by :func:`read_lines`, and flush it to the disk.

    What a killed writer left of a line is cut off first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with open(path, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)
        f.write(json.dumps(value, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        f.flush()
        os.fsync(f.fileno())
    if new:
        fsync_dir(path.parent)
