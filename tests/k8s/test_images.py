"""docker/: what can be known of images without building them."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

DOCKER = ROOT / "docker"


@pytest.fixture(scope="module")
def packages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packages", DOCKER / "packages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def stages() -> dict[str, list[str]]:
    """Instructions of each stage of the Dockerfile, by the stage's name."""
    text = re.sub(r"\\\n", " ", (DOCKER / "Dockerfile").read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, list[str]] = {"": []}
    for line in lines:
        if match := re.fullmatch(r"FROM (\S+) AS (\S+)", line):
            found[match[2]] = [line]
        else:
            found[list(found)[-1]].append(line)
    return found


def test_dockerfile_ends_without_root_and_takes_only_what_is_there() -> None:
    found = stages()
    assert list(found) == ["", "build", "build-train", "build-serve", "runtime", "serve", "train"]
    for target in ("serve", "train"):
        assert found[target][-1] == "USER 1000:1000"
    (base,) = found[""]
    assert re.fullmatch(r"ARG BASE=python:3\.\d+\.\d+-slim-bookworm", base), "pinned to a release"
    kept = [line.removeprefix("!") for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines()]
    for lines in found.values():
        assert not any("latest" in line for line in lines)
        assert not any(re.match(r"(ENV|ARG)\b.*(TOKEN|PASSWORD|SECRET|API_KEY)", line) for line in lines)
        for line in lines:
            if line.startswith("COPY") and "--from" not in line:
                for source in line.split()[1:-1]:
                    assert (ROOT / source).exists(), source
                    assert source in kept, f"{source}: left out by Dockerfile.dockerignore"


def test_training_finds_its_compilers() -> None:
    """g++ brings gcc: DeepSpeed compiles its optimizer on the host at first use, and with libaio its reads
    and writes of NVMe; Triton its kernels."""
    (installs,) = (line for line in stages()["train"] if "apt-get install" in line)
    assert {"g++", "libaio-dev", "libc6-dev"} <= set(installs.split())
    assert not any("g++" in line for line in stages()["serve"])


def test_scripts_are_bash() -> None:
    for script in (DOCKER / "build.sh", ROOT / "cluster/setup.sh"):
        subprocess.run(["bash", "-n", str(script)], check=True)


def test_lock_holds_every_dependency_within_its_range(packages: ModuleType) -> None:
    rows = [
        line for line in (DOCKER / "requirements.lock").read_text().splitlines() if not line.startswith("#")
    ]
    locked = dict(row.split("==") for row in rows)
    assert list(locked) == sorted(locked)
    assert not {"torch", "triton", "pytest", "ruff"} & set(locked)
    table = packages.tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = table["optional-dependencies"]
    for text in (*table["dependencies"], *extras["rag"], *extras["gpu"]):
        requirement = Requirement(text)
        name = packages.canonical(requirement.name)
        if name not in ("torch", "qwen-ray"):
            fix = "python docker/packages.py lock --extra rag --extra gpu --out docker/requirements.lock"
            assert name in locked, f"{name} is not in the lock: {fix}"
            assert requirement.specifier.contains(locked[name]), f"{text}, locked at {locked[name]}: {fix}"


def test_torch_is_the_same_everywhere(packages: ModuleType) -> None:
    (release,) = re.findall(r"^ARG TORCH=(.+)$", (DOCKER / "Dockerfile").read_text(), re.MULTILINE)
    (noted,) = re.findall(r"torch ([\d.]*\d)", (DOCKER / "requirements.lock").read_text())
    (make,) = re.findall(r"^TORCH := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert release == noted == make


def test_needs_are_followed_through_extras(packages: ModuleType) -> None:
    names = {packages.canonical(name) for name in packages.project(["rag"])}
    assert {"ray", "lancedb", "sentence-transformers"} <= names  # the last by qwen-ray[embeddings]
    assert {"aiohttp-cors", "uvicorn"} <= names  # by ray[serve]
    with pytest.raises(SystemExit, match="no extra 'nothing'"):
        list(packages.project(["nothing"]))


def test_bill_of_materials_is_whole(packages: ModuleType) -> None:
    bom: dict[str, Any] = packages.sbom()
    assert (bom["bomFormat"], bom["specVersion"]) == ("CycloneDX", "1.6")
    references = [component["bom-ref"] for component in (bom["metadata"]["component"], *bom["components"])]
    assert len(references) == len(set(references)) > 100
    assert {entry["ref"] for entry in bom["dependencies"]} == set(references)
    of = {entry["ref"].partition("@")[0]: entry["dependsOn"] for entry in bom["dependencies"]}
    assert any(other.startswith("pkg:pypi/safetensors@") for other in of["pkg:pypi/transformers"])
    assert all(set(needs) <= set(references) for needs in of.values())
    licensed = sum("licenses" in component for component in bom["components"])
    assert licensed / len(bom["components"]) > 0.9
    assert bom["serialNumber"].startswith("urn:uuid:")
