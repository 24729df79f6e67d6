"""Which rank failed first, and of what: the others only see that they lost it."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen_ray.fsio import read_json, write_json

log = logging.getLogger(__name__)

FOLDER = "errors"
# What a rank says when another one went away.
_CONSEQUENCES = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Gloo")


def clear(out: Path) -> None:
    """Forget the errors of an earlier start."""
    for path in (out / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def note(out: Path, rank: int, error: BaseException) -> None:
    """Write down a rank's error. The last start of the group counts."""
    root = _root(error)
    what = {"rank": rank, "time": time.time(), "error": _line(root)}
    path = out / FOLDER / f"rank-{rank:05d}.json"
    try:
        write_json(path, {**what, "traceback": traceback.format_exc()[-8000:]})
    except OSError as e:  # the disk may be what failed; the error itself must not be lost to this one
        log.error("cannot write %s: %s", path, e)


def explain(error: BaseException, out: Path) -> str:
    """One line: the rank that failed first and its error; causes before consequences."""
    notes: list[dict[str, Any]] = [read_json(path) for path in (out / FOLDER).glob("rank-*.json")]
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    # A rank that was killed left no note in its last start, but maybe one in a start before.
    notes = [n for n in notes if n["rank"] in failures and _of(n, failures[n["rank"]])]
    notes += [
        {"rank": rank, "time": 0.0, "error": _line(_root(failure))}
        for rank, failure in failures.items()
        if rank not in {n["rank"] for n in notes}
    ]
    if not notes and any(type(e).__name__ == "WorkerGroupStartupTimeoutError" for e in _chain(error)):
        return (
            "the cluster had no room for the workers within cluster.start_seconds: others may hold its "
            "resources, or its nodes have too few (see `ray status`)"
        )
    if not notes:
        return f"training failed: {_line(_root(error))}"
    first = min(notes, key=lambda n: (any(c in n["error"] for c in _CONSEQUENCES), n["time"]))
    path = out / FOLDER / f"rank-{first['rank']:05d}.json"
    where = f" (traceback in {path})" if "traceback" in first else ""
    return f"training failed on rank {first['rank']}: {first['error']}{where}"


def _of(note: dict[str, Any], failure: BaseException) -> bool:
    """Whether a note is of this failure, which holds the traceback."""
    return str(note["error"]).partition(": ")[2] in str(failure)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what caused it; Ray Train's controller wraps its own."""
    while error is not None:
        yield error
        error = getattr(error, "controller_failure", None) or error.__cause__


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
