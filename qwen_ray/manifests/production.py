"""The production profile for Ray objects: authentication, deadlines, storage, recovery.

``JOB`` is given a RayJobSpec, ``CLUSTER`` a RayClusterSpec, ``SERVICE`` an object whose Serve
config is valid, ``OBJECT`` a whole object of any kind.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata

from qwen_ray.manifests.entry_points import is_operator, our_settings, tokens
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, cluster, groups
from qwen_ray.manifests.pod_rules import extended, inside, quantity
from qwen_ray.manifests.ray_cluster import ray_container

JOB, CLUSTER, SERVICE, OBJECT = Rules(), Rules(), Rules(), Rules()
_BUCKET = re.compile(r"\b(s3|gs|az|abfss?|hdfs)://")
_ENFORCE = "pod-security.kubernetes.io/enforce"


@OBJECT.rule("namespace-pod-security", f"the label {_ENFORCE}: restricted")
def namespace_pod_security(whole: Part) -> Iterator[Finding]:
    if whole.manifest.kind == "Namespace" and whole.manifest.labels.get(_ENFORCE) != "restricted":
        yield f"metadata.labels.{_ENFORCE}", "the namespace takes pods with any rights"


@OBJECT.rule("secret-in-file", "make the Secret by a command, and name it here only")
def secret_in_file(whole: Part) -> Iterator[Finding]:
    if whole.manifest.kind == "Secret":
        for field in ("data", "stringData"):
            if whole.get(field):
                yield field, "whoever reads the file has the secret"


@OBJECT.rule(
    "cron-job",
    "concurrencyPolicy: Forbid, startingDeadlineSeconds, activeDeadlineSeconds and ttlSecondsAfterFinished",
)
def cron_job(whole: Part) -> Iterator[Finding]:
    if whole.manifest.kind != "CronJob":
        return
    if whole.get("spec.concurrencyPolicy") != "Forbid":
        yield "spec.concurrencyPolicy", "two runs may be under way at one time"
    for field in ("startingDeadlineSeconds", "jobTemplate.spec.activeDeadlineSeconds"):
        if not whole.get(f"spec.{field}"):
            yield f"spec.{field}", "not set"


@OBJECT.rule("gcs-fault-tolerance", "gcsFaultToleranceOptions with a Redis outside of the cluster")
def gcs_fault_tolerance(whole: Part) -> Iterator[Finding]:
    """A service goes on while its head is replaced; a job goes on from a checkpoint, without Redis."""
    field = "spec.rayClusterConfig.gcsFaultToleranceOptions"
    if whole.manifest.kind == "RayService" and not whole.get(field):
        yield field, "when the head is lost, so are all replicas"


@SERVICE.rule("replica-fits", "workers with as many GPUs and CPUs in a pod as a replica takes")
def replica_fits(whole: Part) -> Iterator[Finding]:
    spec = cluster(whole.manifest)
    if whole.manifest.kind != "RayService" or spec is None:
        return
    for settings in our_settings(str(whole.get("spec.serveConfigV2") or "")):
        for what, asked in (("GPU", settings.gpus_per_replica), ("CPU", settings.cpus_per_replica)):
            most = max((has(group, what) for group in groups(spec)), default=0)
            if asked > most:
                yield "spec.serveConfigV2", f"a replica takes {asked:g} {what}s, the largest pod has {most:g}"


@JOB.rule("job-deadline", "activeDeadlineSeconds: seconds after which the job is taken to hang")
def job_deadline(spec: Part) -> Iterator[Finding]:
    if not spec.get("activeDeadlineSeconds"):
        yield "activeDeadlineSeconds", "a job that hangs keeps its GPUs"


@JOB.rule("job-cleanup", "shutdownAfterJobFinishes: true with ttlSecondsAfterFinished, or deletionRules")
def job_cleanup(spec: Part) -> Iterator[Finding]:
    if spec.get("deletionStrategy.deletionRules") or spec.get("clusterSelector"):
        return
    if not spec.get("shutdownAfterJobFinishes"):
        yield "shutdownAfterJobFinishes", "the cluster stays, with its GPUs, when the job is done"
    elif not spec.get("ttlSecondsAfterFinished"):
        yield "ttlSecondsAfterFinished", "the pods, and their logs, are gone in the second that the job ends"


@JOB.rule("submitter-pod", "a submitterPodTemplate with the security contexts of other pods, or HTTPMode")
def submitter_pod(spec: Part) -> Iterator[Finding]:
    mode = spec.get("submissionMode", "K8sJobMode")
    if mode == "K8sJobMode" and spec.get("submitterPodTemplate") is None:
        yield (
            "submitterPodTemplate",
            "the operator's own pod has no security context: restricted pods refuse it",
        )


@JOB.rule("entry-point-shell", "one command; more of them as a mounted script, or in bash -c '...'")
def entry_point_shell(spec: Part) -> Iterator[Finding]:
    """The operator puts the entry point, as it is, at the end of the submitter's shell command."""
    if spec.get("submissionMode", "K8sJobMode") in ("K8sJobMode", "SidecarMode"):
        try:
            rest = [token for token in tokens(str(spec.get("entrypoint", "")).rstrip()) if is_operator(token)]
        except ValueError:  # an open quotation mark: `entry-point` says so
            return
        if rest:
            yield (
                "entrypoint",
                f"what comes after '{rest[0].strip()}' runs in the submitter, not on the cluster",
            )


