"""The parts of the sources spread over a Ray cluster by Ray Data, each a task of its own.

Only what was done comes back; the shards are written to the work folder, which every node must mount.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from qwen_ray import cluster
from qwen_ray.data.preparation.parts import Part, Task, work
from qwen_ray.errors import UserError


def run_parts(
    parts: Sequence[Part],
    task: Task,
    version: str,
    *,
    workers: int,
    address: str | None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """:func:`~qwen_ray.data.preparation.parts.work` on every part, ``workers`` at once.

    Raises the first :class:`UserError` of a part; a task whose process dies is tried again by Ray.
    """
    cluster.connect(address, num_cpus=workers)
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    rows = ray.data.from_items([{"part": asdict(part)} for part in parts], override_num_blocks=len(parts))
    done = rows.map(_Work(task, version), compute=ray.data.TaskPoolStrategy(size=min(workers, len(parts))))
    for number, row in enumerate(done.iter_rows(), start=1):
        if row["what"]:
            raise UserError(row["what"], where=row["where"], fix=row["fix"])
        if progress:
            progress(number, len(parts))


class _Work:
    """One task. An error goes back as its words: Ray would wrap it in a traceback."""

    def __init__(self, task: Task, version: str) -> None:
        self._task, self._version = task, version

    def __call__(self, row: dict[str, Any]) -> dict[str, str]:
        span = row["part"]["span"]
        part = Part(**{**row["part"], "span": tuple(span) if span else None})
        try:
            work(part, self._task, self._version)
        except UserError as e:
            return {"what": e.what, "where": e.where, "fix": e.fix}
        return {"what": "", "where": "", "fix": ""}
