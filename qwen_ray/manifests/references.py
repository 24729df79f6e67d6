"""What objects of one set say of one another: names that must exist, selectors that must match pods.

Secrets are made by a command and are in no file, so they are listed, not missed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.objects import Manifest, Part, cluster, containers, items, mapping, pods

_DEFAULT_PRIORITIES = ("system-cluster-critical", "system-node-critical")
_KUEUE = "kueue.x-k8s.io/"


@dataclass(frozen=True)
class Running:
    """Pods of one template. A label with the value None has one that the operator makes up."""

    pod: Part
    labels: dict[str, str | None]

    @property
    def namespace(self) -> str:
        return self.pod.manifest.namespace


def running(manifests: list[Manifest]) -> list[Running]:
    """Pods that the objects of a set start, with the labels that KubeRay adds."""
    found = []
    for manifest in manifests:
        spec = cluster(manifest)
        found += [Running(pod, _labels(pod)) for pod in pods(manifest)]
        if spec is not None and spec.get("gcsFaultToleranceOptions") is not None:
            head = spec.part("headGroupSpec.template", "redis-cleanup")
            found.append(Running(head, _labels(head)))
    return found


def _labels(pod: Part) -> dict[str, str | None]:
    own: dict[str, str | None] = {**mapping(pod.tree, "metadata.labels")}
    if pod.role not in ("head", "worker", "redis-cleanup"):
        return own
    # A template may replace the operator's labels, but for those of its own selectors.
    loose = {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/created-by": "kuberay-operator"}
    loose |= {"ray.io/is-ray-node": "yes"}
    made_up = dict.fromkeys(("ray.io/identifier", "ray.io/serve"))
    fixed = {"ray.io/node-type": pod.role, "ray.io/group": None, "ray.io/cluster": None}
    return {**loose, **made_up, **own, **fixed}


def matches(selector: dict[str, Any], labels: dict[str, str | None]) -> bool:
    """Whether a label selector (matchLabels, matchExpressions) takes pods with these labels."""
    for key, value in mapping(selector, "matchLabels").items():
        if key not in labels or labels[key] not in (None, value):
            return False
    for expression in items(selector, "matchExpressions"):
        key, values = expression.get("key"), expression.get("values", [])
        there = key in labels
        fits = {
            "In": there and (labels[key] is None or labels[key] in values),
            "NotIn": not there or labels[key] is None or labels[key] not in values,
            "Exists": there,
            "DoesNotExist": not there,
        }
        if not fits.get(str(expression.get("operator")), True):
            return False
    return True


def faults(manifests: list[Manifest]) -> Iterator[Fault]:
    """Names that nothing in the set has, and selectors that match none of its pods."""
    known = {(m.kind, m.namespace, m.name) for m in manifests}
    for of, field, kind, name in _named(manifests):
        # Cluster-wide kinds have no namespace; one that is not written may be added when applied.
        if not {(kind, of.namespace, name), (kind, "", name)} & known:
            what = f"the set has no {kind} {name}"
            yield Fault(
                of.file, of.title, field, "missing-reference", what, f"add the {kind}, or correct the name"
            )
    here = running(manifests)
    for manifest in manifests:
        field, selector = _selector(manifest)
        if selector and not any(
            matches(selector, pod.labels) for pod in here if pod.namespace == manifest.namespace
        ):
            what, fix = (
                "no pod of the set has these labels",
                "correct the labels, of the selector or of the pods",
            )
            yield Fault(manifest.file, manifest.title, field, "selector-matches-nothing", what, fix)


def _selector(manifest: Manifest) -> tuple[str, dict[str, Any]]:
    whole = Part(manifest, manifest.tree)
    if manifest.kind == "Service" and manifest.api_version == "v1":
        plain = whole.get("spec.selector")
        return "spec.selector", {"matchLabels": plain} if plain else {}
    if manifest.kind == "PodMonitor" and whole.get("spec.namespaceSelector"):
        return "", {}
    at = {
        "PodDisruptionBudget": "spec.selector",
        "NetworkPolicy": "spec.podSelector",
        "PodMonitor": "spec.selector",
    }
    field = at.get(manifest.kind, "")
    return field, (whole.get(field) or {}) if field else {}


Name = tuple[Manifest, str, str, str]
"""Who names it, in which field, its kind, its name."""


def _named(manifests: list[Manifest]) -> Iterator[Name]:
    for manifest in manifests:
        whole = Part(manifest, manifest.tree)
        for pod in pods(manifest):
            yield from _of_pod(manifest, pod)
        for label, kind in (("queue-name", "LocalQueue"), ("priority-class", "WorkloadPriorityClass")):
            name = manifest.labels.get(_KUEUE + label)
            if name and any(m.kind == kind for m in manifests):
                yield manifest, f"metadata.labels.{_KUEUE}{label}", kind, name
        if manifest.kind == "LocalQueue" and any(m.kind == "ClusterQueue" for m in manifests):
            yield manifest, "spec.clusterQueue", "ClusterQueue", str(whole.get("spec.clusterQueue"))
        if manifest.kind == "ClusterQueue":
            for group in whole.parts("spec.resourceGroups"):
                for flavor in group.parts("flavors"):
                    yield manifest, flavor.at("name"), "ResourceFlavor", str(flavor.get("name"))
        queue = manifest.labels.get("volcano.sh/queue-name")
        if queue and any(m.kind == "Queue" for m in manifests):
            yield manifest, "metadata.labels.volcano.sh/queue-name", "Queue", queue
        for subject in whole.parts("subjects") if manifest.kind == "RoleBinding" else ():
            if subject.get("kind") == "ServiceAccount":
                yield manifest, subject.at("name"), "ServiceAccount", str(subject.get("name"))


def _of_pod(manifest: Manifest, pod: Part) -> Iterator[Name]:
    account = pod.get("spec.serviceAccountName")
    if account and account != "default":
        yield manifest, pod.at("spec.serviceAccountName"), "ServiceAccount", account
    priority = pod.get("spec.priorityClassName")
    if priority and priority not in _DEFAULT_PRIORITIES:
        yield manifest, pod.at("spec.priorityClassName"), "PriorityClass", priority
    for volume in pod.parts("spec.volumes"):
        claim = volume.get("persistentVolumeClaim.claimName")
        if claim:
            yield manifest, volume.at("persistentVolumeClaim.claimName"), "PersistentVolumeClaim", claim
        sources = [
            volume.part("configMap"),
            *(s.part("configMap") for s in volume.parts("projected.sources")),
        ]
        for source in sources:
            if source.get("name") and not source.get("optional"):
                yield manifest, source.at("name"), "ConfigMap", source.get("name")
    for container in containers(pod):
        for entry in container.parts("env"):
            source = entry.part("valueFrom.configMapKeyRef")
            if source.get("name") and not source.get("optional"):
                yield manifest, source.at("name"), "ConfigMap", source.get("name")
        for entry in container.parts("envFrom"):
            source = entry.part("configMapRef")
            if source.get("name") and not source.get("optional"):
                yield manifest, source.at("name"), "ConfigMap", source.get("name")


def secrets(manifests: list[Manifest]) -> list[str]:
    """``NAMESPACE/NAME`` of every Secret that pods name and no file holds."""
    held = {(m.namespace, m.name) for m in manifests if m.kind == "Secret"}
    found = {
        (manifest.namespace, name)
        for manifest in manifests
        for name in _secret_names(manifest.tree)
        if manifest.kind != "Secret"
    }
    return sorted(f"{namespace or 'default'}/{name}" for namespace, name in found - held)


def _secret_names(value: Any) -> Iterator[str]:
    """Names in secretKeyRef, secretRef, secret volumes and imagePullSecrets, at any depth."""
    if isinstance(value, list):
        for item in value:
            yield from _secret_names(item)
    elif isinstance(value, dict):
        for key, inner in value.items():
            if key in ("secretKeyRef", "secretRef", "secret") and isinstance(inner, dict):
                name = inner.get("name") or inner.get("secretName")
                if isinstance(name, str):
                    yield name
            elif key == "imagePullSecrets" and isinstance(inner, list):
                yield from (str(item.get("name")) for item in inner if isinstance(item, dict))
            yield from _secret_names(inner)


def production(manifests: list[Manifest]) -> Iterator[Fault]:
    """What each Ray object needs beside it: a budget for its head, and policies for its pods' network."""
    here = running(manifests)
    budgets = [m for m in manifests if m.kind == "PodDisruptionBudget"]
    policies = [m for m in manifests if m.kind == "NetworkPolicy"]
    for pod in here:
        of = pod.pod.manifest
        if pod.pod.role == "head" and not any(_takes(budget, "spec.selector", pod) for budget in budgets):
            what, fix = (
                "a drained node takes the head with it",
                "a PodDisruptionBudget that selects the head's pod",
            )
            yield Fault(of.file, of.title, pod.pod.path, "disruption-budget", what, fix)
        if pod.pod.role not in ("head", "worker"):
            continue
        mine = [p.tree["spec"] for p in policies if _takes(p, "spec.podSelector", pod)]
        spec = cluster(of)
        if spec is not None and spec.get("networkPolicy") is not None:
            continue
        for kind in ("Ingress", "Egress"):
            if not any(kind in policy.get("policyTypes", ["Ingress"]) for policy in mine):
                what, fix = (
                    f"{kind.lower()} is open",
                    f"a NetworkPolicy with policyTypes [{kind}] for its pods",
                )
                yield Fault(of.file, of.title, pod.pod.path, "network-policy", what, fix)
        egress = [policy for policy in mine if "Egress" in policy.get("policyTypes", [])]
        if egress and not any(_allows(policy, 53) for policy in egress):
            what, fix = "no egress to DNS: workers do not find the head", "allow ports 53 (UDP and TCP)"
            yield Fault(of.file, of.title, pod.pod.path, "network-policy-dns", what, fix)
        if egress and not any(_allows(policy, 443) for policy in egress):
            what, fix = "no egress to 443: neither API server nor object store", "allow port 443"
            yield Fault(of.file, of.title, pod.pod.path, "network-policy-https", what, fix)


def _takes(manifest: Manifest, field: str, pod: Running) -> bool:
    selector = Part(manifest, manifest.tree).get(field) or {}
    return manifest.namespace == pod.namespace and matches(selector, pod.labels)


def _allows(policy: dict[str, Any], port: int) -> bool:
    for rule in policy.get("egress") or []:
        ports = rule.get("ports")
        if not ports or any(p.get("port", port) == port for p in ports):
            return True
    return False
