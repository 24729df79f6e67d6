"""What the KubeRay operator refuses in a RayClusterSpec though the definition allows it (KubeRay 1.7.0).

Source: ray-operator/controllers/ray/utils/validation.go and pkg/webhooks of ray-project/kuberay v1.7.0,
written anew. Every rule is given the RayClusterSpec of a RayCluster, RayJob, RayService or RayCronJob.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_ray.manifests import names
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, environment, groups

RULES = Rules()
V2_VARIABLE = "RAY_enable_autoscaler_v2"
_RAY_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def ray_container(group: Part) -> Part:
    """The first container of a group's pods, which is the one that Ray runs in."""
    first = group.parts("template.spec.containers")[:1]
    return first[0] if first else group.part("template.spec.containers")


def autoscaling(spec: Part) -> bool:
    return spec.get("enableInTreeAutoscaling") is True


def autoscaler_v2(spec: Part) -> bool:
    """Whether it is chosen by field, or by the variable that was used before there was one."""
    value = environment(ray_container(groups(spec)[0])).get(V2_VARIABLE, {}).get("value")
    return spec.get("autoscalerOptions.version") == "v2" or value in ("1", "true")


def _called(group: Part) -> str:
    return f"worker group {group.get('groupName')}" if group.role == "worker" else "the head group"


def inside(spec: Part, part: Part, field: str = "") -> str:
    """The path of a field of ``part``, from ``spec``."""
    return part.at(field).removeprefix(f"{spec.path}.")


@RULES.rule("group-without-container", "add the Ray container as the first one")
def group_without_container(spec: Part) -> Iterator[Finding]:
    for group in groups(spec):
        if not group.get("template.spec.containers"):
            yield inside(spec, group, "template.spec.containers"), f"{_called(group)} has no container"


@RULES.rule("group-name-twice", "give each worker group a name of its own")
def group_name_twice(spec: Part) -> Iterator[Finding]:
    seen: list[str] = []
    for group in spec.parts("workerGroupSpecs"):
        name = str(group.get("groupName"))
        if name in seen:
            yield inside(spec, group, "groupName"), f"there is another worker group {name}"
        seen.append(name)


@RULES.rule("resources-twice", "keep the group's resources, or those of rayStartParams")
def resources_twice(spec: Part) -> Iterator[Finding]:
    for group in groups(spec):
        twice = [key for key in _RAY_RESOURCES if group.get("rayStartParams", {}).get(key)]
        if twice and group.get("resources"):
            yield inside(spec, group, "resources"), f"rayStartParams has {', '.join(twice)} as well"


@RULES.rule("labels-in-ray-start-params", "write them as the group's labels")
def labels_in_ray_start_params(spec: Part) -> Iterator[Finding]:
    for group in groups(spec):
        if "labels" in group.get("rayStartParams", {}):
            yield inside(spec, group, "rayStartParams.labels"), f"not supported for {_called(group)}"


@RULES.rule("group-labels", "keys and values of labels follow the syntax of Kubernetes labels")
def group_labels(spec: Part) -> Iterator[Finding]:
    for group in groups(spec):
        for key, value in group.get("labels", {}).items():
            wrong = names.label_key(key) or names.label_value(value)
            if wrong:
                yield inside(spec, group, f"labels.{key}"), wrong


@RULES.rule("replicas-order", "0 <= minReplicas <= maxReplicas")
def replicas_order(spec: Part) -> Iterator[Finding]:
    for group in spec.parts("workerGroupSpecs"):
        low, high = group.get("minReplicas"), group.get("maxReplicas")
        for name, count in (("minReplicas", low), ("maxReplicas", high)):
            if count is not None and count < 0:
                yield inside(spec, group, name), f"{count} is negative"
        if low is not None and high is not None and low > high:
            yield inside(spec, group, "minReplicas"), f"{low} is above maxReplicas ({high})"


@RULES.rule("idle-timeout", "a count of seconds >= 0, with autoscalerOptions.version: v2")
def idle_timeout(spec: Part) -> Iterator[Finding]:
    seconds = spec.get("autoscalerOptions.idleTimeoutSeconds")
    if seconds is not None and seconds < 0:
        yield "autoscalerOptions.idleTimeoutSeconds", f"{seconds} is negative"
    for group in spec.parts("workerGroupSpecs"):
        seconds = group.get("idleTimeoutSeconds")
        if seconds is not None and (seconds < 0 or not autoscaler_v2(spec)):
            what = f"{seconds} is negative" if seconds < 0 else "only autoscaler v2 knows it for a group"
            yield inside(spec, group, "idleTimeoutSeconds"), what


@RULES.rule("group-priority", "set rayVersion (2.56.0 or later) and autoscalerOptions.version: v2")
def group_priority(spec: Part) -> Iterator[Finding]:
    for group in spec.parts("workerGroupSpecs"):
        if group.get("priority"):
            old = names.older(spec.get("rayVersion"), (2, 56, 0))
            if old or not autoscaler_v2(spec):
                yield inside(spec, group, "priority"), old or "only autoscaler v2 knows it"


@RULES.rule("suspended-group", "leave suspend out, or switch autoscaling off")
def suspended_group(spec: Part) -> Iterator[Finding]:
    for group in spec.parts("workerGroupSpecs"):
        if group.get("suspend") and autoscaling(spec):
            yield inside(spec, group, "suspend"), "a group cannot be suspended while autoscaling is on"


@RULES.rule("autoscaler-version-twice", "keep autoscalerOptions.version and remove the variable")
def autoscaler_version_twice(spec: Part) -> Iterator[Finding]:
    head = ray_container(groups(spec)[0])
    value = environment(head).get(V2_VARIABLE)
    if value is None:
        return
    if autoscaling(spec) and spec.get("autoscalerOptions.version") is not None:
        yield inside(spec, head, "env"), f"{V2_VARIABLE} is set as well as autoscalerOptions.version"


@RULES.rule("autoscaler-v2-without-autoscaling", "set enableInTreeAutoscaling: true")
def autoscaler_v2_without_autoscaling(spec: Part) -> Iterator[Finding]:
    head = ray_container(groups(spec)[0])
    if not autoscaling(spec) and environment(head).get(V2_VARIABLE, {}).get("value") in ("1", "true"):
        yield inside(spec, head, "env"), f"{V2_VARIABLE} is set, and enableInTreeAutoscaling is not"


@RULES.rule("autoscaler-v2-restart-policy", "leave restartPolicy out, or write Never")
def autoscaler_v2_restart_policy(spec: Part) -> Iterator[Finding]:
    if not (autoscaling(spec) and spec.get("autoscalerOptions.version") == "v2"):
        return
    for group in groups(spec):
        policy = group.get("template.spec.restartPolicy")
        if policy not in (None, "", "Never"):
            field = inside(spec, group, "template.spec.restartPolicy")
            yield field, f"{policy}: autoscaler v2 replaces pods, so {_called(group)} must not restart them"


@RULES.rule("autoscaler-command-variable", "remove it; it is the operator's")
def autoscaler_command_variable(spec: Part) -> Iterator[Finding]:
    if "KUBERAY_GEN_AUTOSCALER_START_CMD" in environment(spec.part("autoscalerOptions")):
        yield "autoscalerOptions.env", "KUBERAY_GEN_AUTOSCALER_START_CMD would replace the operator's value"
