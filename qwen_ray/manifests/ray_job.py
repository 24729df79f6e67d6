"""What the KubeRay operator refuses in RayJobs, RayCronJobs and RayServices (KubeRay 1.7.0).

Source: as in :mod:`qwen_ray.manifests.ray_cluster`. ``JOB`` is given the RayJobSpec, ``OBJECT``
the whole object.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from qwen_ray.errors import UserError
from qwen_ray.manifests import names
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part
from qwen_ray.manifests.ray_cluster import autoscaling

JOB, OBJECT = Rules(), Rules()
SUBMISSION_MODES = ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode")
UPGRADES = ("NewCluster", "None", "NewClusterWithIncrementalUpgrade")
_LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47, "RayCronJob": 36}
_WITH_SCHEDULE = (("ray.io/v1", "RayCronJob"), ("batch/v1", "CronJob"))
_TIMEOUT = "ray.io/initializing-timeout"
_DURATION = re.compile(r"(\d+(\.\d+)?(ns|us|µs|ms|s|m|h))+")
_MACRO = re.compile(r"@(yearly|annually|monthly|weekly|daily|midnight|hourly)|@every \S+")
_DELETED_FIRST = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


@OBJECT.rule(
    "name-too-long", "shorten it: the operator appends to it, and names of services end at 63 characters"
)
def name_too_long(whole: Part) -> Iterator[Finding]:
    of = whole.manifest
    most = _LONGEST.get(of.kind, 63)
    if len(of.name) > most:
        yield "metadata.name", f"{len(of.name)} characters; a {of.kind} may have {most}"


@OBJECT.rule(
    "name-of-service", "lower-case letters, digits and dashes, a letter first: services are named after it"
)
def name_of_service(whole: Part) -> Iterator[Finding]:
    wrong = names.dns_1035_label(whole.manifest.name[:63])
    if wrong and whole.manifest.kind in _LONGEST:
        yield "metadata.name", wrong


@OBJECT.rule("initializing-timeout", "a duration such as 10m, or a count of seconds, above 0")
def initializing_timeout(whole: Part) -> Iterator[Finding]:
    value = whole.manifest.annotations.get(_TIMEOUT)
    if whole.manifest.kind != "RayService" or not value:
        return
    if not (_DURATION.fullmatch(value) or value.isdecimal()) or not re.search("[1-9]", value):
        yield f"metadata.annotations.{_TIMEOUT}", f"'{value}'"


@OBJECT.rule("head-service-name", "remove it; the operator names the service")
def head_service_name(whole: Part) -> Iterator[Finding]:
    field = "spec.rayClusterConfig.headGroupSpec.headService.metadata.name"
    if whole.manifest.kind == "RayService" and whole.get(field):
        yield field, f"a RayService's head service cannot be called {whole.get(field)}"


@OBJECT.rule("upgrade-type", f"one of {', '.join(UPGRADES)}")
def upgrade_type(whole: Part) -> Iterator[Finding]:
    kind = whole.get("spec.upgradeStrategy.type")
    if whole.manifest.kind == "RayService" and kind is not None and kind not in UPGRADES:
        yield "spec.upgradeStrategy.type", f"'{kind}'"


@OBJECT.rule(
    "incremental-upgrade",
    "autoscaling on, clusterUpgradeOptions with 0 <= stepSizePercent <= maxSurgePercent <= 100",
)
def incremental_upgrade(whole: Part) -> Iterator[Finding]:
    if whole.get("spec.upgradeStrategy.type") != "NewClusterWithIncrementalUpgrade":
        return
    if not autoscaling(whole.part("spec.rayClusterConfig")):
        yield "spec.rayClusterConfig.enableInTreeAutoscaling", "incremental upgrades need autoscaling"
    at = "spec.upgradeStrategy.clusterUpgradeOptions"
    options = whole.get(at)
    if options is None:
        yield at, "incremental upgrades need it"
        return
    most, step = options.get("maxSurgePercent", 100), options.get("stepSizePercent", -1)
    if not 0 <= most <= 100:
        yield f"{at}.maxSurgePercent", f"{most} is not within 0 and 100"
    if not 0 <= step <= min(most, 100):
        yield f"{at}.stepSizePercent", f"{step} is not within 0 and maxSurgePercent ({most})"
    if options.get("intervalSeconds", 0) <= 0:
        yield f"{at}.intervalSeconds", "it must be above 0"
    if not options.get("gatewayClassName"):
        yield f"{at}.gatewayClassName", "it is required"


@OBJECT.rule("cron-schedule", "five fields such as '0 3 * * 1', the time zone in timeZone")
def cron_schedule(whole: Part) -> Iterator[Finding]:
    from qwen_ray.lifecycle.cron import Schedule

    if (whole.manifest.api_version, whole.manifest.kind) not in _WITH_SCHEDULE:
        return
    schedule, zone = str(whole.get("spec.schedule", "")), whole.get("spec.timeZone")
    if "TZ" in schedule:
        yield "spec.schedule", "it holds a time zone"
        return
    if _MACRO.fullmatch(schedule):
        schedule = "0 0 * * *"
    try:
        Schedule(schedule, zone or "UTC")
    except UserError as e:
        yield "spec.timeZone" if "time zone" in e.what else "spec.schedule", e.what


@JOB.rule("submission-mode", f"one of {', '.join(SUBMISSION_MODES)}")
def submission_mode(spec: Part) -> Iterator[Finding]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode not in SUBMISSION_MODES:
        yield "submissionMode", f"'{mode}'"


@JOB.rule("suspend-without-shutdown", "set shutdownAfterJobFinishes: true")
def suspend_without_shutdown(spec: Part) -> Iterator[Finding]:
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield "suspend", "a job whose cluster stays cannot be suspended"


@JOB.rule("ttl-without-shutdown", "set shutdownAfterJobFinishes: true, or remove the TTL")
def ttl_without_shutdown(spec: Part) -> Iterator[Finding]:
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        yield "ttlSecondsAfterFinished", "the cluster is not shut down, so there is nothing to wait for"


@JOB.rule("seconds-positive", "a count of seconds above 0 (a TTL or a count of retries: 0 or above)")
def seconds_positive(spec: Part) -> Iterator[Finding]:
    for field, least in (
        ("activeDeadlineSeconds", 1),
        ("preRunningDeadlineSeconds", 1),
        ("ttlSecondsAfterFinished", 0),
        ("backoffLimit", 0),
    ):
        value = spec.get(field)
        if value is not None and value < least:
            yield field, f"{value} is below {least}"


@JOB.rule("cluster-of-job", "give a rayClusterSpec, or a clusterSelector with ray.io/cluster: NAME")
def cluster_of_job(spec: Part) -> Iterator[Finding]:
    selector = spec.get("clusterSelector")
    if not selector and not spec.get("rayClusterSpec"):
        yield "rayClusterSpec", "the job has neither a cluster nor a clusterSelector"
    if selector and not selector.get("ray.io/cluster"):
        yield "clusterSelector", "it does not name a cluster"


@JOB.rule("selected-cluster", "a job on a cluster that exists has no suspend, no retries and no SidecarMode")
def selected_cluster(spec: Part) -> Iterator[Finding]:
    if not spec.get("clusterSelector"):
        return
    if spec.get("suspend"):
        yield "suspend", "clusterSelector is set"
    if spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit", "clusterSelector is set"
    if spec.get("submissionMode") == "SidecarMode":
        yield "submissionMode", "clusterSelector is set"


@JOB.rule("interactive-mode", "remove backoffLimit, or choose another submissionMode")
def interactive_mode(spec: Part) -> Iterator[Finding]:
    if spec.get("submissionMode") == "InteractiveMode" and spec.get("backoffLimit", 0) > 0:
        yield "backoffLimit", "a job submitted by a person is not retried"


@JOB.rule("sidecar-mode", "remove it, or submit with K8sJobMode")
def sidecar_mode(spec: Part) -> Iterator[Finding]:
    if spec.get("submissionMode") != "SidecarMode":
        return
    for field in ("submitterPodTemplate", "submitterConfig"):
        if spec.get(field) is not None:
            yield field, "SidecarMode submits from the head's pod"
    field = "rayClusterSpec.headGroupSpec.template.spec.restartPolicy"
    if spec.get(field) not in (None, "", "Never"):
        yield field, "with SidecarMode the head's pod is not restarted (Never, or unset)"


@JOB.rule(
    "deletion-strategy",
    "either deletionRules, or shutdownAfterJobFinishes, or onSuccess and onFailure with a policy",
)
def deletion_strategy(spec: Part) -> Iterator[Finding]:
    strategy, shutdown = spec.part("deletionStrategy"), spec.get("shutdownAfterJobFinishes")
    if spec.get("deletionStrategy") is None:
        return
    if strategy.get("deletionRules") and shutdown:
        yield "deletionStrategy.deletionRules", "shutdownAfterJobFinishes is set as well"
    for field in ("onSuccess", "onFailure"):
        if strategy.get(field) is None:
            continue
        policy = strategy.get(f"{field}.policy")
        if policy is None:
            yield f"deletionStrategy.{field}.policy", "it is not set"
        if policy == "DeleteNone" and shutdown:
            yield (
                f"deletionStrategy.{field}.policy",
                "shutdownAfterJobFinishes is set, and DeleteNone says no",
            )


@JOB.rule("delete-workers", "DeleteSelf or DeleteNone")
def delete_workers(spec: Part) -> Iterator[Finding]:
    """Workers cannot be deleted where they autoscale, nor anything of a cluster that is not the job's."""
    scaling = autoscaling(spec.part("rayClusterSpec"))
    for field, policy in _policies(spec):
        if policy == "DeleteWorkers" and scaling:
            yield field, "not with autoscaling"
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield field, f"{policy}, and the cluster is not this job's (clusterSelector)"


