"""The objects that are checked, and the parts of them that rules are about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Tree = dict[str, Any]


@dataclass(frozen=True)
class Manifest:
    """A Kubernetes object: where it came from and what it holds."""

    file: str
    tree: Tree

    @property
    def kind(self) -> str:
        return str(self.tree.get("kind") or "")

    @property
    def api_version(self) -> str:
        return str(self.tree.get("apiVersion") or "")

    @property
    def metadata(self) -> Tree:
        return mapping(self.tree, "metadata")

    @property
    def name(self) -> str:
        """With ``generateName``, a name such as the API server makes of it."""
        prefix = self.metadata.get("generateName")
        return str(self.metadata.get("name") or (f"{prefix}xxxxx" if prefix else ""))

    @property
    def namespace(self) -> str:
        """As written; objects without one lie together."""
        return str(self.metadata.get("namespace") or "")

    @property
    def labels(self) -> Tree:
        return mapping(self.metadata, "labels")

    @property
    def annotations(self) -> Tree:
        return mapping(self.metadata, "annotations")

    @property
    def title(self) -> str:
        """``Kind/name``."""
        return f"{self.kind or '?'}/{self.name or '?'}"

    @property
    def is_ray(self) -> bool:
        return self.api_version.startswith("ray.io/")


@dataclass(frozen=True)
class Part:
    """A part of an object: its ``tree``, and the ``path`` of it in the object ('' for the whole)."""

    manifest: Manifest
    tree: Tree
    path: str = ""
    role: str = ""

    def at(self, field: str) -> str:
        """The full path of a field of this part."""
        return f"{self.path}.{field}" if self.path and field else self.path or field

    def part(self, field: str, role: str = "") -> Part:
        """A mapping inside, empty where there is none. ``field``: a dotted path."""
        return Part(self.manifest, mapping(self.tree, field), self.at(field), role or self.role)

    def parts(self, field: str, role: str = "") -> list[Part]:
        """The mappings of a list inside."""
        return [
            Part(self.manifest, item, self.at(f"{field}[{i}]"), role or self.role)
            for i, item in enumerate(items(self.tree, field))
            if isinstance(item, dict)
        ]

    def get(self, field: str, default: Any = None) -> Any:
        return dig(self.tree, field, default)


def dig(tree: Mapping[str, Any], field: str, default: Any = None) -> Any:
    """The value at a dotted path; ``default`` where it is absent."""
    value: Any = tree
    for key in field.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return default
        value = value[key]
    return value


def mapping(tree: Mapping[str, Any], field: str) -> Tree:
    value = dig(tree, field)
    return value if isinstance(value, dict) else {}


def items(tree: Mapping[str, Any], field: str) -> list[Any]:
    value = dig(tree, field)
    return value if isinstance(value, list) else []


_CLUSTER_AT = {
    "RayCluster": "spec",
    "RayJob": "spec.rayClusterSpec",
    "RayService": "spec.rayClusterConfig",
    "RayCronJob": "spec.jobTemplate.rayClusterSpec",
}
_JOB_AT = {"RayJob": "spec", "RayCronJob": "spec.jobTemplate"}
_POD_AT = {
    ("apps/v1", "Deployment"): "spec.template",
    ("apps/v1", "StatefulSet"): "spec.template",
    ("apps/v1", "DaemonSet"): "spec.template",
    ("apps/v1", "ReplicaSet"): "spec.template",
    ("batch/v1", "Job"): "spec.template",
    ("batch/v1", "CronJob"): "spec.jobTemplate.spec.template",
}


def cluster(manifest: Manifest) -> Part | None:
    """The RayClusterSpec of a Ray object; None where it has none (a RayJob with a clusterSelector)."""
    field = _CLUSTER_AT.get(manifest.kind) if manifest.is_ray else None
    if field is None or not mapping(manifest.tree, field):
        return None
    return Part(manifest, manifest.tree).part(field)


def job(manifest: Manifest) -> Part | None:
    """The RayJobSpec of a RayJob or RayCronJob."""
    field = _JOB_AT.get(manifest.kind) if manifest.is_ray else None
    return Part(manifest, manifest.tree).part(field) if field else None


def groups(spec: Part) -> list[Part]:
    """Head group and worker groups of a RayClusterSpec, with the roles ``head`` and ``worker``."""
    return [spec.part("headGroupSpec", "head"), *spec.parts("workerGroupSpecs", "worker")]


def pods(manifest: Manifest) -> Iterator[Part]:
    """Every pod template (metadata and spec), with its role: head, worker, submitter or pod."""
    whole = Part(manifest, manifest.tree)
    if manifest.is_ray:
        spec, of_job = cluster(manifest), job(manifest)
        for group in groups(spec) if spec else ():
            yield group.part("template")
        if of_job and of_job.get("submitterPodTemplate"):
            yield of_job.part("submitterPodTemplate", "submitter")
    elif (manifest.api_version, manifest.kind) == ("v1", "Pod"):
        yield Part(manifest, manifest.tree, role="pod")
    elif field := _POD_AT.get((manifest.api_version, manifest.kind)):
        yield whole.part(field, "pod")


def containers(pod: Part) -> list[Part]:
    """All containers of a pod template, init containers last."""
    return [*pod.parts("spec.containers"), *pod.parts("spec.initContainers")]


def environment(container: Part) -> dict[str, Tree]:
    """Variables of a container by name; of a name given twice the last, as in the container."""
    return {
        str(entry.get("name")): entry for entry in items(container.tree, "env") if isinstance(entry, dict)
    }
