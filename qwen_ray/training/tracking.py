"""Where a run's metrics go: a JSONL file beside it, and wandb."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from qwen_ray.config import RunConfig

METRICS = "metrics.jsonl"
EXAMPLES = "examples-{rank}.jsonl"


class Tracker:
    """Writes each dict of metrics as a line and to wandb. Lives on rank 0 only.

    ``run_id`` names the wandb run, so that a resumed run goes on in the same one. With ``group`` it is one of
    a group of runs, of which a process may have several at a time.
    """

    def __init__(self, out: Path, config: RunConfig, run_id: str, *, group: str | None = None) -> None:
        path = out / METRICS
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if torn:  # the line that a killed worker was writing
            self._file.write("\n")
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
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in metrics.items() if k != "step"}, step=metrics["step"])

    def close(self) -> None:
        self._file.close()
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
