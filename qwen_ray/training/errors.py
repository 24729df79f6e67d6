"""Which rank failed first, and of what: the others only see that they lost it."""

from __future__ import annotations

import time
import traceback
from pathlib import Path
from typing import Any

from qwen_ray.fsio import read_json, write_json

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
    write_json(out / FOLDER / f"rank-{rank:05d}.json", {**what, "traceback": traceback.format_exc()[-8000:]})


def explain(error: BaseException, out: Path) -> str:
    """One line: the rank that failed first and its error; causes before consequences."""
    notes: list[dict[str, Any]] = [read_json(path) for path in (out / FOLDER).glob("rank-*.json")]
    failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
    notes = [n for n in notes if n["rank"] in failures]
    notes += [
        {"rank": rank, "time": 0.0, "error": _line(_root(failure))}
        for rank, failure in failures.items()
        if rank not in {n["rank"] for n in notes}
    ]
    if not notes:
        return f"training failed: {_line(_root(error))}"
    first = min(notes, key=lambda n: (any(c in n["error"] for c in _CONSEQUENCES), n["time"]))
    path = out / FOLDER / f"rank-{first['rank']:05d}.json"
    where = f" (traceback in {path})" if path.is_file() else ""
    return f"training failed on rank {first['rank']}: {first['error']}{where}"


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _line(error: BaseException) -> str:
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"
