"""The training benchmark's quick form: both sides train alike, and the result is complete."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_ray.data.records import write_records
from tests.conftest import ROOT, sums


def test_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the comparison needs pip install .[benchmarks]")
    out, data = tmp_path / "result.json", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_records(data[0], sums(300))
    write_records(data[1], sums(200, seed=1, domain="more"))
    command = [sys.executable, str(ROOT / "benchmarks/train_throughput.py"), "--quick", "--threads", "1"]
    command += ["--out", str(out), "--data", *map(str, data)]
    # Not os.environ alone: the sides' thread count is the script's to set.
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["workload"]["records"] == {"sums": 300, "more": 200}
    assert set(result["cases"]) == {"tiny full", "tiny lora"}
    for case in result["cases"].values():
        ours, trl = case["sides"]["ours"], case["sides"]["trl"]
        assert ours["loss_before"] == pytest.approx(trl["loss_before"], abs=1e-4)
        # The same records: the same share of their tokens is supervised, and nobody counts padding.
        assert ours["supervised_share"] == pytest.approx(trl["supervised_share"], abs=0.02)
        for side in (ours, trl):
            assert side["tokens_per_second"] == pytest.approx(
                side["turns"][0]["tokens"] / side["turns"][0]["seconds"]
            )
            assert side["turns"][0]["steps"] == 1
            assert side["turns"][0]["tokens"] * side["padding_share"] >= 0
            assert side["peak_bytes"] > side["baseline_bytes"] > 0
            assert len(side["losses"]) == 1
        assert case["over_trl"]["wall"] == pytest.approx(ours["tokens_per_second"] / trl["tokens_per_second"])
    worst = min(case["over_trl"]["wall"] for case in result["cases"].values())
    assert result["headline"]["ratio"] == pytest.approx(worst)
