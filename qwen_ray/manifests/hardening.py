"""The production profile for pods: restricted pod security, pinned images, resources that are reserved.

Source: https://kubernetes.io/docs/concepts/security/pod-security-standards/ (Restricted). Every rule is
given a pod template.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

from qwen_ray.manifests.entry_points import command_of, simple_commands
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, cluster, containers, environment, items
from qwen_ray.manifests.pod_rules import extended, inside, quantity, security

RULES = Rules()
SECRET = re.compile(
    r"(^|_)(TOKEN|PASSWORD|PASSWD|SECRET|API_?KEY|ACCESS_KEY(_ID)?|CREDENTIALS?|PRIVATE_KEY)$", re.I
)
_CAPABILITIES = ["NET_BIND_SERVICE"]


@RULES.rule("run-as-non-root", "securityContext.runAsNonRoot: true, and runAsUser above 0 where it is set")
def run_as_non_root(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        if security(pod, container, "runAsNonRoot") is not True:
            yield inside(pod, container, "securityContext.runAsNonRoot"), "the container may run as root"


@RULES.rule("seccomp-profile", "securityContext.seccompProfile: {type: RuntimeDefault}")
def seccomp_profile(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        kind = security(pod, container, "seccompProfile.type")
        if kind not in ("RuntimeDefault", "Localhost"):
            yield (
                inside(pod, container, "securityContext.seccompProfile"),
                f"{kind or 'not set'}: all system calls",
            )


@RULES.rule("drop-capabilities", "securityContext.capabilities: {drop: [ALL]}")
def drop_capabilities(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        if "ALL" not in items(container.tree, "securityContext.capabilities.drop"):
            yield inside(pod, container, "securityContext.capabilities.drop"), "it does not hold ALL"
        added = [
            c for c in items(container.tree, "securityContext.capabilities.add") if c not in _CAPABILITIES
        ]
        if added:
            yield inside(pod, container, "securityContext.capabilities.add"), f"{', '.join(added)}"


@RULES.rule("privilege-escalation", "securityContext.allowPrivilegeEscalation: false")
def privilege_escalation(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        if container.get("securityContext.allowPrivilegeEscalation") is not False:
            yield (
                inside(pod, container, "securityContext.allowPrivilegeEscalation"),
                "a process may gain rights",
            )


@RULES.rule("privileged", "remove it")
def privileged(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        if container.get("securityContext.privileged"):
            yield inside(pod, container, "securityContext.privileged"), "the container owns its machine"


@RULES.rule("host-access", "remove it; use a claim or emptyDir for files and a service for ports")
def host_access(pod: Part) -> Iterator[Finding]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(f"spec.{field}"):
            yield f"spec.{field}", "the pod shares it with its machine"
    for volume in pod.parts("spec.volumes"):
        if volume.get("hostPath") is not None:
            yield inside(pod, volume, "hostPath"), "files of the machine"
    for container in containers(pod):
        for entry in container.parts("ports"):
            if entry.get("hostPort"):
                yield inside(pod, entry, "hostPort"), "a port of the machine"


@RULES.rule("image-pinned", "a digest (IMAGE@sha256:...) or the tag of a version, not latest")
def image_pinned(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        image = str(container.get("image", ""))
        if not pinned(image):
            yield inside(pod, container, "image"), f"'{image}' is another image tomorrow"


def pinned(image: str) -> bool:
    """Whether the name of an image holds a digest, or a tag that is a version."""
    if re.search(r"@sha256:[0-9a-f]{64}$", image):
        return True
    tag = image.rpartition("/")[2].partition(":")[2]
    return bool(re.search(r"\d", tag)) and "latest" not in tag


@RULES.rule("memory-request", "resources with the same memory as request and limit")
def memory_request(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        asked, most = (
            container.get(f"resources.{kind}", {}).get("memory") for kind in ("requests", "limits")
        )
        if asked is None or most is None or quantity(asked) != quantity(most):
            what = f"request {asked or 'not set'}, limit {most or 'not set'}: the kernel ends what goes above"
            yield inside(pod, container, "resources"), what


@RULES.rule("cpu-request", "resources.requests.cpu")
def cpu_request(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        if not {"cpu"} & {*container.get("resources.requests", {}), *container.get("resources.limits", {})}:
            yield inside(pod, container, "resources.requests.cpu"), "no CPU is reserved"


@RULES.rule("device-request", "the same count as request and as limit")
def device_request(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        asked = container.get("resources.requests", {})
        for name in container.get("resources.limits", {}):
            if extended(name) and name not in asked:
                yield (
                    inside(pod, container, f"resources.requests.{name}"),
                    "the limit is set, the request is not",
                )


@RULES.rule("shared-memory", "an emptyDir {medium: Memory, sizeLimit: ...} mounted at /dev/shm")
def shared_memory(pod: Part) -> Iterator[Finding]:
    """NCCL and Ray's object store need more than the 64 MiB that a container has."""
    if pod.role not in ("head", "worker"):
        return
    volumes = {volume.get("name"): volume for volume in pod.parts("spec.volumes")}
    for container in pod.parts("spec.containers"):
        if not any(extended(name) for name in container.get("resources.limits", {})):
            continue
        at = [m.get("name") for m in container.parts("volumeMounts") if m.get("mountPath") == "/dev/shm"]
        volume = volumes.get(at[0]) if at else None
        if (
            volume is None
            or volume.get("emptyDir.medium") != "Memory"
            or not volume.get("emptyDir.sizeLimit")
        ):
            yield inside(pod, container, "volumeMounts"), "no memory volume with a size at /dev/shm"


