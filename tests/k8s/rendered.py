"""The overlays as kustomize renders them, each once a test run."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from qwen_ray.manifests import tools
from tests.conftest import ROOT

OVERLAYS = sorted(path.parent.name for path in (ROOT / "k8s/overlays").glob("*/kustomization.yaml"))
Object = dict[str, Any]


@cache
def objects(overlay: str) -> dict[tuple[str, str], Object]:
    """By kind and name. Without kubectl, and where kustomize warns, the test fails."""
    text, said = tools.kustomize(ROOT / "k8s/overlays" / overlay)
    assert not said, said
    found = [tree for tree in yaml.load_all(text, yaml.CSafeLoader) if tree]
    named = {(tree["kind"], tree["metadata"]["name"]): tree for tree in found}
    assert len(named) == len(found), "two objects of one kind and name"
    return named


def of_kind(overlay: str, kind: str) -> list[Object]:
    return [tree for (other, _), tree in objects(overlay).items() if other == kind]


def cluster_spec(tree: Object) -> Object:
    """The RayCluster within a Ray object."""
    keys = {"RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}
    spec: Object = tree["spec"]
    return spec[keys[tree["kind"]]] if tree["kind"] in keys else spec


def ray_objects(overlay: str) -> list[Object]:
    return [tree for kind in ("RayJob", "RayService", "RayCluster") for tree in of_kind(overlay, kind)]


def pods(tree: Object) -> Iterator[tuple[str, Object]]:
    """(where, pod template) of each pod that the object leads to."""
    kind, spec = tree["kind"], tree.get("spec", {})
    if kind in ("RayJob", "RayService", "RayCluster"):
        cluster = cluster_spec(tree)
        yield "head", cluster["headGroupSpec"]["template"]
        for group in cluster.get("workerGroupSpecs", ()):
            yield group["groupName"], group["template"]
        if kind == "RayJob":
            yield "submitter", spec["submitterPodTemplate"]
    elif kind == "CronJob":
        yield "job", spec["jobTemplate"]["spec"]["template"]
    elif kind == "StatefulSet":
        yield "pod", spec["template"]


def all_pods(overlay: str) -> list[tuple[str, Object]]:
    return [
        (f"{tree['kind']}/{tree['metadata']['name']}/{where}", pod)
        for tree in objects(overlay).values()
        for where, pod in pods(tree)
    ]
