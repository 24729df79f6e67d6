"""The demo and the quick start, run as a user runs them, and what they must leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwen_ray import models
from qwen_ray.fsio import read_json
from qwen_ray.registry import PRODUCTION, Registry
from tests.test_cli import qwen_ray

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("demo") / "run"
    argv = [sys.executable, "-m", "qwen_ray.cli", "demo", "--out", str(out), "--json"]
    return out, subprocess.run(argv, capture_output=True, text=True, timeout=580, check=False)


def test_demo_promotes(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = demo
    assert done.returncode == 0, done.stderr[-3000:]
    comparison = json.loads(done.stdout)
    assert comparison == read_json(out / "comparison.json")
    assert comparison["verdict"] == "promote"
    registry = Registry(out / "registry")
    assert registry.resolve("facts").ref == "facts@1"
    assert registry.aliases("facts") == {PRODUCTION: 1}
    registry.verify(registry.resolve("facts"))


def test_demo_learns_and_keeps(demo: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    categories = read_json(demo[0] / "comparison.json")["categories"]
    rows: dict[str, dict[str, Any]] = {row["name"]: row for row in categories}
    assert set(rows) == {"biology", "history", "security", "arithmetic", "reasoning"}
    for row in rows.values():
        assert {"name", "role", "n", "baseline", "candidate", "delta", "delta_ci"} < set(row)
        assert row["delta_ci"][0] < row["delta"] < row["delta_ci"][1]
    for name in ("biology", "history", "security"):
        assert rows[name]["role"] == "target"
        assert rows[name]["n"] >= 150
        assert rows[name]["delta"] >= 0.30
        assert rows[name]["delta_ci"][0] > 0
    for name in ("arithmetic", "reasoning"):
        assert rows[name]["role"] == "strength"
        assert rows[name]["delta"] >= -0.04


def test_without_replay_it_forgets_and_the_report_says_so(demo: tuple[Path, Any]) -> None:
    out, _ = demo
    comparison = read_json(out / "comparison-without-replay.json")
    rows = {row["name"]: row for row in comparison["categories"]}
    assert comparison["verdict"] == "regress"
    assert rows["arithmetic"]["delta_ci"][1] < -0.2
    page = (out / "report.html").read_text()
    assert "Why replay is in the mix" in page


def test_the_control_stays_at_chance(demo: tuple[Path, Any]) -> None:
    (control,) = read_json(demo[0] / "comparison.json")["controls"]
    assert control["n"] >= 60
    assert abs(control["candidate"] - 0.25) < 0.15


def test_every_score_came_through_the_endpoint(demo: tuple[Path, Any]) -> None:
    out, _ = demo
    before, after = read_json(out / "baseline.json"), read_json(out / "candidate.json")
    assert before["settings"]["endpoint"] is after["settings"]["endpoint"] is True
    assert (before["model"], before["adapter"]) == ("tiny", None)
    assert (after["model"], after["adapter"]) == ("tiny", "facts@1")
    assert [i["id"] for i in before["items"]] == [i["id"] for i in after["items"]]


def test_the_served_adapter_is_the_trained_one(demo: tuple[Path, Any]) -> None:
    out, _ = demo
    version = Registry(out / "registry").resolve("facts")
    name = "adapter_model.safetensors"
    assert (version.path / name).read_bytes() == (out / "train" / "facts" / "adapter" / name).read_bytes()
    assert version.lineage["base"]["fingerprint"] == models.fingerprint(models.resolve("tiny"))


def test_the_demo_does_not_empty_a_folder_of_yours(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("ten years of work")
    done = qwen_ray("demo", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "choose another --out" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "ten years of work"


@pytest.mark.shared
@pytest.mark.long
def test_quick_start_on_public_data(shared_data: Path, tmp_path: Path) -> None:
    """The commands of the README, on real data and the embedded model."""
    source = f"openstax_biology={shared_data / 'openstax_biology'}"
    guide = ("--suite", "guide", "--data-dir", str(shared_data), "--limit", "20")
    commands = [
        ("data", "prepare", "--domain", "biology", "--source", source, "--size", "1000",
         "--out", "data/biology.jsonl"),
        ("train", "--model", "tiny", "--method", "lora", "--data", "data/biology.jsonl", "--workers", "2",
         "--steps", "50", "--out", "runs/bio"),
        ("eval", "--model", "tiny", *guide, "--out", "runs/base.json"),
        ("eval", "--model", "tiny", "--adapter", "runs/bio/adapter", *guide, "--out", "runs/bio.json"),
    ]  # fmt: skip
    for command in commands:
        done = qwen_ray(*command, cwd=tmp_path)
        assert done.returncode == 0, f"{command[0]}: {done.stderr[-3000:]}"
    assert len((tmp_path / "data" / "biology.jsonl").read_text().splitlines()) == 1000
    done = qwen_ray("compare", "runs/base.json", "runs/bio.json", cwd=tmp_path)
    assert done.returncode == 3  # a million parameters and 50 steps do not answer MMLU, and the gate knows
    assert "verdict: " in done.stdout
    done = qwen_ray(
        "report", "runs/base.json", "runs/bio.json", "--run", "runs/bio", "--out", "report.html", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "<svg" in (tmp_path / "report.html").read_text()