@JOB.rule(
    "deletion-order", "one rule for a condition and policy; workers go before the cluster, it before the job"
)
def deletion_order(spec: Part) -> Iterator[Finding]:
    seconds: dict[tuple[Any, Any], dict[str, int]] = {}
    for i, rule in enumerate(spec.get("deletionStrategy.deletionRules", [])):
        at, condition = f"deletionStrategy.deletionRules[{i}]", rule["condition"]
        of = seconds.setdefault((condition.get("jobStatus"), condition.get("jobDeploymentStatus")), {})
        policy, wait = rule["policy"], condition.get("ttlSeconds", 0)
        if policy in of:
            yield at, f"there is another rule for {policy} and this condition"
            continue
        if policy in _DELETED_FIRST:
            place = _DELETED_FIRST.index(policy)
            for other, limit in of.items():
                where = _DELETED_FIRST.index(other) if other in _DELETED_FIRST else place
                if (where < place and limit > wait) or (where > place and limit < wait):
                    yield at, f"{policy} after {wait} s does not fit {other} after {limit} s"
        of[policy] = wait


@JOB.rule("runtime-env-yaml", "a YAML mapping")
def runtime_env_yaml(spec: Part) -> Iterator[Finding]:
    try:
        value = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError as e:
        yield "runtimeEnvYAML", f"not valid YAML ({' '.join(str(e).split())})"
        return
    if not isinstance(value, dict):
        yield "runtimeEnvYAML", f"{type(value).__name__}, not a mapping"


def _policies(spec: Part) -> Iterator[tuple[str, str]]:
    for i, rule in enumerate(spec.get("deletionStrategy.deletionRules", [])):
        yield f"deletionStrategy.deletionRules[{i}].policy", rule["policy"]
    for field in ("onSuccess", "onFailure"):
        policy = spec.get(f"deletionStrategy.{field}.policy")
        if policy:
            yield f"deletionStrategy.{field}.policy", policy