@RULES.rule("token-automount", "automountServiceAccountToken: false")
def token_automount(pod: Part) -> Iterator[Finding]:
    spec = cluster(pod.manifest)
    # The autoscaler in the head's pod, and the submitter, ask the API server.
    needs = pod.role == "head" and spec is not None and spec.get("enableInTreeAutoscaling") is True
    if not needs and pod.role != "submitter" and pod.get("spec.automountServiceAccountToken") is not False:
        yield (
            "spec.automountServiceAccountToken",
            "the pod holds a token of the API server that it does not need",
        )


@RULES.rule("plain-secret", "valueFrom.secretKeyRef, and the value in a Secret that is made by a command")
def plain_secret(pod: Part) -> Iterator[Finding]:
    for container in containers(pod):
        for name, entry in environment(container).items():
            if entry.get("value") and SECRET.search(name):
                yield inside(pod, container, "env"), f"{name} is written out"
        for wrong in _written_out(command_of(container)):
            yield inside(pod, container, "args" if container.get("args") else "command"), wrong


JOB = Rules()


@JOB.rule("plain-secret", "a variable that comes from a Secret: '$NAME'")
def plain_secret_in_entry_point(spec: Part) -> Iterator[Finding]:
    for wrong in _written_out(str(spec.get("entrypoint", ""))):
        yield "entrypoint", wrong


@JOB.rule("plain-secret-in-runtime-env", "give it to the pods as a variable from a Secret")
def plain_secret_in_runtime_env(spec: Part) -> Iterator[Finding]:
    runtime: Any = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    for name, value in (runtime.get("env_vars") or {}).items():
        if value and SECRET.search(str(name)):
            yield "runtimeEnvYAML", f"{name} is written out, and everybody who reads the job sees it"


def _written_out(command: str) -> Iterator[str]:
    """A key among the words of a command, where it is no variable."""
    with contextlib.suppress(ValueError):  # not for us to read
        for words in simple_commands(command):
            for word, following in zip(words, [*words[1:], ""], strict=True):
                option, sign, value = word.partition("=")
                value = value if sign else following
                if option == "--api-key" and value and not value.startswith(("$", "`")):
                    yield "the value of --api-key is written out"
