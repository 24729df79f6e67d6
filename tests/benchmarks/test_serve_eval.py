"""The quick form of the benchmark of evaluations: all sides answer alike, and the result is complete."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


@pytest.mark.cluster
@pytest.mark.long
def test_serve_eval(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "serve_eval.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(out.read_text())
    assert result["quick"]
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
