"""Each rule finds the fault that it is for, in an object in which nothing else is wrong."""

from __future__ import annotations

import re
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest

from qwen_ray.manifests import launcher
from qwen_ray.manifests.check import Report, check_loaded, rule_names
from qwen_ray.manifests.load import Loaded
from qwen_ray.manifests.objects import Manifest
from tests.manifests import sound

DELETE = ...
Change = tuple[str, Any]


def plant(tree: dict[str, Any], field: str, value: Any) -> None:
    """Set a field (``spec.containers[0].image``); a function is given what is there; a list may grow."""
    *keys, last = [
        int(key) if key.isdecimal() else key for key in re.findall(r"[^.\[\]]+(?:/[^\[\]]+)?", field)
    ]
    for key in keys:
        if isinstance(tree, dict):
            tree.setdefault(key, {})
        tree = tree[key]
    if value is DELETE:
        del tree[last]
    elif callable(value):
        tree[last] = value(tree[last])
    elif isinstance(tree, list) and last == len(tree):
        tree.append(value)
    else:
        tree[last] = value


def judged(trees: list[dict[str, Any]], profile: Any = "production") -> Report:
    return check_loaded(Loaded(sets=[[Manifest("f.yaml", tree) for tree in trees]]), profile=profile)


HEAD, GROUP = "headGroupSpec", "workerGroupSpecs[0]"
POD = f"{GROUP}.template.spec"
RAY = f"{POD}.containers[0]"
HEAD_RAY = f"{HEAD}.template.spec.containers[0]"
NODE = {"fieldRef": {"fieldPath": "spec.nodeName"}}
CLUSTER_GOES = {"policy": "DeleteCluster"}
SELF_GOES = {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED"}}
FT = {"redisAddress": "redis:6379"}


def env(name: str, value: str = "1") -> list[dict[str, str]]:
    return [{"name": name, "value": value}]


# rule, field that the fault is in, changes of a RayClusterSpec
CLUSTER: list[tuple[str, str, list[Change]]] = [
    ("unknown-field", f"{GROUP}.maxReplica", [(f"{GROUP}.maxReplica", 2)]),
    ("unknown-field", f"{RAY}.resources.limit", [(f"{RAY}.resources.limit", {})]),
    ("wrong-type", f"{GROUP}.maxReplicas", [(f"{GROUP}.maxReplicas", "two")]),
    ("missing-field", f"{GROUP}.groupName", [(f"{GROUP}.groupName", DELETE)]),
    ("missing-field", "headGroupSpec", [("headGroupSpec", DELETE)]),
    ("invalid-value", "autoscalerOptions.version", [("autoscalerOptions", {"version": "v3"})]),
    ("invalid-value", f"{RAY}.resources.limits.memory", [(f"{RAY}.resources.limits.memory", "16 GB")]),
    ("duplicate-item", f"{RAY}.ports[1]", [(f"{RAY}.ports", [{"containerPort": 1, "protocol": "TCP"}] * 2)]),
    ("group-without-container", f"{POD}.containers", [(f"{POD}.containers", [])]),
    ("group-name-twice", "workerGroupSpecs[1].groupName", [
        ("workerGroupSpecs", lambda g: [*g, deepcopy(g[0])]),
    ]),
    ("resources-twice", f"{GROUP}.resources", [
        (f"{GROUP}.resources", {"CPU": "4"}), (f"{GROUP}.rayStartParams", {"num-cpus": "4"}),
    ]),
    ("labels-in-ray-start-params", f"{GROUP}.rayStartParams.labels", [
        (f"{GROUP}.rayStartParams", {"labels": "a=b"}),
    ]),
    ("group-labels", f"{GROUP}.labels.zone", [(f"{GROUP}.labels", {"zone": "a b"})]),
    ("replicas-order", f"{GROUP}.minReplicas", [(f"{GROUP}.minReplicas", 3)]),
    ("replicas-order", f"{GROUP}.minReplicas", [(f"{GROUP}.minReplicas", -1)]),
    ("idle-timeout", f"{GROUP}.idleTimeoutSeconds", [(f"{GROUP}.idleTimeoutSeconds", 60)]),
    ("idle-timeout", "autoscalerOptions.idleTimeoutSeconds", [
        ("autoscalerOptions", {"idleTimeoutSeconds": -1}),
    ]),
    ("group-priority", f"{GROUP}.priority", [(f"{GROUP}.priority", 5)]),
    ("autoscaler-v2-without-autoscaling", f"{HEAD_RAY}.env", [
        (f"{HEAD_RAY}.env", env("RAY_enable_autoscaler_v2")),
    ]),
    ("autoscaler-command-variable", "autoscalerOptions.env", [
        ("autoscalerOptions", {"env": env("KUBERAY_GEN_AUTOSCALER_START_CMD")}),
    ]),
    ("fault-tolerance-twice", "gcsFaultToleranceOptions", [
        ("gcsFaultToleranceOptions", FT), ("..metadata.annotations", {"ray.io/ft-enabled": "true"}),
    ]),
    ("redis-by-hand", f"{HEAD_RAY}.env", [(f"{HEAD_RAY}.env", env("RAY_REDIS_ADDRESS", "redis:6379"))]),
    ("redis-by-hand", f"{HEAD}.rayStartParams.redis-password", [
        ("gcsFaultToleranceOptions", FT), (f"{HEAD}.rayStartParams.redis-password", "x"),
    ]),
    ("redis-backend", "gcsFaultToleranceOptions.storage", [
        ("gcsFaultToleranceOptions", {**FT, "storage": {"size": "1Gi"}}),
    ]),
    ("token-auth-version ray-version", "rayVersion", [("rayVersion", DELETE)]),
    ("token-auth-version ray-version", "rayVersion", [("rayVersion", "2.51.0")]),
    ("kubernetes-token-auth", "authOptions.secretName", [
        ("authOptions", {"mode": "token", "enableK8sTokenAuth": True, "secretName": "s"}),
    ]),
    ("token-auth", "authOptions.mode", [("authOptions", DELETE)]),
    ("ray-version", "rayVersion", [("rayVersion", "2.59.0")]),
    ("head-runs-no-work", "headGroupSpec.rayStartParams.num-cpus", [(f"{HEAD}.rayStartParams", {})]),
    ("gpu-toleration", f"{POD}.tolerations", [(f"{POD}.tolerations", DELETE)]),
    ("container-name", f"{RAY}.name", [(f"{RAY}.name", "Ray_Worker")]),
    ("duplicate-item", f"{POD}.containers[1]", [(f"{POD}.containers", lambda c: [*c, c[0]])]),
    ("volume-name mount-without-volume", f"{POD}.volumes[0].name", [(f"{POD}.volumes[0].name", "Runs")]),
    ("mount-without-volume", f"{RAY}.volumeMounts[2].name", [
        (f"{RAY}.volumeMounts[2]", {"name": "data", "mountPath": "/data"}),
    ]),
    ("volume-source", f"{POD}.volumes[1]", [
        (f"{POD}.volumes[1].configMap", {"name": "c", "optional": True}),
    ]),
    ("request-above-limit", f"{RAY}.resources.requests.cpu", [(f"{RAY}.resources.limits.cpu", "2")]),
    ("device-without-limit", f"{RAY}.resources.requests.nvidia.com/gpu", [
        (f"{RAY}.resources.limits", {"memory": "16Gi"}),
    ]),
    ("device-request", f"{RAY}.resources.requests.nvidia.com/gpu", [
        (f"{RAY}.resources.requests", {"cpu": "4", "memory": "16Gi"}),
    ]),
    ("whole-devices", f"{RAY}.resources.limits.nvidia.com/gpu", [
        (f"{RAY}.resources", lambda r: {kind: {**of, "nvidia.com/gpu": "500m"} for kind, of in r.items()}),
    ]),
    ("variable", f"{RAY}.env[0]", [
        (f"{RAY}.env", [{"name": "A", "value": "1", "valueFrom": NODE}]),
    ]),
    ("port", f"{RAY}.ports[0].name", [
        (f"{RAY}.ports", [{"containerPort": 80, "name": "a-very-long-name-of-a-port"}]),
    ]),
    ("pod-labels", f"{GROUP}.template.metadata.labels.team", [
        (f"{GROUP}.template.metadata.labels.team", "a b"),
    ]),
    ("init-probe", f"{POD}.initContainers[0].readinessProbe", [
        (f"{POD}.initContainers", [sound.container("wait", readinessProbe={"exec": {"command": ["true"]}})]),
    ]),
    ("run-as-non-root", f"{RAY}.securityContext.runAsNonRoot", [
        (f"{POD}.securityContext.runAsNonRoot", DELETE),
    ]),
    ("root-and-non-root", f"{RAY}", [(f"{RAY}.securityContext.runAsUser", 0)]),
    ("seccomp-profile", f"{RAY}.securityContext.seccompProfile", [
        (f"{POD}.securityContext.seccompProfile", DELETE),
    ]),
    ("drop-capabilities", f"{RAY}.securityContext.capabilities.drop", [
        (f"{RAY}.securityContext.capabilities", {}),
    ]),
    ("drop-capabilities", f"{RAY}.securityContext.capabilities.add", [
        (f"{RAY}.securityContext.capabilities.add", ["SYS_PTRACE"]),
    ]),
    ("privilege-escalation", f"{RAY}.securityContext.allowPrivilegeEscalation", [
        (f"{RAY}.securityContext.allowPrivilegeEscalation", DELETE),
    ]),
    ("privileged", f"{RAY}.securityContext.privileged", [(f"{RAY}.securityContext.privileged", True)]),
    ("host-access", f"{POD}.hostNetwork", [(f"{POD}.hostNetwork", True)]),
    ("host-access", f"{POD}.volumes[2].hostPath", [
        (f"{POD}.volumes[2]", {"name": "docker", "hostPath": {"path": "/var/run"}}),
    ]),
    ("image-pinned", f"{RAY}.image", [(f"{RAY}.image", "registry.example.org:5000/qwen-ray/train")]),
    ("image-pinned", f"{RAY}.image", [(f"{RAY}.image", "qwen-ray/train:latest")]),
    ("memory-request", f"{RAY}.resources", [(f"{RAY}.resources.requests.memory", "8Gi")]),
    ("cpu-request", f"{RAY}.resources.requests.cpu", [(f"{RAY}.resources.requests.cpu", DELETE)]),
    ("shared-memory", f"{RAY}.volumeMounts", [(f"{RAY}.volumeMounts[1].mountPath", "/shm")]),
    ("shared-memory", f"{RAY}.volumeMounts", [(f"{POD}.volumes[1].emptyDir", {"sizeLimit": "8Gi"})]),
    ("token-automount", f"{POD}.automountServiceAccountToken", [
        (f"{POD}.automountServiceAccountToken", DELETE),
    ]),
    ("plain-secret", f"{RAY}.env", [(f"{RAY}.env", env("HF_TOKEN", "hf_x"))]),
    ("plain-secret", f"{RAY}.args", [(f"{RAY}.args", ["ls;", "qwen-ray eval", "--api-key=qr-1"])]),
    ("plain-secret", f"{RAY}.command", [(f"{RAY}.command", ["bash", "-c", "vllm serve x --api-key qr-1"])]),
    ("missing-reference", f"{POD}.volumes[0].persistentVolumeClaim.claimName", [
        (f"{POD}.volumes[0].persistentVolumeClaim.claimName", "run"),
    ]),
    ("missing-reference", f"{POD}.serviceAccountName", [(f"{POD}.serviceAccountName", "trainer")]),
    ("missing-reference", f"{POD}.volumes[2].configMap.name", [
        (f"{POD}.volumes[2]", {"name": "c", "configMap": {"name": "settings"}}),
    ]),
    ("network-policy", f"{GROUP}.template", [(f"{GROUP}.template.metadata.labels", {"app": "other"})]),
    ("feature-gate", "networkPolicy", [("networkPolicy", {"mode": "DenyAll"})]),
    ("feature-gate", "tlsOptions", [("tlsOptions", {"enabled": True})]),
    ("cluster-network-policy feature-gate", "networkPolicy.head.ingressRules", [
        ("networkPolicy", {"mode": "DenyAllEgress", "head": {"ingressRules": [{}]}}),
    ]),
    ("cluster-network-policy feature-gate", "networkPolicy.workerGroups[0].groupName", [
        ("networkPolicy", {"workerGroups": [{"groupName": "cpu"}]}),
    ]),
    ("operator-tls feature-gate", f"{RAY}.env", [
        ("tlsOptions", {"enabled": True}), (f"{RAY}.env", env("RAY_USE_TLS")),
    ]),
    ("history-server feature-gate", "historyServerOptions.collectorOptions.env", [
        ("historyServerOptions", {"collectorOptions": {"image": "collector:1"}}),
    ]),
    ("rocksdb-backend feature-gate", "gcsFaultToleranceOptions.redisAddress", [
        ("gcsFaultToleranceOptions", {**FT, "backend": "rocksdb"}),
    ]),
]  # fmt: skip

# changes of a RayJobSpec
JOB: list[tuple[str, str, list[Change]]] = [
    ("submission-mode", "submissionMode", [("submissionMode", "K8sJob")]),
    ("seconds-positive", "activeDeadlineSeconds", [("activeDeadlineSeconds", -1)]),
    ("invalid-value", "preRunningDeadlineSeconds", [("preRunningDeadlineSeconds", 0)]),
    ("cluster-of-job", "rayClusterSpec", [("rayClusterSpec", DELETE)]),
    ("interactive-mode", "backoffLimit", [("submissionMode", "InteractiveMode"), ("backoffLimit", 1)]),
    ("sidecar-mode", "submitterConfig", [
        ("submissionMode", "SidecarMode"), ("submitterConfig", {"backoffLimit": 1}),
    ]),
    ("sidecar-mode", "rayClusterSpec.headGroupSpec.template.spec.restartPolicy", [
        ("submissionMode", "SidecarMode"),
        ("rayClusterSpec.headGroupSpec.template.spec.restartPolicy", "Always"),
    ]),
    ("deletion-strategy", "deletionStrategy.onSuccess.policy", [
        ("deletionStrategy", {"onSuccess": {"policy": "DeleteNone"}, "onFailure": CLUSTER_GOES}),
    ]),
    ("deletion-strategy", "deletionStrategy.deletionRules", [
        ("deletionStrategy", {"deletionRules": [SELF_GOES]}),
    ]),
    ("crd-rule", "deletionStrategy", [("deletionStrategy", {"onSuccess": {"policy": "DeleteSelf"}})]),
    ("crd-rule", "deletionStrategy.deletionRules[0].condition", [
        ("shutdownAfterJobFinishes", DELETE), ("ttlSecondsAfterFinished", DELETE), ("..metadata.labels", {}),
        ("deletionStrategy", {"deletionRules": [{"policy": "DeleteSelf", "condition": {"ttlSeconds": 1}}]}),
    ]),
    ("deletion-order", "deletionStrategy.deletionRules[1]", [
        ("shutdownAfterJobFinishes", DELETE), ("ttlSecondsAfterFinished", DELETE), ("..metadata.labels", {}),
        ("deletionStrategy", {"deletionRules": [
            {"policy": "DeleteCluster", "condition": {"jobStatus": "FAILED", "ttlSeconds": 60}},
            {"policy": "DeleteSelf", "condition": {"jobStatus": "FAILED", "ttlSeconds": 30}},
        ]}),
    ]),
    ("delete-workers", "deletionStrategy.onSuccess.policy", [
        ("rayClusterSpec", sound.ray_cluster(**deepcopy(sound.AUTOSCALING))),
        ("..metadata.annotations", {"kueue.x-k8s.io/elastic-job": "true"}),
        ("deletionStrategy", {"onSuccess": {"policy": "DeleteWorkers"}, "onFailure": CLUSTER_GOES}),
    ]),
    ("crd-rule", "managedBy", [("managedBy", "me")]),
    ("runtime-env-yaml", "runtimeEnvYAML", [("runtimeEnvYAML", "{")]),
    ("runtime-env", "runtimeEnvYAML", [("runtimeEnvYAML", "env_var: {A: b}")]),
    ("runtime-env", "runtimeEnvYAML", [("runtimeEnvYAML", "env_vars: [A]")]),
    ("plain-secret-in-runtime-env", "runtimeEnvYAML", [("runtimeEnvYAML", "env_vars: {WANDB_API_KEY: abc}")]),
    ("entry-point", "entrypoint", [("entrypoint", "qwen-ray trian --model 3b")]),
    ("entry-point", "entrypoint", [("entrypoint", "qwen-ray train --model '3b")]),
    ("plain-secret", "entrypoint", [
        ("entrypoint", "qwen-ray eval --model m --suite tiny --out x --endpoint http://e --api-key qr-1"),
    ]),
    ("entry-point entry-point-shell", "entrypoint", [
        ("entrypoint", "cd /runs && LOG=1 qwen-ray train --modle 3b"),
    ]),
    ("entry-point-shell", "entrypoint", [("entrypoint", lambda text: f"{text}\nqwen-ray kb list\n")]),
    ("submitter-pod", "submitterPodTemplate", [("submitterPodTemplate", DELETE)]),
    ("kueue-resources", f"rayClusterSpec.{GROUP}.template", [
        (f"rayClusterSpec.{RAY}.resources.limits.ephemeral-storage", "10Gi"),
    ]),
    ("entry-point", "entrypoint", [("entrypoint", "python -m qwen_ray.cli train --workers none")]),
    ("job-deadline", "activeDeadlineSeconds", [("activeDeadlineSeconds", DELETE)]),
    ("job-cleanup", "ttlSecondsAfterFinished", [("ttlSecondsAfterFinished", DELETE)]),
    ("job-storage", f"rayClusterSpec.{RAY}.volumeMounts", [
        (f"rayClusterSpec.{POD}.volumes[0]", {"name": "runs", "emptyDir": {}}),
    ]),
    ("kueue-groups", "rayClusterSpec.workerGroupSpecs", [
        ("rayClusterSpec.workerGroupSpecs", lambda g: [{**g[0], "groupName": f"g{i}"} for i in range(18)]),
    ]),
    ("kueue-autoscaling", "rayClusterSpec.enableInTreeAutoscaling", [
        ("rayClusterSpec", sound.ray_cluster(**deepcopy(sound.AUTOSCALING))),
    ]),
]  # fmt: skip

CRON_POD = "spec.jobTemplate.spec.template.spec"
SERVICE = "spec.rayClusterConfig"
# kind, rule, field, changes of the whole object
OBJECTS: list[tuple[str, str, str, list[Change]]] = [
    ("RayJob", "name-too-long", "metadata.name", [("metadata.name", "a" * 48)]),
    ("RayService", "name-too-long", "metadata.name", [("metadata.name", "a" * 48)]),
    ("RayCluster", "name-too-long", "metadata.name", [("metadata.name", "a" * 54)]),
    ("RayCluster", "name-of-service", "metadata.name", [("metadata.name", "1st")]),
    ("RayCluster", "object-name", "metadata.name", [("metadata.name", "My_Cluster")]),
    ("RayCluster", "unknown-kind", "kind", [("kind", "RayCluter")]),
    ("CronJob", "unknown-kind", "kind", [("apiVersion", "batch/v2")]),
    ("RayCluster", "unknown-field", "metadata.label", [("metadata.label", {})]),
    ("RayCluster", "wrong-type", "metadata.labels.tries", [("metadata.labels", {"tries": 1})]),
    ("RayJob", "suspend-without-shutdown job-cleanup", "spec.suspend", [
        ("spec.suspend", True), ("spec.shutdownAfterJobFinishes", DELETE),
        ("spec.ttlSecondsAfterFinished", DELETE),
        ("spec.activeDeadlineSeconds", 60), ("metadata.labels", {}),
    ]),
    ("RayJob", "ttl-without-shutdown job-cleanup", "spec.ttlSecondsAfterFinished", [
        ("spec.shutdownAfterJobFinishes", DELETE), ("metadata.labels", {}),
    ]),
    ("RayJob", "selected-cluster", "spec.backoffLimit", [
        ("spec.rayClusterSpec", DELETE), ("spec.clusterSelector", {"ray.io/cluster": "shared"}),
        ("spec.backoffLimit", 2), ("metadata.labels", {}),
    ]),
    ("RayJob", "kueue-shutdown", "spec.shutdownAfterJobFinishes", [
        ("spec.shutdownAfterJobFinishes", DELETE), ("spec.ttlSecondsAfterFinished", DELETE),
        ("spec.deletionStrategy", {"deletionRules": [SELF_GOES]}),
    ]),
    ("RayJob", "kueue-cluster-selector", "spec.clusterSelector", [
        ("spec.rayClusterSpec", DELETE), ("spec.clusterSelector", {"ray.io/cluster": "shared"}),
    ]),
    ("RayJob", "missing-reference", "metadata.labels.kueue.x-k8s.io/queue-name", [
        ("metadata.labels", {"kueue.x-k8s.io/queue-name": "teams"}),
    ]),
    ("LocalQueue", "missing-reference", "spec.clusterQueue", [("spec.clusterQueue", "gpu")]),
    ("RayService", "initializing-timeout", "metadata.annotations.ray.io/initializing-timeout", [
        ("metadata.annotations", {"ray.io/initializing-timeout": "ten minutes"}),
    ]),
    ("RayService", "head-service-name", f"{SERVICE}.headGroupSpec.headService.metadata.name", [
        (f"{SERVICE}.headGroupSpec.headService", {"metadata": {"name": "head"}}),
    ]),
    ("RayService", "upgrade-type", "spec.upgradeStrategy.type", [
        ("spec.upgradeStrategy", {"type": "Rolling"}),
    ]),
    ("RayService", "incremental-upgrade", f"{SERVICE}.enableInTreeAutoscaling", [
        (f"{SERVICE}.enableInTreeAutoscaling", False), (f"{SERVICE}.autoscalerOptions", DELETE),
    ]),
    ("RayService", "incremental-upgrade", "spec.upgradeStrategy.clusterUpgradeOptions.stepSizePercent", [
        ("spec.upgradeStrategy.clusterUpgradeOptions.maxSurgePercent", 5),
    ]),
    ("RayService", "kubernetes-token-auth", f"{SERVICE}.authOptions.enableK8sTokenAuth", [
        (f"{SERVICE}.authOptions.enableK8sTokenAuth", True),
    ]),
    ("RayService", "suspended-group", f"{SERVICE}.{GROUP}.suspend", [(f"{SERVICE}.{GROUP}.suspend", True)]),
    ("RayService", "autoscaler-version-twice", f"{SERVICE}.{HEAD_RAY}.env", [
        (f"{SERVICE}.{HEAD_RAY}.env", env("RAY_enable_autoscaler_v2")),
    ]),
    ("RayService", "autoscaler-v2-restart-policy", f"{SERVICE}.{POD}.restartPolicy", [
        (f"{SERVICE}.{POD}.restartPolicy", "Always"),
    ]),
    ("RayService", "autoscaler-v2", f"{SERVICE}.autoscalerOptions.version", [
        (f"{SERVICE}.autoscalerOptions.version", "v1"),
    ]),
    ("RayService", "autoscaler-resources", f"{SERVICE}.autoscalerOptions.resources", [
        (f"{SERVICE}.autoscalerOptions.resources", DELETE),
    ]),
    ("RayService", "autoscaler-hardening", f"{SERVICE}.autoscalerOptions.securityContext", [
        (f"{SERVICE}.autoscalerOptions.securityContext", DELETE),
    ]),
    ("RayService", "gcs-fault-tolerance", f"{SERVICE}.gcsFaultToleranceOptions", [
        (f"{SERVICE}.gcsFaultToleranceOptions", DELETE),
    ]),
    ("RayService", "serve-config", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("route_prefix", "route_prefx")),
    ]),
    ("RayService", "serve-config", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("gpus_per_replica", "gpu_per_replica")),
    ]),
    ("RayService", "serve-config", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("max_replicas: 4", "max_replicas: none")),
    ]),
    ("RayService", "serve-config", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("env_vars", "env_var")),
    ]),
    ("RayService", "serve-config", "spec.serveConfigV2", [("spec.serveConfigV2", "applications: [")]),
    ("PodDisruptionBudget", "disruption-budget selector-matches-nothing", "spec.selector", [
        ("spec.selector.matchLabels", {"ray.io/node-type": "heads"}),
    ]),
    ("RayService", "replica-fits", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("gpus_per_replica: 1", "gpus_per_replica: 2")),
    ]),
    ("RayService", "replica-fits", "spec.serveConfigV2", [
        ("spec.serveConfigV2", lambda text: text.replace("model: 3b", "model: 3b, cpus_per_replica: 5")),
    ]),
    ("Namespace", "namespace-pod-security", "metadata.labels.pod-security.kubernetes.io/enforce", [
        ("metadata.labels", {}),
    ]),
    ("CronJob", "cron-schedule", "spec.schedule", [("spec.schedule", "0 3 * *")]),
    ("CronJob", "cron-schedule", "spec.timeZone", [("spec.timeZone", "Europe/Berln")]),
    ("CronJob", "cron-schedule", "spec.schedule", [("spec.schedule", "TZ=UTC 0 3 * * *")]),
    ("CronJob", "cron-job", "spec.concurrencyPolicy", [("spec.concurrencyPolicy", "Allow")]),
    ("CronJob", "job-restart-policy", f"{CRON_POD}.restartPolicy", [
        (f"{CRON_POD}.restartPolicy", "Always"),
    ]),
    ("CronJob", "unknown-field", f"{CRON_POD}.restartPolice", [
        (f"{CRON_POD}.restartPolice", "Never"),
    ]),
    ("CronJob", "container-name", f"{CRON_POD}.containers", [
        (f"{CRON_POD}.containers", lambda c: [*c, c[0]]),
    ]),
    ("CronJob", "volume-name", f"{CRON_POD}.volumes", [(f"{CRON_POD}.volumes", lambda v: [*v, v[0]])]),
    ("CronJob", "mount-path-twice", f"{CRON_POD}.containers[0].volumeMounts", [
        (f"{CRON_POD}.containers[0].volumeMounts", lambda m: [*m, m[0]]),
    ]),
    ("CronJob", "entry-point", f"{CRON_POD}.containers[0].command", [
        (f"{CRON_POD}.containers[0].command", ["qwen-ray", "kb", "updat", "biology"]),
    ]),
    ("CronJob", "entry-point", f"{CRON_POD}.containers[0].args", [
        (f"{CRON_POD}.containers[0].command", ["/bin/sh", "-ec"]),
        (f"{CRON_POD}.containers[0].args", ["for i in 1; do true; done\nqwen-ray kb lst"]),
    ]),
    ("NetworkPolicy", "wrong-type", "spec.policyTypes", [("spec.policyTypes", "Egress")]),
    ("Service", "selector-matches-nothing", "spec.selector", [
        ("spec.selector", {"ray.io/node-type": "workers"}),
    ]),
    ("PodMonitor", "selector-matches-nothing", "spec.selector", [("spec.selector.matchLabels", {"a": "b"})]),
    ("ClusterQueue", "crd-rule", "spec.resourceGroups[0]", [
        ("spec.resourceGroups[0].coveredResources", lambda c: [*c, "ephemeral-storage"]),
    ]),
]  # fmt: skip


