"""Jobs as they are shown."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from qwen_ray.jobs.api import OUT, VERB, Job


def row(job: Job) -> dict[str, Any]:
    """A job as JSON."""
    return {
        "name": job.name,
        "id": job.id,
        "attempt": job.attempt,
        "status": job.status,
        "verb": job.metadata.get(VERB),
        "out": job.metadata.get(OUT) or None,
        "exit_code": job.exit_code,
        "started": job.started,
        "ended": job.ended,
        "message": job.message,
        "entrypoint": job.entrypoint,
    }


def table(jobs: Sequence[Job]) -> str:
    """Jobs, a line each."""
    rows = [("job", "status", "started", "for", "out")]
    for job in jobs:
        seconds = (job.ended or time.time()) - (job.started or time.time())
        out = str(row(job)["out"] or "")
        code = f" ({job.exit_code})" if job.exit_code else ""
        rows.append((job.id, job.status + code, when(job.started), f"{seconds:.0f} s", out))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def when(seconds: float | None) -> str:
    """A time, as this machine's clock shows it."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds)) if seconds else "-"
