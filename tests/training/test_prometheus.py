"""What a run tells Prometheus, and that a Ray agent exports it under the names that we say."""

from __future__ import annotations

import threading
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from qwen_ray import cluster
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json
from qwen_ray.training import prometheus
from qwen_ray.training.tracking import read_metrics
from tests.training.test_loop import config

Samples = dict[str, list[tuple[dict[str, str], float]]]


def test_a_run_is_known_by_its_folder_and_its_model(tmp_path: Path) -> None:
    settings = config(tmp_path, tmp_path / "biology", **{"model.name": "Qwen/Qwen2.5-7B-Instruct"})
    named = {"run": "biology", "run_id": "abc", "model": "Qwen2.5-7B-Instruct", "method": "lora"}
    assert prometheus.tags(settings, "abc") == named


def scrape(url: str) -> Samples:
    """By name: labels and value of each sample of ours."""
    with urllib.request.urlopen(url, timeout=10) as answer:
        text = answer.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "qwen_ray" in sample.name:
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@pytest.mark.cluster
def test_an_agent_exports_a_run_and_its_failure(
    tmp_path: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qwen_ray.training.driver import run_training

    monkeypatch.setenv("RAY_metrics_report_interval_ms", "1000")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cluster.connect(num_cpus=2)
    try:
        import ray

        (node,) = ray.nodes()
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        settings = config(
            data_file,
            tmp_path / "run",
            "optim.max_steps=300",
            "tracking.wandb=off",
            "evaluate.every_steps=50",
            **{"cluster.workers": 1},
        )
        seen: Samples = {}
        done = threading.Event()

        def watch() -> None:
            while not done.wait(0.5):
                seen.update(scrape(url))

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        began = time.time()
        run_training(settings)
        done.set()
        watching.join()
        run_id = read_json(tmp_path / "run" / "run.json")["id"]
        with pytest.raises(UserError), prometheus.failures_counted(settings, run_id):
            raise UserError("no such file")
        deadline = time.monotonic() + 30
        failures = f"ray_{prometheus.FAILURES}_total"
        while failures not in seen and time.monotonic() < deadline:
            time.sleep(0.5)
            seen.update(scrape(url))
    finally:
        cluster.disconnect()

    rows = {row["step"]: row for row in read_metrics(tmp_path / "run")}
    absent = {"mfu_4n", "mfu_6n", "forgetting/worst"}  # no GPU, and no suites
    expected = {f"ray_{prometheus.gauge_name(key)}" for key in prometheus.ROW if key not in absent}
    expected |= {f"ray_{prometheus.START}", f"ray_{prometheus.LAST_STEP}", failures}
    assert set(seen) == expected
    named = prometheus.tags(settings, run_id)
    for name, samples in seen.items():
        (labels, value), *others = samples
        assert not others, name
        assert labels.items() >= ({**named, "reason": "input"} if name == failures else named).items()
        if name == f"ray_{prometheus.gauge_name('loss')}":
            assert value in [row["loss"] for row in rows.values()]
    assert began < seen[f"ray_{prometheus.START}"][0][1] <= seen[f"ray_{prometheus.LAST_STEP}"][0][1]
