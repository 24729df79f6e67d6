"""The committed configurations and tables are what the planner writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.config import build_config
from qwen_ray.planner import memory, programs
from qwen_ray.planner.hardware import GPUS
from qwen_ray.planner.layouts import USABLE
from qwen_ray.planner.shapes import shape_of
from qwen_ray.planner.shipped import MACHINES, METHODS, MODELS, files
from qwen_ray.planner.speed import HOST_CPUS

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_committed_files_are_what_is_written() -> None:
    wanted = files(ROOT)
    for path, text in wanted.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path}: run python -m qwen_ray.planner.shipped --write"
        )
    assert {p for p in wanted if p.suffix == ".yaml"} == set(CONFIGS)


def test_every_combination_is_in_the_table() -> None:
    table = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith(tuple(f"| {m} |" for m in MODELS))]
    assert len(rows) == len(MODELS) * len(METHODS) * len(MACHINES)
    missing = len(rows) - len(CONFIGS)
    assert sum("does not fit. What would: " in line for line in rows) == missing
    assert missing >= 1


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_loads_and_fits(path: Path) -> None:
    config = build_config(path)
    model, method, machine = path.stem.split("-", 2)
    gpus, nodes = MACHINES[machine]
    assert (config.model.name, config.method.name, config.cluster.workers) == (model, method, gpus * nodes)
    assert config.strategy.name != "auto"
    assert config.data.packing
    optim = config.optim
    assert optim.batch_size * optim.gradient_accumulation * gpus * nodes == max(32, 4 * gpus * nodes)
    offloads = config.strategy.offload_optimizer != "none"
    assert config.cluster.cpus_per_worker == (HOST_CPUS if offloads else 1)
    shape = shape_of(model)
    need = memory.predict(
        shape, programs.ours(config, shape, gpus * nodes), optim.batch_size * config.data.max_length
    )
    assert need.total <= USABLE * GPUS["h100-80gb"].memory
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0] == f"# qwen-ray train --config configs/{path.name} --data data/biology.jsonl"
    comment = " ".join(line[2:] for line in lines if line.startswith("# "))
    assert f"Predicted: {need.total / 1e9:.1f} GB of each GPU" in comment
    assert "tokens/s" in comment
