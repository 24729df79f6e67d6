"""The data benchmark's quick form: both sides keep the same records and make the same tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from qwen_ray.data.records import write_records
from tests.conftest import ROOT, sums


def test_quick_run(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="the comparison needs pip install .[benchmarks]")
    out, data = tmp_path / "result.json", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    write_records(data[0], sums(250))
    write_records(data[1], sums(400, seed=1, domain="more"))
    command = [sys.executable, str(ROOT / "benchmarks/data_pipeline.py"), "--quick"]
    command += ["--out", str(out), "--data", *map(str, data)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(out.read_text())

    pipeline, packing = result["pipeline"], result["packing"]
    assert set(pipeline["sides"]) == {"ours pipeline 1", "ours pipeline 2", "hf pipeline 1"}
    assert pipeline["made"]["amount"] == 600
    # The planted faults are gone, and more sums are asked twice.
    assert set(pipeline["made"]["kept"]) == {"sums", "more"}
    assert all(200 < kept < 276 for kept in pipeline["made"]["kept"].values())
    assert set(packing["sides"]) == {"ours packing 1", "trl packing 1"}
    assert packing["made"]["records"] == 400
    for part, unit in ((pipeline, "records"), (packing, "tokens")):
        for side in part["sides"].values():
            (turn,) = side["turns"]
            assert turn["amount"] == part["made"]["amount"]
            assert side[f"{unit}_per_second"] == pytest.approx(turn["amount"] / turn["seconds"])
            assert side["start_seconds"] > 0
    ours, trl = (side["turns"][0]["seconds"] for side in packing["sides"].values())
    assert result["headline"]["ratio"] == pytest.approx(trl / ours)
    assert set(result["ratios"]) == {
        "pipeline, best settings",
        "pipeline, 1 process",
        "packing, best settings",
        "packing, 1 process",
    }