def cases() -> Iterator[Any]:
    groups = [
        *(("RayCluster", "spec", rule, field, changes) for rule, field, changes in CLUSTER),
        *(("RayJob", "spec", rule, field, changes) for rule, field, changes in JOB),
        *((kind, "", rule, field, changes) for kind, rule, field, changes in OBJECTS),
    ]
    for kind, at, rule, field, changes in groups:
        full = [
            (change.removeprefix("..") if change.startswith("..") or not at else f"{at}.{change}", value)
            for change, value in changes
        ]
        yield pytest.param(kind, rule, f"{at}.{field}" if at else field, full, id=f"{kind}-{rule}")


def test_nothing_is_wrong_with_the_set_that_the_others_break():
    report = judged(sound.objects())

    assert [str(fault) for fault in report.faults] == []
    assert len(report.checked) == len(sound.objects())
    assert (report.not_checked, report.secrets) == ([], ["default/redis"])


@pytest.mark.parametrize(("kind", "rule", "field", "changes"), cases())
def test_a_planted_fault_is_found_where_it_is_and_nothing_else(kind, rule, field, changes):
    trees = sound.objects()
    (broken,) = [tree for tree in trees if tree["kind"] == kind]
    for at, value in changes:
        plant(broken, at, deepcopy(value))

    faults = judged(trees).faults

    assert {fault.rule for fault in faults} == set(rule.split()), [str(fault) for fault in faults]
    assert field in {fault.field for fault in faults}, [str(fault) for fault in faults]
    assert all(fault.what and fault.fix for fault in faults)
    name = broken["metadata"]["name"]
    assert f"{broken['kind']}/{name}" in {fault.object for fault in faults}


