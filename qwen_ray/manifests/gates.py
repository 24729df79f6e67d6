"""Feature gates of the KubeRay operator: what it refuses, or leaves alone, without them.

Defaults of KubeRay 1.7.0 (ray-operator/pkg/features/features.go). The values of the operator's Helm chart
(``featureGates``) say what a cluster's operator has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.load import documents
from qwen_ray.manifests.objects import Manifest, cluster, items, job

DEFAULTS = {
    "RayClusterStatusConditions": True,
    "RayJobDeletionPolicy": True,
    "RayMultiHostIndexing": True,
    "RayServiceIncrementalUpgrade": True,
    "RayCronJob": False,
    "SidecarSubmitterRestart": False,
    "RayClusterNetworkPolicy": False,
    "GCSFaultToleranceEmbeddedStorage": False,
    "RayClusterMTLS": False,
    "RayClusterHistoryServer": False,
    "KubernetesWAS": False,
}


def from_values(file: Path) -> dict[str, bool]:
    """The gates by the values file of the operator's Helm chart; :class:`UserError` for an unknown gate."""
    try:
        trees, _ = documents(str(file), file.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot be read ({e.strerror})", where=str(file), fix="check the path") from None
    gates = dict(DEFAULTS)
    for entry in items(trees[0], "featureGates") if trees and isinstance(trees[0], dict) else ():
        name = str(entry.get("name"))
        if name not in DEFAULTS:
            raise UserError(
                f"there is no feature gate {name}", where=str(file), fix=did_you_mean(name, DEFAULTS)
            )
        gates[name] = entry.get("enabled") is True
    return gates


def faults(manifest: Manifest, gates: Mapping[str, bool]) -> Iterator[Fault]:
    """Fields of an object whose gate is off."""
    for field, gate in _needs(manifest):
        if not gates[gate]:
            fix = f"switch it on in the operator's Helm values (featureGates: {gate}), or remove the field"
            yield Fault(
                manifest.file, manifest.title, field, "feature-gate", f"it needs the gate {gate}", fix
            )


def _needs(manifest: Manifest) -> Iterator[tuple[str, str]]:
    if manifest.is_ray and manifest.kind == "RayCronJob":
        yield "kind", "RayCronJob"
    spec, of_job = cluster(manifest), job(manifest)
    if spec is not None:
        for field, gate in (
            ("networkPolicy", "RayClusterNetworkPolicy"),
            ("tlsOptions", "RayClusterMTLS"),
            ("historyServerOptions", "RayClusterHistoryServer"),
        ):
            if spec.get(field) is not None:
                yield spec.at(field), gate
        if spec.get("gcsFaultToleranceOptions.backend") == "rocksdb":
            yield spec.at("gcsFaultToleranceOptions.backend"), "GCSFaultToleranceEmbeddedStorage"
        for group in spec.parts("workerGroupSpecs"):
            if group.get("suspend"):
                yield group.at("suspend"), "RayJobDeletionPolicy"
    if of_job is not None and of_job.get("deletionStrategy") is not None:
        yield of_job.at("deletionStrategy"), "RayJobDeletionPolicy"
    if manifest.is_ray and manifest.tree.get("kind") == "RayService":
        strategy = manifest.tree.get("spec", {}).get("upgradeStrategy", {})
        if strategy.get("type") == "NewClusterWithIncrementalUpgrade":
            yield "spec.upgradeStrategy.type", "RayServiceIncrementalUpgrade"
