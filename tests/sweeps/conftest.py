from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from qwen_ray.sweeps.engine import EngineCore
from tests.sweeps.packed_example import VALUES, drive, example


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, Any]]:
    """The folder and the reports of the packed example, run without Ray and without a fault."""
    out = tmp_path_factory.mktemp("undisturbed")
    core = EngineCore(example(out), out, gang_seconds=120, lease_seconds=120)
    reports = drive(core, len(VALUES), 4)
    core.close()
    return out, reports
