"""The load benchmark, run briefly: more requests than the server can take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve_load.py"


@pytest.mark.cluster
@pytest.mark.slow
def test_too_much_load_is_refused_at_once_and_the_rest_answered(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--out", str(tmp_path / "load.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "load.json").read_text())
    assert set(found["by_status"]) == {"200", "429"}, found["by_status"]
    assert found["429_without_retry_after"] == 0
    assert found["same_processes"]
    assert found["afterwards"] == {"200": 1}