@pytest.mark.parametrize("key", ["'$QWEN_RAY_API_KEY'", '"$KEY"', "$(cat /etc/key)", "`cat /etc/key`"])
def test_a_key_that_a_command_takes_from_elsewhere_is_not_written_out(key):
    trees = sound.objects()
    (job,) = [tree for tree in trees if tree["kind"] == "RayJob"]
    job["spec"]["entrypoint"] = f"qwen-ray eval --model m --suite tiny --out x --endpoint e --api-key {key}"

    assert "plain-secret" not in {fault.rule for fault in judged(trees).faults}


@pytest.mark.parametrize(("port", "rule"), [(53, "network-policy-dns"), (443, "network-policy-https")])
def test_a_policy_that_stops_ray_from_starting_is_found_at_the_pods(port, rule):
    trees = sound.objects()
    (policy,) = [tree for tree in trees if tree["kind"] == "NetworkPolicy"]
    ports = policy["spec"]["egress"][0]["ports"]
    policy["spec"]["egress"][0]["ports"] = [entry for entry in ports if entry["port"] != port]

    faults = judged(trees).faults

    assert {fault.rule for fault in faults} == {rule}
    assert {fault.object for fault in faults} == {"RayJob/train", "RayService/adapters", "RayCluster/shared"}


def test_a_secret_in_a_file_is_found():
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "redis"}, "stringData": {"p": "x"}}

    report = judged([*sound.objects(), secret])

    assert [(fault.rule, fault.field) for fault in report.faults] == [("secret-in-file", "stringData")]
    assert report.secrets == []


