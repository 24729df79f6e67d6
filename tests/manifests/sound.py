"""Objects in which the production profile finds nothing; tests break them in one place each."""

from __future__ import annotations

import importlib.metadata
from copy import deepcopy
from typing import Any

Tree = dict[str, Any]
RAY = importlib.metadata.version("ray")
IMAGE = "registry.example.org/qwen-ray/train:1.2.3"
LABELS = {"app.kubernetes.io/name": "qwen-ray"}
SERVE = """\
applications:
  - name: qwen-ray
    route_prefix: /
    import_path: qwen_ray.serving.launch:build
    runtime_env: {env_vars: {LOG: quiet}}
    args: {model: 3b, gpus_per_replica: 1, autoscaling: {max_replicas: 4}}
"""
_HARD = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def container(name: str = "ray", *, gpus: int = 0, **fields: Any) -> Tree:
    resources: Tree = {
        "requests": {"cpu": "4", "memory": "16Gi"},
        "limits": {"memory": "16Gi"},
    }
    mounts = [{"name": "runs", "mountPath": "/runs"}]
    if gpus:
        for kind in resources.values():
            kind["nvidia.com/gpu"] = str(gpus)
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})
    full = {
        "name": name,
        "image": IMAGE,
        "resources": resources,
        "volumeMounts": mounts,
        "securityContext": _HARD,
    }
    return deepcopy({**full, **fields})


def pod(*, gpus: int = 0, first: Tree | None = None, **fields: Any) -> Tree:
    """A pod template."""
    volumes: list[Tree] = [{"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}}]
    if gpus:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}})
    spec = {
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 1000,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [first or container(gpus=gpus)],
        "volumes": volumes,
    }
    if gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
    return {"metadata": {"labels": dict(LABELS)}, "spec": {**spec, **fields}}


def ray_cluster(**fields: Any) -> Tree:
    """A RayClusterSpec: a head, and a group of workers with GPUs."""
    return {
        "rayVersion": RAY,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0"}, "template": pod()},
        "workerGroupSpecs": [
            {
                "groupName": "gpu",
                "replicas": 1,
                "minReplicas": 1,
                "maxReplicas": 2,
                "rayStartParams": {},
                "template": pod(gpus=1),
            }
        ],
        **fields,
    }


def ray_job(**fields: Any) -> Tree:
    """A RayJobSpec."""
    return {
        "entrypoint": "qwen-ray train --model 3b --data /runs/data.jsonl --workers 2 --out /runs/bio",
        "runtimeEnvYAML": "env_vars: {LOG: quiet}\n",
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": 3600,
        "activeDeadlineSeconds": 86400,
        "submitterPodTemplate": pod(restartPolicy="Never"),
        "rayClusterSpec": ray_cluster(),
        **fields,
    }


AUTOSCALING = {
    "enableInTreeAutoscaling": True,
    "autoscalerOptions": {
        "version": "v2",
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "1Gi"}},
        "securityContext": _HARD,
    },
}


def _object(api_version: str, kind: str, name: str, spec: Tree | None = None, **metadata: Any) -> Tree:
    tree: Tree = {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, **metadata}}
    return tree if spec is None else {**tree, "spec": spec}


