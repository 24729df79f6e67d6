"""The serving benchmarks' quick forms: all sides answer alike, and the results are complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def quick(script: str, out: Path) -> dict[str, Any]:
    command = [sys.executable, str(ROOT / "benchmarks" / script), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["quick"]
    return result


@pytest.mark.cluster
@pytest.mark.slow
def test_serve_eval(tmp_path: Path) -> None:
    result = quick("serve_eval.py", tmp_path / "result.json")
    assert (
        set(result["comparisons"]) == {"our client", "four adapters", "stock client"} == set(result["goals"])
    )
    for name, found in result["comparisons"].items():
        assert found["agreement"]["largest_difference_nats"] < found["agreement"]["allowed"]
        assert found["agreement"]["greedy_flags_differing"] == 0
        (ours,), (theirs,) = found["runs"]["ours"], found["runs"]["theirs"]
        assert found["ratio"] == pytest.approx(theirs["seconds"] / ours["seconds"])
        scored = 160 * (4 if name == "four adapters" else 1)
        assert found["per_second"]["ours"] == pytest.approx(scored / ours["seconds"])
    assert result["headline"]["ratio"] == result["comparisons"]["our client"]["ratio"]


@pytest.mark.cluster
@pytest.mark.slow
def test_serve_generate(tmp_path: Path) -> None:
    result = quick("serve_generate.py", tmp_path / "result.json")
    assert [row["clients"] for row in result["rows"]] == [1, 8]
    for row in result["rows"]:
        rates = row["tokens_per_second"]
        best = max(rates["transformers mixed"], rates["transformers sorted"])
        assert row["over_transformers"]["http"] == pytest.approx(rates["http"] / best)
        assert set(row["over_transformers"]) == {"http", "http streamed", "engine"}
        assert max(row["prompts_differing"].values()) <= 0.02
