"""What every overlay holds. That each object is valid is checked by tests/manifests; here, that it is what it
is meant to be."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.conftest import ROOT
from tests.k8s.rendered import OVERLAYS, all_pods, cluster_spec, objects, of_kind, pods, ray_objects

COUNTS = {"dev-cpu": 31, "gpu": 34, "multi-node-gpu": 34, "kueue": 38, "volcano": 35}
GPU = [name for name in OVERLAYS if name != "dev-cpu"]
CLUSTER_SCOPED = {
    "Namespace",
    "PriorityClass",
    "ResourceFlavor",
    "ClusterQueue",
    "WorkloadPriorityClass",
    "Queue",
}
every = pytest.mark.parametrize("overlay", OVERLAYS)


def test_overlays_are_those_of_the_docs() -> None:
    assert sorted(COUNTS) == OVERLAYS


@every
def test_objects_are_complete_and_in_their_namespace(overlay: str) -> None:
    found = objects(overlay)
    assert len(found) == COUNTS[overlay]
    assert {
        *{("RayJob", name) for name in ("train", "sweep", "benchmark")},
        ("RayService", "adapters"),
        ("RayCluster", "shared"),
        *{("CronJob", name) for name in ("pipeline-weekly", "knowledge-monthly")},
    } <= set(found)
    for (kind, name), tree in found.items():
        space = tree["metadata"].get("namespace")
        assert space == (None if kind in CLUSTER_SCOPED else "qwen-ray"), (kind, name)
        labels = tree["metadata"].get("labels", {})
        assert labels.get("app.kubernetes.io/part-of") == "qwen-ray", (kind, name)
        assert "app.kubernetes.io/component" in labels, f"{kind} {name}: `apply -l` would leave it out"


@every
def test_every_pod_passes_the_restricted_standard_and_more(overlay: str) -> None:
    assert (
        objects(overlay)["Namespace", "qwen-ray"]["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
        == "restricted"
    )
    for where, pod in all_pods(overlay):
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True, where
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert spec["priorityClassName"] in ("qwen-ray-serve", "qwen-ray-batch"), where
        assert not any(spec.get(name) for name in ("hostNetwork", "hostPID", "hostIPC")), where
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["capabilities"] == {"drop": ["ALL"]}, where
            assert context["allowPrivilegeEscalation"] is False, where
            assert context["readOnlyRootFilesystem"] is True, where
            resources = container["resources"]
            for name in ("memory", "nvidia.com/gpu"):
                assert resources["requests"].get(name) == resources["limits"].get(name), (where, name)
            assert resources["limits"].get("memory"), where
            mounted = {mount["mountPath"] for mount in container["volumeMounts"]}
            assert "/tmp" in mounted or where.startswith("StatefulSet"), f"{where}: nowhere to write"


@every
def test_only_the_heads_that_autoscale_have_a_token_of_the_api_server(overlay: str) -> None:
    for account in of_kind(overlay, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    have = {
        where
        for where, pod in all_pods(overlay)
        if pod["spec"].get("automountServiceAccountToken") is not False
    }
    assert have == {"RayService/adapters/head", "RayCluster/shared/head"}
    for tree in ray_objects(overlay):
        name = f"{tree['kind']}/{tree['metadata']['name']}/head"
        assert bool(cluster_spec(tree).get("enableInTreeAutoscaling")) == (name in have)


@every
def test_ray_objects_have_auth_the_version_installed_and_a_head_without_work(overlay: str) -> None:
    for tree in ray_objects(overlay):
        spec = cluster_spec(tree)
        assert spec["rayVersion"] == ray.__version__
        assert spec["authOptions"] == {"mode": "token", "secretName": "qwen-ray-auth"}
        assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
        for where, pod in pods(tree):
            if where != "submitter":
                volumes = {volume["name"]: volume for volume in pod["spec"]["volumes"]}
                assert len(volumes) == len(pod["spec"]["volumes"])
                assert {"storage", "config", "tmp", "shared-memory"} <= set(volumes)
                assert volumes["shared-memory"]["emptyDir"]["medium"] == "Memory"
                assert volumes["storage"]["persistentVolumeClaim"] == {"claimName": "qwen-ray"}


@every
def test_jobs_end_clean_up_and_are_tried_again(overlay: str) -> None:
    for job in of_kind(overlay, "RayJob"):
        spec = job["spec"]
        assert spec["shutdownAfterJobFinishes"] is True
        assert spec["ttlSecondsAfterFinished"] > 0
        assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
        assert spec["backoffLimit"] == 2
    for job in of_kind(overlay, "CronJob"):
        assert job["spec"]["concurrencyPolicy"] == "Forbid"
        failed = job["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]
        assert failed["onExitCodes"]["values"] == [2, 3]  # bad input, and a gate's no


@every
def test_secrets_are_names_only(overlay: str) -> None:
    assert not of_kind(overlay, "Secret")
    for where, pod in all_pods(overlay):
        for container in pod["spec"]["containers"]:
            for variable in container.get("env", ()):
                secret = any(word in variable["name"] for word in ("TOKEN", "PASSWORD", "KEY"))
                assert not secret or "secretKeyRef" in variable["valueFrom"], (where, variable["name"])


@every
def test_network_lets_in_and_out_what_ray_needs_and_nothing_by_default(overlay: str) -> None:
    policies = {tree["metadata"]["name"]: tree["spec"] for tree in of_kind(overlay, "NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    dns = {(port["protocol"], port["port"]) for port in policies["dns"]["egress"][0]["ports"]}
    assert dns == {("UDP", 53), ("TCP", 53)}
    assert {port["port"] for port in policies["outside"]["egress"][0]["ports"]} == {443, 6443}
    heads = {"app.kubernetes.io/component": "serve", "ray.io/node-type": "head"}
    for where, pod in all_pods(overlay):
        selecting = [name for name, policy in policies.items() if _selects(policy["podSelector"], pod)]
        if where == "StatefulSet/redis/pod":  # policies add up: one more would let others in
            assert selecting == ["deny-all", "dns", "redis"]
            assert policies["redis"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == heads
        else:
            assert {"ray", "outside"} <= set(selecting), f"{where} could reach nobody"


def _selects(selector: dict[str, Any], pod: dict[str, Any]) -> bool:
    labels = pod["metadata"]["labels"]
    wanted = selector.get("matchLabels", {})
    unwanted = [
        row for row in selector.get("matchExpressions", ()) if labels.get(row["key"]) in row["values"]
    ]
    return not unwanted and all(labels.get(key) == value for key, value in wanted.items())


@every
def test_service_serves_with_keys_and_can_lose_its_head(overlay: str) -> None:
    service = objects(overlay)["RayService", "adapters"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    text = (
        ROOT / "k8s/overlays" / ("dev-cpu" if overlay == "dev-cpu" else "gpu") / "config/serve.yaml"
    ).read_text()
    assert config == yaml.safe_load(text)
    (application,) = config["applications"]
    keys = application["args"]["keys"]
    for where, pod in pods(service):
        container = pod["spec"]["containers"][0]
        assert str(Path(keys).parent) in {mount["mountPath"] for mount in container["volumeMounts"]}, where
        assert "qwen-ray-serve" in container["image"], where
    spec = cluster_spec(service)
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["gcsFaultToleranceOptions"]["redisAddress"] == "redis:6379"
    replicas = spec["workerGroupSpecs"][0]
    assert replicas["maxReplicas"] >= application["args"]["autoscaling"]["max_replicas"]
    assert replicas["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]
    selected = [tree["spec"] for tree in of_kind(overlay, "PodDisruptionBudget")]
    assert all(
        isinstance(budget["minAvailable"], int) for budget in selected
    )  # a RayCluster cannot be scaled


@pytest.mark.parametrize("overlay", GPU)
def test_gpu_images_are_by_digest_and_say_that_they_are_to_be_set(overlay: str) -> None:
    images = {c["image"] for _, pod in all_pods(overlay) for c in pod["spec"]["containers"]}
    assert len(images) == 3
    assert all(image.endswith("@sha256:" + "0" * 64) for image in images)
    text = (ROOT / "k8s/components/images/kustomization.yaml").read_text()
    assert "placeholders" in text


def gpus(pod: dict[str, Any]) -> int:
    return int(pod["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu", 0))


@pytest.mark.parametrize(("overlay", "nodes", "each"), [("gpu", 1, 1), ("multi-node-gpu", 2, 8)])
def test_gpu_run_asks_for_what_its_configuration_uses(overlay: str, nodes: int, each: int) -> None:
    spec = cluster_spec(objects(overlay)["RayJob", "train"])
    (group,) = spec["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (nodes, nodes, nodes)
    assert gpus(group["template"]) == each
    config = yaml.safe_load(objects(overlay)["ConfigMap", "qwen-ray-config"]["data"]["train.yaml"])
    assert config["cluster"]["workers"] == nodes * each
    shipped = {"gpu": "7b-lora-1x80gb", "multi-node-gpu": "7b-lora-2nodes-8x80gb"}[overlay]
    expected = yaml.safe_load((ROOT / "configs" / f"{shipped}.yaml").read_text())
    assert config["data"].pop("train")
    assert config.pop("checkpoint")
    assert config == expected


def test_a_run_can_choose_whole_nodes_of_the_shared_cluster_by_a_label() -> None:
    """The autoscaler starts what a label asks for only where the group has it in its spec."""
    groups = cluster_spec(objects("multi-node-gpu")["RayCluster", "shared"])["workerGroupSpecs"]
    found = {group["labels"]["group"]: gpus(group["template"]) for group in groups}
    assert found == {"workers": 1, "nodes": 8}
    _, _, docs = (ROOT / "docs/deploy.md").read_text(encoding="utf-8").partition("## Kubernetes")
    (chosen,) = re.findall(r"cluster\.labels\.group=(\w+)", docs)
    assert chosen in found


def test_queues_hold_jobs_only() -> None:
    for overlay, label, queue in (
        ("kueue", "kueue.x-k8s.io/queue-name", ("LocalQueue", "qwen-ray")),
        ("volcano", "volcano.sh/queue-name", ("Queue", "qwen-ray")),
    ):
        assert queue in objects(overlay)
        for tree in ray_objects(overlay):
            named = tree["metadata"]["labels"].get(label)
            assert named == ("qwen-ray" if tree["kind"] == "RayJob" else None)
            if tree["kind"] == "RayJob":  # neither queue counts pods that come and go
                assert not cluster_spec(tree).get("enableInTreeAutoscaling")
    quota = objects("kueue")["ClusterQueue", "qwen-ray"]["spec"]["resourceGroups"][0]
    asked = {
        name
        for job in of_kind("kueue", "RayJob")
        for _, pod in pods(job)
        for container in pod["spec"]["containers"]
        for name in container["resources"]["requests"]
    }
    assert asked <= set(quota["coveredResources"]), "Kueue never admits what no flavour covers"