CONFIG = "model: {name: tiny}\ndata: {train: [/etc/qwen-ray/a.jsonl]}\n"
SCRIPT = (
    "#!/bin/bash\n# It's ours\nif [ -e x ]; then y=(--resume); fi\nexec qwen-ray sweep /etc/qwen-ray/s.yaml"
)


def mounted(data: dict[str, str], entrypoint: str) -> list[dict[str, Any]]:
    """The sound set with a ConfigMap in the head of its job."""
    trees = sound.objects()
    spec = trees[1]["spec"]
    pod = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    pod["volumes"].append({"name": "c", "projected": {"sources": [{"configMap": {"name": "files"}}]}})
    pod["containers"][0]["volumeMounts"].append({"name": "c", "mountPath": "/etc/qwen-ray"})
    spec["entrypoint"] = entrypoint
    return [*trees, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "files"}, "data": data}]


@pytest.mark.parametrize(
    ("data", "entrypoint", "expected"),
    [
        ({"t.yaml": CONFIG}, "qwen-ray train --config /etc/qwen-ray/t.yaml --out /runs/a", set()),
        (
            {"t.yaml": CONFIG.replace("model", "modle")},
            "qwen-ray train --config /etc/qwen-ray/t.yaml",
            {("config-file", "data.t.yaml", "unknown key 'modle'")},
        ),
        (
            {"run.sh": f'{SCRIPT} "${{y[@]}}"', "s.yaml": "name: a\nspacee: {}\n"},
            "bash /etc/qwen-ray/run.sh",
            {("config-file", "data.s.yaml", "unknown key 'spacee'")},
        ),
        (
            {"run.sh": f"{SCRIPT} --resum e\n", "s.yaml": "spacee: {}\n"},
            "bash /etc/qwen-ray/run.sh",
            {("entry-point", "data.run.sh", "unrecognized arguments: e")},
        ),
        ({"t.yaml": "modle: {}"}, "python train.py /etc/qwen-ray/t.yaml", set()),
    ],
)
def test_files_that_a_config_map_brings_are_read_as_their_commands_would(data, entrypoint, expected):
    faults = judged(mounted(data, entrypoint)).faults

    found = {(fault.rule, fault.field, fault.what.rpartition("`: ")[2]) for fault in faults}
    assert found == expected


def test_every_rule_has_a_fault_planted_for_it():
    rules = rule_names() - rule_names(launcher)  # whose faults tests/manifests/test_launcher.py plants
    planted = {rule for case in cases() for rule in str(case.values[1]).split()} | {"secret-in-file"}

    assert rules - planted == set()
    assert len(rules) > 80
