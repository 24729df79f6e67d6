"""Where a run's metrics go: a JSONL file beside it, and wandb."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from qwen_ray.config import RunConfig

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
EXAMPLES = "examples-{rank}.jsonl"


class Lines:
    """JSON objects appended to a file, one a line, while training goes on.

    One that cannot be written, as on a full disk, is lost, and the log says so once.
    """

    def __init__(self, path: Path) -> None:
        """Raises ``OSError`` where the file cannot be opened."""
        self._path = path
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 - closed by close()
        self._whole = self._told = False

    def write(self, row: dict[str, Any]) -> None:
        try:
            if not self._whole:
                self._end_line()
            self._whole = False
            self._append(json.dumps(row).encode() + b"\n")
            self._whole = True
        except OSError as e:
            self._tell(e)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as e:  # storage over a network may say only now that it is full
            self._tell(e)

    def _end_line(self) -> None:
        """End the line that a killed worker, or a full disk, left torn."""
        if self._file.seek(0, os.SEEK_END):
            self._file.seek(-1, os.SEEK_END)
            if self._file.read(1) != b"\n":
                self._append(b"\n")

    def _append(self, data: bytes) -> None:
        while data:  # a disk that is nearly full takes a part
            data = data[self._file.write(data) :]

    def _tell(self, error: OSError) -> None:
        if not self._told:
            log.error("%s lacks lines from here on, and training goes on: %s", self._path, error)
        self._told = True


class Tracker:
    """Writes each dict of metrics as a line and to wandb. Lives on rank 0 only.

    ``run_id`` names the wandb run, so that a resumed run goes on in the same one. With ``group`` it is one of
    a group of runs, of which a process may have several at a time.
    """

    def __init__(self, out: Path, config: RunConfig, run_id: str, *, group: str | None = None) -> None:
        self._lines = Lines(out / METRICS)
        self._wandb: Any = None
        mode = wandb_mode(config.tracking.wandb)
        if mode != "off":
            import wandb

            self._wandb = wandb.init(
                project=config.tracking.project,
                name=out.name,
                group=group,
                reinit="create_new" if group else None,
                id=run_id,
                resume="allow",
                mode=mode,
                dir=str(out),
                config=config.model_dump(mode="json"),
                settings=wandb.Settings(silent=True, console="off"),
            )

    def __call__(self, metrics: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity.
        self._lines.write({k: v for k, v in metrics.items() if not isinstance(v, float) or math.isfinite(v)})
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def close(self) -> None:
        self._lines.close()
        if self._wandb is not None:
            self._wandb.finish()


Mode = Literal["online", "offline", "off"]


def wandb_mode(setting: Literal["auto", "online", "offline", "off"]) -> Mode:
    """``online``, ``offline`` or ``off``; ``auto`` asks whether there is a key to log in with."""
    if setting != "auto":
        return setting
    asked: dict[str, Mode] = {"online": "online", "offline": "offline", "disabled": "off"}
    if os.environ.get("WANDB_MODE") in asked:
        return asked[os.environ["WANDB_MODE"]]
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    logged_in = netrc.is_file() and "api.wandb.ai" in netrc.read_text(errors="replace")
    return "online" if os.environ.get("WANDB_API_KEY") or logged_in else "offline"


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The metrics of a run by step. Steps that were repeated after a failure count once, the last time."""
    path = out / METRICS
    if not path.is_file():
        return []
    by_step = {row["step"]: row for row in _rows(path)}
    return [by_step[step] for step in sorted(by_step)]


class MetricsTail:
    """Rows of a run's metrics as they are appended, each once."""

    def __init__(self, out: Path) -> None:
        self._path, self._read = out / METRICS, 0

    def rows(self) -> list[dict[str, Any]]:
        """Those since the last call; a line that is being written waits for the next."""
        try:
            with open(self._path, "rb") as f:
                f.seek(self._read)
                whole = f.read().rpartition(b"\n")[0]
        except FileNotFoundError:
            return []
        if not whole:
            return []
        self._read += len(whole) + 1
        return list(_parsed(whole.decode("utf-8")))


def read_examples(out: Path) -> dict[int, list[str]]:
    """Step to the ids of the records that were trained on in it (``tracking.examples``), sorted.

    Of a step that was repeated after a failure the last time counts, with the ranks there were then.
    """
    by_step: dict[int, dict[str, list[str]]] = {}
    last: dict[int, str] = {}
    for path in sorted(out.glob(EXAMPLES.format(rank="*"))):
        for row in _rows(path):
            by_step.setdefault(row["step"], {}).setdefault(row["start"], []).extend(row["ids"])
            if path.name == EXAMPLES.format(rank=0):
                last[row["step"]] = row["start"]
    return {step: sorted(by_step[step][start]) for step, start in sorted(last.items())}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    return _parsed(path.read_text(encoding="utf-8"))


def _parsed(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # torn by a kill
            yield json.loads(line)
