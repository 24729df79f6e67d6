"""Everything that the project ships passes its own checks, in the production profile."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen_ray.manifests.check import check

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(path.parent for path in ROOT.glob("k8s/overlays/*/kustomization.yaml"))
VALUES = ROOT / "k8s" / "helm" / "kuberay-operator.yaml"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_overlay(overlay):
    report = check([str(overlay)], operator_values=VALUES)

    assert [str(fault) for fault in report.faults] == []
    kinds = {line.rpartition(": ")[2].partition("/")[0] for line in report.checked}
    assert {"RayJob", "RayService", "CronJob", "NetworkPolicy", "PodDisruptionBudget"} <= kinds


@pytest.mark.parametrize("folder", ["serve", "cluster"])
def test_folder(folder):
    files = [str(path) for path in sorted((ROOT / folder).glob("*.yaml"))]
    report = check(files)

    assert [str(fault) for fault in report.faults] == []
    assert len(report.checked) == len(files) > 0
