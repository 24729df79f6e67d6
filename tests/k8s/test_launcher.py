"""cluster/*.yaml, by Ray's own reading of them. More is checked by tests/manifests."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT

FILES = sorted((ROOT / "cluster").glob("*.yaml"))
each = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)


def test_there_is_one_for_each_place() -> None:
    assert [path.stem for path in FILES] == ["aws", "azure", "gcp", "on-premises"]


@each
def test_ray_accepts_it(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load(path.read_text())))
    assert path.read_text().startswith(f"# ray up cluster/{path.name}")


@each
def test_groups_have_spot_twins_and_one_is_on(path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    if tree["provider"]["type"] == "local":
        assert len(tree["provider"]["worker_ips"]) == tree["max_workers"] == tree["min_workers"]
        return
    types: dict[str, Any] = tree["available_node_types"]
    assert list(types) == [
        "head",
        *(f"gpu_{size}{spot}" for size in ("3b", "7b", "14b") for spot in ("", "_spot")),
    ]
    assert types["head"]["resources"] == {"CPU": 0}
    assert [name for name, group in types.items() if group["max_workers"]] == ["gpu_7b"]
    for name, group in types.items():
        if not name.endswith("_spot"):
            continue
        twin = types[name.removesuffix("_spot")]
        assert group["resources"] == twin["resources"]
        differs = {
            key for key in group["node_config"] if group["node_config"][key] != twin["node_config"].get(key)
        }
        (how,) = differs
        assert "spot" in str(group["node_config"][how]).lower()


def test_setup_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    script = ROOT / "cluster/setup.sh"
    done = subprocess.run(["bash", script, "smb", "x"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: nfs ADDRESS:/PATH, or mounted\n"
