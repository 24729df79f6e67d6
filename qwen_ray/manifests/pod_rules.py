"""What the API server refuses in a pod though its schema allows it.

The definitions of Ray objects hold whole pod templates, but the API server validates them only when the
operator creates the pods, so a fault there shows late. Every rule is given a pod template.
Source: https://kubernetes.io/docs/reference/kubernetes-api/workload-resources/pod-v1/.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from decimal import Decimal, InvalidOperation
from typing import Any

from qwen_ray.manifests import names
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, containers, items

RULES = Rules()
_SUFFIXES = {
    "n": Decimal("1e-9"),
    "u": Decimal("1e-6"),
    "m": Decimal("1e-3"),
    **{unit: Decimal(1000) ** power for power, unit in enumerate(("k", "M", "G", "T", "P", "E"), start=1)},
    **{
        unit: Decimal(1024) ** power
        for power, unit in enumerate(("Ki", "Mi", "Gi", "Ti", "Pi", "Ei"), start=1)
    },
}


def quantity(value: Any) -> Decimal | None:
    """A Kubernetes quantity (``500m``, ``16Gi``) as a number; None if it is none."""
    text = str(value)
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if text.endswith(suffix):
            text, scale = text.removesuffix(suffix), _SUFFIXES[suffix]
            break
    else:
        scale = Decimal(1)
    try:
        number = Decimal(text) * scale
    except InvalidOperation:
        return None
    return number if number.is_finite() else None


def inside(pod: Part, part: Part, field: str = "") -> str:
    """The path of a field of ``part``, from the pod template."""
    return part.at(field).removeprefix(f"{pod.path}." if pod.path else "")


def extended(resource: str) -> bool:
    """Whether it is a device (``nvidia.com/gpu``), which is never shared."""
    return "/" in resource and not resource.startswith("requests.")


def _twice(values: Iterable[Any]) -> list[str]:
    return sorted(str(value) for value, count in Counter(values).items() if count > 1)


def _plain(pod: Part, parts: list[Part]) -> list[Part]:
    """Parts whose keys the schema does not compare: definitions of Ray objects say what is given once."""
    return [] if pod.manifest.is_ray else parts


@RULES.rule("container-name", "lower-case letters, digits and dashes, each name once in a pod")
def container_name(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        wrong = names.dns_1123_label(str(container.get("name", "")))
        if wrong:
            yield inside(pod, container, "name"), wrong
    for name in _twice(container.get("name") for container in _plain(pod, containers(pod))):
        yield "spec.containers", f"two containers are called {name}"


@RULES.rule("volume-name", "lower-case letters, digits and dashes, each name once in a pod")
def volume_name(pod: Part) -> Iterator[Finding]:
    volumes = pod.parts("spec.volumes")
    for volume in volumes:
        wrong = names.dns_1123_label(str(volume.get("name", "")))
        if wrong:
            yield inside(pod, volume, "name"), wrong
    for name in _twice(volume.get("name") for volume in _plain(pod, volumes)):
        yield "spec.volumes", f"two volumes are called {name}"


@RULES.rule("mount-without-volume", "name a volume of the pod, or add it")
def mount_without_volume(pod: Part) -> Iterator[Finding]:
    volumes = [volume.get("name") for volume in pod.parts("spec.volumes")]
    volumes += [claim.get("metadata.name") for claim in _claims(pod)]
    for container in containers(pod):
        for mount in container.parts("volumeMounts"):
            if mount.get("name") not in volumes:
                yield inside(pod, mount, "name"), f"the pod has no volume {mount.get('name')}"


def _claims(pod: Part) -> list[Part]:
    whole = Part(pod.manifest, pod.manifest.tree)
    return whole.parts("spec.volumeClaimTemplates") if pod.manifest.kind == "StatefulSet" else []


@RULES.rule("mount-path-twice", "give each volume a place of its own")
def mount_path_twice(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        mounts = _plain(pod, container.parts("volumeMounts"))
        for path in _twice(mount.get("mountPath") for mount in mounts):
            yield inside(pod, container, "volumeMounts"), f"two volumes are mounted at {path}"


@RULES.rule("volume-source", "give each volume one source (emptyDir, persistentVolumeClaim, configMap ...)")
def volume_source(pod: Part) -> Iterator[Finding]:
    for volume in pod.parts("spec.volumes"):
        sources = sorted(volume.tree.keys() - {"name"})
        if len(sources) > 1:
            yield inside(pod, volume), f"volume {volume.get('name')} has {', '.join(sources)}"


@RULES.rule("request-above-limit", "a request is at most the limit")
def request_above_limit(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        limits = container.get("resources.limits", {})
        for name, value in container.get("resources.requests", {}).items():
            asked, most = quantity(value), quantity(limits.get(name, value))
            if asked is not None and most is not None and asked > most:
                yield inside(pod, container, f"resources.requests.{name}"), f"{value} is above {limits[name]}"


@RULES.rule("device-without-limit", "set the limit; the request is the same, or left out")
def device_without_limit(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        limits = container.get("resources.limits", {})
        for name, value in container.get("resources.requests", {}).items():
            if extended(name) and str(limits.get(name)) != str(value):
                what = (
                    f"{value} requested, the limit is {limits.get(name, 'not set')}: devices are not shared"
                )
                yield inside(pod, container, f"resources.requests.{name}"), what


@RULES.rule("whole-devices", "ask for whole devices")
def whole_devices(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        for name, value in container.get("resources.limits", {}).items():
            count = quantity(value)
            if extended(name) and count is not None and count != count.to_integral_value():
                yield inside(pod, container, f"resources.limits.{name}"), f"{value} of a device"


@RULES.rule("variable", "a value, or valueFrom with one source, under a name without '='")
def variable(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        for entry in container.parts("env"):
            name, source = entry.get("name", ""), entry.get("valueFrom")
            if not name or "=" in name:
                yield inside(pod, entry, "name"), f"'{name}'"
            if source is not None and entry.get("value"):
                yield inside(pod, entry), f"{name} has a value and valueFrom"
            if source is not None and len(source) != 1:
                yield inside(pod, entry, "valueFrom"), f"{name} has {len(source)} sources"


@RULES.rule("port", "1 to 65535, with a name of at most 15 characters, each name once")
def port(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        for entry in container.parts("ports"):
            number, name = entry.get("containerPort", 0), entry.get("name", "")
            if not 1 <= number <= 65535:
                yield inside(pod, entry, "containerPort"), f"{number}"
            if len(name) > 15 or (name and names.dns_1123_label(name)):
                yield inside(pod, entry, "name"), f"'{name}'"
        for name in _twice(entry["name"] for entry in items(container.tree, "ports") if "name" in entry):
            yield inside(pod, container, "ports"), f"two ports are called {name}"


@RULES.rule("pod-labels", "keys and values of labels follow the syntax of Kubernetes labels")
def pod_labels(pod: Part) -> Iterator[Finding]:
    for key, value in pod.get("metadata.labels", {}).items():
        wrong = names.label_key(key) or names.label_value(value)
        if wrong:
            yield f"metadata.labels.{key}", wrong


@RULES.rule("root-and-non-root", "give runAsUser a user above 0")
def root_and_non_root(pod: Part) -> Iterator[Finding]:
    """A container that asks for both is created, and never started."""
    for container in containers(pod):
        if security(pod, container, "runAsNonRoot") and security(pod, container, "runAsUser") == 0:
            yield inside(pod, container), "runAsNonRoot is set, and runAsUser is 0"


@RULES.rule("init-probe", "move it to a container")
def init_probe(pod: Part) -> Iterator[Finding]:
    for container in pod.parts("spec.initContainers"):
        if container.get("restartPolicy") != "Always":
            for field in ("readinessProbe", "livenessProbe", "startupProbe", "lifecycle"):
                if container.get(field) is not None:
                    yield inside(pod, container, field), "an init container runs to its end"


@RULES.rule("job-restart-policy", "Never or OnFailure")
def job_restart_policy(pod: Part) -> Iterator[Finding]:
    if pod.manifest.kind in ("Job", "CronJob") or pod.role == "submitter":
        policy = pod.get("spec.restartPolicy")
        if policy not in ("Never", "OnFailure"):
            yield "spec.restartPolicy", f"{policy or 'not set, so Always'}: a job's pod comes to an end"


def security(pod: Part, container: Part, field: str) -> Any:
    """A field of the security context: the container's, else the pod's."""
    own = container.get(f"securityContext.{field}")
    return pod.get(f"spec.securityContext.{field}") if own is None else own
