"""The GPU benchmark's quick form: on a CPU it shows that the script works."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT


def test_quick_run(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu/train_step.py"), "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(out.read_text())
    lora, full, liger = result["rows"]
    for row in (lora, full):
        assert row["tokens_per_second"] > row["supervised_tokens_per_second"] > 0
        assert row["predicted_gib"]["total"] > 0
    assert full["loss_last"] < full["loss_first"] + 0.5
    assert "needs a GPU" in liger["failed"]
    assert set(result["attention_relative_error"]) == {
        f"{kind} {dtype}" for kind in ("documents", "block_mask") for dtype in ("float32", "bfloat16")
    }
    assert result["attention_relative_error"]["documents float32"]["output"] < 1e-5
    assert result["headline"]["setting"]["method"] == "lora"
