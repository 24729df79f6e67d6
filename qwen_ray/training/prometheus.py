"""A run's metrics for Prometheus, by way of the Ray agent of the worker's node.

Ray puts ``ray_`` before each name. A worker reports to the agent what was set since its last report, and
the agent drops a gauge that two reports had not (20 s by default). So a thread sets all of them again and
again, and what a worker that is gone had said goes with it.

Light to import; only what is called needs Ray.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError

PREFIX = "qwen_ray_training_"
REFRESH_SECONDS = 1.0
"""The shortest interval of reports that Ray takes; the default is 10 s (``metrics_report_interval_ms``)."""

ROW = {
    "step": "Steps done.",
    "total_steps": "Steps that the run is to make.",
    "workers": "Workers that train.",
    "loss": "Nats per supervised token of the last step.",
    "eval_loss": "Nats per supervised token on held-out records, last evaluation.",
    "forgetting/worst": "Largest fall of a strength since the start, as a share of 1; last evaluation.",
    "learning_rate": "Of the last step.",
    "grad_norm": "Before clipping; last step.",
    "tokens_per_second": "Of all workers, without padding; last step.",
    "supervised_tokens_per_second": "Those that carry loss, of all workers; last step.",
    "mfu_4n": "Model FLOPs utilisation of the last step, 4N rule, as a share of 1.",
    "mfu_6n": "Model FLOPs utilisation of the last step, 6N rule, as a share of 1.",
}
"""Keys of a row of metrics that are exported where the row has them, and what they are."""
START, LAST_STEP = PREFIX + "start_timestamp_seconds", PREFIX + "last_step_timestamp_seconds"
ALLOCATED, PEAK = PREFIX + "gpu_memory_allocated_bytes", PREFIX + "gpu_memory_peak_bytes"
FAILURES = PREFIX + "failures"
"""A counter: exported with ``_total`` after its name."""
TAGS = ("run", "run_id", "model", "method")


def gauge_name(key: str) -> str:
    """Of the gauge of a row's key."""
    return PREFIX + key.replace("/", "_")


GAUGES = {
    **{gauge_name(key): text for key, text in ROW.items()},
    START: "When this start of the run began, Unix time. It changes with every restart and resize.",
    LAST_STEP: "When the last step ended, Unix time; before the first, when the run started.",
}
"""Of rank 0, by name: what each is."""
MEMORY_GAUGES = {
    ALLOCATED: "GPU memory of a worker's tensors.",
    PEAK: "The most that it has been since the worker started.",
}
"""Of every rank, with the tag ``rank``."""


def tags(config: RunConfig, run_id: str) -> dict[str, str]:
    """What tells a run from others. Of its folder, and of a model's, the last part."""
    run, model = (Path(name).name for name in (config.out, config.model.name))
    return dict(zip(TAGS, (run, run_id, model, config.method.name), strict=True))


class RunMetrics:
    """Exports what is known of a run from one of its workers until it is closed. Call it with each row of
    metrics, on rank 0."""

    def __init__(self, config: RunConfig, run_id: str, *, rank: int, device: Any = None) -> None:
        """``device``: the worker's ``torch.device``; memory is exported if it is a GPU."""
        from ray.util.metrics import Gauge

        self._tags, self._rank, self._device = tags(config, run_id), rank, device
        self._gauges = {name: Gauge(name, text, TAGS) for name, text in GAUGES.items()}
        self._memory = {name: Gauge(name, text, (*TAGS, "rank")) for name, text in MEMORY_GAUGES.items()}
        now = time.time()
        self._values = {START: now, LAST_STEP: now} if rank == 0 else {}
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="run-metrics", daemon=True)
        self._thread.start()

    def __call__(self, row: Mapping[str, Any]) -> None:
        known = {gauge_name(key): float(row[key]) for key in ROW if key in row}
        self._values = {**self._values, **known, LAST_STEP: time.time()}  # swapped whole: no lock

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _refresh(self) -> None:
        while True:
            for name, value in self._values.items():
                self._gauges[name].set(value, tags=self._tags)
            for name, value in self._memory_used().items():
                self._memory[name].set(value, tags={**self._tags, "rank": str(self._rank)})
            if self._closed.wait(REFRESH_SECONDS):
                return

    def _memory_used(self) -> dict[str, float]:
        if self._device is None or self._device.type != "cuda":
            return {}
        import torch

        return {
            ALLOCATED: torch.cuda.memory_allocated(self._device),
            PEAK: torch.cuda.max_memory_allocated(self._device),
        }


@contextlib.contextmanager
def failures_counted(config: RunConfig, run_id: str) -> Iterator[None]:
    """Counts an exception by its reason: ``not_finite`` (the loss or the gradient), ``input`` or ``failed``.

    For the driver, whose last report is sent when it leaves the cluster: workers are killed without one.
    """
    from ray.util.metrics import Counter

    try:
        yield
    except Exception as e:
        reasons = {FloatingPointError: "not_finite", UserError: "input"}
        reason = next((reason for kind, reason in reasons.items() if isinstance(e, kind)), "failed")
        counter = Counter(FAILURES, "Runs that ended with an error.", (*TAGS, "reason"))
        counter.inc(tags={**tags(config, run_id), "reason": reason})
        raise
