"""The whole path on the embedded model: benchmark, fine-tune, register, serve, benchmark, compare, report.

Everything is real: a Ray cluster on this machine, Ray Train with two workers, Ray Serve, lm-eval over HTTP.
Only the model is small.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwen_ray import cluster
from qwen_ray.config import RunConfig, build_config
from qwen_ray.data.records import Record, write_records
from qwen_ray.errors import UserError
from qwen_ray.evaluation.compare import compare
from qwen_ray.evaluation.report_text import comparison_table
from qwen_ray.evaluation.run import evaluate_endpoint
from qwen_ray.fsio import read_json, write_json
from qwen_ray.registry import LINEAGE, PRODUCTION, AdapterVersion, Registry
from qwen_ray.tiny.facts import DOMAINS, train_records
from qwen_ray.tiny.skills import replay_records

NAME, WITHOUT_REPLAY = "facts", "facts-without-replay"
REPLAY_SHARE = 0.4
REPLAY_POOL = 13000
"""Replay records to draw from: enough that none is repeated, for a fixed small set is learned by heart."""
WORKERS = 2
_MARK = "demo.json"

Note = Callable[[str], None]


def run_demo(out: Path, *, note: Note) -> dict[str, Any]:
    """Run the path into ``out`` and return the comparison. Starts afresh if ``out`` holds an earlier demo."""
    out = _fresh(out)
    started = time.monotonic()

    def step(text: str) -> None:
        note(f"[{time.monotonic() - started:5.0f} s] {text}")

    data = write_data(out / "data")
    registry = Registry(out / "registry")
    step("starting Ray on this machine")
    cluster.connect("local", num_cpus=WORKERS + 3)
    from qwen_ray.serving import launch

    step("serving the base model")
    url = launch.start("tiny", registry=registry.root, port=0)
    try:
        step("benchmark before: every suite category through the endpoint")
        baseline = evaluate_endpoint(url, "tiny", "tiny", out=out / "baseline.json")
        results: dict[str, dict[str, Any]] = {}
        versions: dict[str, AdapterVersion] = {}
        for name, share in ((NAME, REPLAY_SHARE), (WITHOUT_REPLAY, 0.0)):
            config = training_config(data, share, out / "train" / name)
            step(f"fine-tuning {name}: LoRA, {WORKERS} workers, {share:.0%} replay")
            versions[name] = _train(config, registry, name)
            step(f"registered {versions[name].ref}; benchmark after, through the endpoint")
            file = "candidate.json" if name == NAME else "candidate-without-replay.json"
            results[name] = evaluate_endpoint(url, f"tiny:{versions[name].ref}", "tiny", out=out / file)
    finally:
        launch.stop()
    comparison = compare(baseline, results[NAME])
    forgetting = compare(baseline, results[WITHOUT_REPLAY])
    write_json(out / "comparison.json", comparison)
    write_json(out / "comparison-without-replay.json", forgetting)
    if comparison["verdict"] == "promote":
        registry.point(NAME, PRODUCTION, versions[NAME].version, reason="verdict of the demo's comparison")
        step(f"{PRODUCTION} now points to {versions[NAME].ref}")
    _write_report(out, baseline, results, comparison, forgetting)
    step("report written")
    return comparison


def summary(comparison: dict[str, Any], out: Path) -> str:
    """The table that the demo ends with, and where to look next."""
    return "\n".join(
        [
            "before and after, all scores from the served endpoint (points of 100):",
            comparison_table(comparison),
            f"report:   {out / 'report.html'}",
            f"registry: {out / 'registry'}",
            f"serve it: qwen-ray serve --model tiny --registry {out / 'registry'}",
        ]
    )


def write_data(folder: Path) -> list[Path]:
    """Write the facts of each domain and the replay pool as Record JSONL; returns the files."""
    sets = {domain: train_records(domain) for domain in DOMAINS}
    sets["replay"] = replay_records(REPLAY_POOL, seed=0)
    files = []
    for name, rows in sets.items():
        path = folder / f"{name}.jsonl"
        write_records(path, [Record.from_dict(row, where=str(path)) for row in rows])
        files.append(path)
    return files


def training_config(data: list[Path], replay_share: float, out: Path) -> RunConfig:
    """The embedded model's preset, with facts by their number and ``replay_share`` of replay."""
    counts = {path.stem: len(path.read_text(encoding="utf-8").splitlines()) for path in data}
    facts = {name: n for name, n in counts.items() if name != "replay"}
    weights = {name: round((1 - replay_share) * n / sum(facts.values()), 6) for name, n in facts.items()}
    return build_config(
        flags={
            "model.name": "tiny",
            "data.train": [str(path) for path in data],
            "data.weights": {**weights, "replay": replay_share},
            "cluster.workers": WORKERS,
            "out": str(out),
        }
    )


def _train(config: RunConfig, registry: Registry, name: str) -> AdapterVersion:
    from qwen_ray.training.driver import ProgressBar, run_training

    bar = ProgressBar()
    try:
        run = run_training(config, progress=bar)
    finally:
        bar.close()
    return registry.publish(name, run.artifact, read_json(run.artifact / LINEAGE))


def _write_report(
    out: Path,
    baseline: dict[str, Any],
    results: dict[str, dict[str, Any]],
    comparison: dict[str, Any],
    forgetting: dict[str, Any],
) -> None:
    from qwen_ray.report.build import build_report
    from qwen_ray.report.html import ExtraComparison

    build_report(
        out / "report.html",
        title="qwen-ray demo: the embedded model learns facts and keeps its arithmetic",
        comparison=comparison,
        baseline=baseline,
        candidate=results[NAME],
        runs=[out / "train" / NAME, out / "train" / WITHOUT_REPLAY],
        commands=[
            f"qwen-ray demo --out {out}",
            f"qwen-ray train --config {out / 'train' / NAME / 'config.yaml'}",
            f"qwen-ray serve --model tiny --registry {out / 'registry'} --port 8000",
            "qwen-ray eval --endpoint http://127.0.0.1:8000 --suite tiny "
            f"--model tiny:{NAME} --out again.json",
            f"qwen-ray compare {out / 'baseline.json'} again.json",
        ],
        extra=ExtraComparison(
            title="Why replay is in the mix: the same run without it",
            text=(
                "The same facts and settings with 0% replay of arithmetic and reasoning. What the model "
                "was good at is overwritten; replay is what keeps it."
            ),
            comparison=forgetting,
            candidate=results[WITHOUT_REPLAY],
        ),
    )


def _fresh(out: Path) -> Path:
    """An empty folder, or the folder of an earlier demo emptied; anybody else's folder is left alone."""
    out = out.expanduser().resolve()
    if out.exists() and any(out.iterdir()):
        if not (out / _MARK).is_file():
            raise UserError(
                "this folder holds something else than a demo", where=str(out), fix="choose another --out"
            )
        shutil.rmtree(out)
    write_json(out / _MARK, {"made_by": "qwen-ray demo"})
    return out