@JOB.rule(
    "job-storage",
    "mount a claim (or a CSI volume) in head and workers, or write to a bucket (s3://, gs://, az://)",
)
def job_storage(spec: Part) -> Iterator[Finding]:
    entry = str(spec.get("entrypoint", "")) + str(spec.get("runtimeEnvYAML", ""))
    if spec.get("rayClusterSpec") is None or _BUCKET.search(entry):
        return
    for group in groups(spec.part("rayClusterSpec")):
        kept = [
            volume.get("name")
            for volume in group.parts("template.spec.volumes")
            if {"persistentVolumeClaim", "csi", "nfs"} & volume.tree.keys()
        ]
        first = group.parts("template.spec.containers")[0]
        if not any(mount.get("name") in kept for mount in first.parts("volumeMounts")):
            field = inside(spec, first, "volumeMounts")
            yield field, "nothing that a job writes here outlives its pod: no checkpoint to go on from"


@CLUSTER.rule("token-auth", "authOptions: {mode: token}")
def token_auth(spec: Part) -> Iterator[Finding]:
    if spec.get("authOptions.mode") != "token":
        yield "authOptions.mode", "whoever reaches the head runs programs on it"


@CLUSTER.rule("ray-version", "rayVersion: that of the image")
def ray_version(spec: Part) -> Iterator[Finding]:
    ours, theirs = metadata.version("ray"), spec.get("rayVersion")
    if theirs != ours:
        yield "rayVersion", f"{theirs or 'not set'}; qwen-ray runs on Ray {ours}"


@CLUSTER.rule("head-runs-no-work", "rayStartParams: {num-cpus: '0'} for the head")
def head_runs_no_work(spec: Part) -> Iterator[Finding]:
    head = groups(spec)[0]
    cpus = head.get("rayStartParams", {}).get("num-cpus", head.get("resources", {}).get("CPU"))
    if spec.get("workerGroupSpecs") and cpus != "0":
        yield "headGroupSpec.rayStartParams.num-cpus", "work on the head takes the whole cluster down with it"


@CLUSTER.rule("gpu-toleration", "tolerations for the taint nvidia.com/gpu (or the device's)")
def gpu_toleration(spec: Part) -> Iterator[Finding]:
    for group in spec.parts("workerGroupSpecs"):
        pod = group.part("template")
        devices = {
            name
            for container in pod.parts("spec.containers")
            for name in container.get("resources.limits", {})
            if extended(name)
        }
        tolerated = {str(toleration.get("key", "")) for toleration in pod.parts("spec.tolerations")}
        if devices and not tolerated & {*devices, ""}:
            yield (
                inside(spec, pod, "spec.tolerations"),
                f"nodes with {', '.join(sorted(devices))} are often tainted",
            )


@CLUSTER.rule("autoscaler-v2", "autoscalerOptions: {version: v2}")
def autoscaler_v2(spec: Part) -> Iterator[Finding]:
    if spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions.version") != "v2":
        yield "autoscalerOptions.version", "version 1 is on its way out"


@CLUSTER.rule("autoscaler-resources", "autoscalerOptions.resources, the same memory as request and limit")
def autoscaler_resources(spec: Part) -> Iterator[Finding]:
    if spec.get("enableInTreeAutoscaling"):
        asked, most = (
            spec.get(f"autoscalerOptions.resources.{kind}.memory") for kind in ("requests", "limits")
        )
        if not asked or asked != most:
            yield (
                "autoscalerOptions.resources",
                f"memory: request {asked or 'not set'}, limit {most or 'not set'}",
            )


@CLUSTER.rule("autoscaler-hardening", "autoscalerOptions.securityContext as for other containers")
def autoscaler_hardening(spec: Part) -> Iterator[Finding]:
    """The operator adds the autoscaler's container to the head; the pod's context alone is not restricted."""
    if not spec.get("enableInTreeAutoscaling"):
        return
    context = spec.part("autoscalerOptions.securityContext")
    if context.get("allowPrivilegeEscalation") is not False or "ALL" not in context.get(
        "capabilities.drop", []
    ):
        yield "autoscalerOptions.securityContext", "a namespace with restricted pods refuses the head"


def has(group: Part, resource: str) -> float:
    """CPUs or GPUs that Ray counts in a pod of a group: as it is told, else by the Ray container's limits."""
    told = group.get("rayStartParams", {}).get(
        f"num-{resource.lower()}s", group.get("resources", {}).get(resource)
    )
    limits = ray_container(group).get("resources.limits", {})
    asked = ray_container(group).get("resources.requests", {})
    if told is None:
        name = next((name for name in limits if extended(name)), "") if resource == "GPU" else "cpu"
        told = limits.get(name, asked.get(name, 0))
    return float(quantity(told) or 0)
