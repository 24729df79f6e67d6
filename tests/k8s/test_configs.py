"""What pods find in /etc/qwen-ray is read by the verbs that they run."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.config import build_config
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.sweeps.spec import load_sweep
from tests.k8s.rendered import cluster_spec, objects

each = pytest.mark.parametrize("overlay", ["dev-cpu", "gpu", "multi-node-gpu"])


@pytest.fixture
def config(overlay: str, tmp_path: Path) -> Path:
    for name, text in objects(overlay)["ConfigMap", "qwen-ray-config"]["data"].items():
        (tmp_path / name).write_text(text)
    return tmp_path


@each
def test_training_run(overlay: str, config: Path) -> None:
    run = build_config(config / "train.yaml")
    (group,) = cluster_spec(objects(overlay)["RayJob", "train"])["workerGroupSpecs"]
    assert (run.cluster.workers or 0) >= group["replicas"]
    assert all(path.startswith(("/storage/data/", "/etc/qwen-ray/")) for path in run.data.train)


@each
def test_sweep(overlay: str, config: Path) -> None:
    sweep = load_sweep(config / "sweep.yaml")
    (group,) = cluster_spec(objects(overlay)["RayJob", "sweep"])["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert sweep.trials.cpus < int(limits["cpu"]), "an engine, and a little for each trial"
    assert (sweep.trials.gpus or 0) <= int(limits.get("nvidia.com/gpu", 0))


@each
def test_pipeline(overlay: str, config: Path) -> None:
    pipeline = PipelineSpec.read(config / "pipeline.yaml")
    assert pipeline.registry == "/storage/registry"
    assert pipeline.endpoint.url == "http://adapters-serve-svc:8000"
    assert pipeline.work.startswith("/storage/")
    if pipeline.run_on:
        assert pipeline.run_on.address == "http://shared-head-svc:8265"
        assert ("RayCluster", "shared") in objects(overlay)
