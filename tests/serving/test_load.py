"""The load benchmark, run briefly: more requests than the server can take. And its rule for flat memory."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.cluster
@pytest.mark.long
def test_too_much_load_is_refused_at_once_and_the_rest_answered(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "load.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "load.json").read_text())
    assert set(found["by_status"]) == {"200", "429"}, found["by_status"]
    assert found["429_without_retry_after"] == 0
    assert found["same_processes"]
    assert found["afterwards"] == {"200": 1}
    assert found["met"]["no_crash"]
    assert found["met"]["refused_not_late"]
    assert set(found["memory"]) == {"engine", "ingress", "proxy", "controller"}
    assert found["met"]["memory_flat"] == all(one["flat"] for one in found["memory"].values())
    assert found["cache_mib"]["filled"] >= 0.9 * found["cache_mib"]["limit"] == 0.9 * 4


@pytest.mark.parametrize(
    ("samples", "flat"),
    [
        ([100, 200, 250, 300] + [300] * 12, True),  # the beginning does not count
        ([300] * 4 + [300, 301, 299, 300, 310, 310, 310, 310, 314, 314, 314, 314], True),
        ([300] * 8 + [310] * 4 + [316, 316, 317, 400], False),
        ([300 + i for i in range(160)], False),
    ],
)
def test_flat_memory(samples: list[float], flat: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    benchmark = importlib.import_module("serve_load")
    assert benchmark.memory([float(mib) for mib in samples])["flat"] == flat