def objects() -> list[Tree]:
    """The whole set."""
    queue = {"kueue.x-k8s.io/queue-name": "team"}
    upgrade = {
        "type": "NewClusterWithIncrementalUpgrade",
        "clusterUpgradeOptions": {"gatewayClassName": "istio", "stepSizePercent": 10, "intervalSeconds": 30},
    }
    ft = {
        "redisAddress": "redis:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "redis", "key": "p"}}},
    }
    weekly = container(command=["qwen-ray", "kb", "update", "biology", "--root", "/runs/knowledge"])
    allow = [{"ports": [{"protocol": "UDP", "port": 53}, {"port": 53}, {"port": 443}]}]
    return [
        {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": "ml", "labels": {"pod-security.kubernetes.io/enforce": "restricted"}},
        },
        _object("ray.io/v1", "RayJob", "train", ray_job(), labels=queue),
        _object(
            "ray.io/v1",
            "RayService",
            "adapters",
            {
                "serveConfigV2": SERVE,
                "upgradeStrategy": upgrade,
                "rayClusterConfig": ray_cluster(gcsFaultToleranceOptions=ft, **deepcopy(AUTOSCALING)),
            },
        ),
        _object("ray.io/v1", "RayCluster", "shared", ray_cluster()),
        _object(
            "batch/v1",
            "CronJob",
            "knowledge",
            {
                "schedule": "0 3 1 * *",
                "concurrencyPolicy": "Forbid",
                "startingDeadlineSeconds": 3600,
                "jobTemplate": {
                    "spec": {
                        "activeDeadlineSeconds": 7200,
                        "ttlSecondsAfterFinished": 86400,
                        "template": pod(first=weekly, restartPolicy="Never"),
                    }
                },
            },
        ),
        _object("v1", "PersistentVolumeClaim", "runs", {
            "accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "100Gi"}},
        }),
        _object("policy/v1", "PodDisruptionBudget", "heads", {
            "minAvailable": 1, "selector": {"matchLabels": {"ray.io/node-type": "head"}},
        }),
        _object("networking.k8s.io/v1", "NetworkPolicy", "pods", {
            "podSelector": {"matchLabels": LABELS},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [{"podSelector": {}}]}],
            "egress": allow,
        }),
        _object("v1", "Service", "endpoint", {
            "selector": {"ray.io/node-type": "worker"}, "ports": [{"port": 8000}],
        }),
        _object("monitoring.coreos.com/v1", "PodMonitor", "ray", {
            "selector": {"matchLabels": {"ray.io/is-ray-node": "yes"}},
            "podMetricsEndpoints": [{"port": "metrics"}],
        }),
        _object("kueue.x-k8s.io/v1beta2", "LocalQueue", "team", {"clusterQueue": "gpus"}),
        _object("kueue.x-k8s.io/v1beta2", "ClusterQueue", "gpus", {
            "namespaceSelector": {},
            "resourceGroups": [{
                "coveredResources": ["cpu", "memory", "nvidia.com/gpu"],
                "flavors": [{"name": "a100", "resources": [
                    {"name": name, "nominalQuota": 8} for name in ("cpu", "memory", "nvidia.com/gpu")
                ]}],
            }],
        }),
        _object("kueue.x-k8s.io/v1beta2", "ResourceFlavor", "a100", {}),
    ]  # fmt: skip


def cron_job() -> Tree:
    """A RayCronJob; its feature gate is off by default."""
    return _object("ray.io/v1", "RayCronJob", "weekly", {"schedule": "0 3 * * 1", "jobTemplate": ray_job()})


_START = "RAY_AUTH_MODE=token ray start"


def launcher(provider: str) -> Tree:
    """A cluster-launcher file for a provider."""
    common = {
        "cluster_name": "qwen-ray",
        "max_workers": 4,
        "docker": {"image": IMAGE, "container_name": "ray"},
        "auth": {"ssh_user": "ubuntu"},
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }
    if provider == "local":
        at = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
        return {**common, "provider": at, "max_workers": 2}
    image = {"imagePublisher": "p", "imageOffer": "o", "imageSku": "s", "imageVersion": "1"}
    node = {
        "aws": (
            {"InstanceType": "m5.xlarge"},
            {"InstanceType": "g5.xlarge", "InstanceMarketOptions": {"MarketType": "spot"}},
        ),
        "gcp": (
            {"machineType": "n2-standard-4", "disks": [{"boot": True}]},
            {
                "machineType": "a2-highgpu-1g",
                "disks": [{"boot": True}],
                "guestAccelerators": [{"acceleratorType": "nvidia-tesla-a100", "acceleratorCount": 1}],
                "scheduling": [{"provisioningModel": "SPOT"}, {"onHostMaintenance": "TERMINATE"}],
            },
        ),
        "azure": (
            {"azure_arm_parameters": {"vmSize": "Standard_D4s_v3", **image}},
            {"azure_arm_parameters": {"vmSize": "Standard_NC24ads_A100_v4", "priority": "Spot", **image}},
        ),
    }  # fmt: skip
    at = {
        "aws": {"type": "aws", "region": "eu-central-1"},
        "gcp": {
            "type": "gcp",
            "region": "europe-west4",
            "project_id": "p",
            "availability_zone": "europe-west4-a",
        },
        "azure": {"type": "azure", "location": "westeurope", "resource_group": "ray"},
    }[provider]
    head, worker = node[provider]
    return {
        **common,
        "provider": at,
        "head_node_type": "head",
        "available_node_types": {
            "head": {"node_config": head, "resources": {"CPU": 0}, "min_workers": 0, "max_workers": 0},
            "gpu": {
                "node_config": worker,
                "resources": {"CPU": 4, "GPU": 1},
                "min_workers": 0,
                "max_workers": 4,
            },
        },
    }
