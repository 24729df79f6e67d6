"""cluster/*.yaml, by Ray's own reading of them. More is checked by tests/manifests."""

from __future__ import annotations

import os
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


def test_setup_installs_again_what_has_changed(tmp_path: Path) -> None:
    source, log, broken = tmp_path / "source", tmp_path / "log", tmp_path / "broken"
    storage = tmp_path / "storage"
    files = {
        "cluster/setup.sh": (ROOT / "cluster/setup.sh").read_text().replace("/storage", str(storage)),
        "docker/requirements.lock": "# torch 2.0.1 first\nray==2.60.0\n",
        "pyproject.toml": "[project]\n",
        "qwen_ray/deep/er.py": "one = 1\n",
        "bin/python3": '#!/bin/bash\nmkdir -p "$3/bin" && cp "$(dirname "$0")/pip" "$3/bin/pip"\n',
        "bin/pip": f'#!/bin/bash\necho "$@" >> {log}\n[[ ! -e {broken} ]]\n',
    }
    for name, text in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text)
        (source / name).chmod(0o755)
    storage.mkdir()

    def installs() -> int:
        log.write_text("")
        environment = {"HOME": str(tmp_path), "PATH": f"{source}/bin:{os.environ['PATH']}"}
        argv = ["bash", str(source / "cluster/setup.sh"), "mounted"]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) is not broken.exists(), done.stderr
        return len(log.read_text().splitlines())

    assert installs() == 2
    assert log.read_text().splitlines()[0] == "install --quiet torch==2.0.1"
    assert installs() == 0
    for name in ("docker/requirements.lock", "pyproject.toml", "qwen_ray/deep/er.py"):
        (source / name).write_text(files[name] + "# changed\n")
        assert (installs(), installs()) == (2, 0), name
    (source / "qwen_ray/deep/er.py").rename(source / "qwen_ray/er.py")
    broken.touch()
    assert installs() == 1
    broken.unlink()
    assert (installs(), installs()) == (2, 0)
    assert (tmp_path / ".bashrc").read_text().count("qwen-ray") == 1
