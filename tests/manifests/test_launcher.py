"""Cluster-launcher files: sound ones pass, each fault is found by its rule."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest

from qwen_ray.manifests import launcher
from tests.manifests import sound
from tests.manifests.test_faults import DELETE, plant

HEAD, GPU = "available_node_types.head", "available_node_types.gpu"
FAULTS: list[tuple[str, str, str, str, Any]] = [
    # provider, rule, field of the fault, field changed, value
    ("aws", "launcher-schema", "max_worker", "max_worker", 4),
    ("aws", "launcher-schema", "cluster_name", "cluster_name", 7),
    ("aws", "launcher-schema", "", "head_node_type", "haed"),
    ("aws", "launcher-schema", "available_node_types.gpu.max_worker", f"{GPU}.max_worker", 4),
    ("aws", "launcher-provider", "provider.region", "provider.region", DELETE),
    ("gcp", "launcher-provider", "provider.project_id", "provider.project_id", ""),
    ("azure", "launcher-provider", "provider.resource_group", "provider.resource_group", DELETE),
    ("aws", "launcher-head", f"{HEAD}.max_workers", f"{HEAD}.max_workers", 1),
    (
        "aws",
        "launcher-workers",
        f"{GPU}.min_workers",
        f"{GPU}",
        lambda t: {**t, "min_workers": 3, "max_workers": 2},
    ),
    ("aws", "launcher-workers", f"{GPU}.max_workers", f"{GPU}.max_workers", 9),
    ("aws", "launcher-resources", f"{GPU}.resources", f"{GPU}.resources", {"GPU": 1}),
    ("gcp", "launcher-resources", f"{GPU}.resources.GPU", f"{GPU}.resources", {"CPU": 4}),
    ("aws", "launcher-node-config", f"{GPU}.node_config.InstanceTyp", f"{GPU}.node_config.InstanceTyp", "g5"),
    (
        "aws",
        "launcher-node-config",
        f"{GPU}.node_config.InstanceType",
        f"{GPU}.node_config.InstanceType",
        DELETE,
    ),
    ("gcp", "launcher-node-config", f"{GPU}.node_config.machinetype", f"{GPU}.node_config.machinetype", "a2"),
    ("gcp", "launcher-node-config", f"{HEAD}.node_config.disks", f"{HEAD}.node_config.disks", DELETE),
    (
        "azure",
        "launcher-node-config",
        f"{GPU}.node_config.azure_arm_parameters.vmsize",
        f"{GPU}.node_config.azure_arm_parameters.vmsize",
        "x",
    ),
    (
        "azure",
        "launcher-node-config",
        f"{GPU}.node_config.azure_arm_parameters.imageSku",
        f"{GPU}.node_config.azure_arm_parameters.imageSku",
        DELETE,
    ),
    (
        "aws",
        "launcher-spot",
        f"{GPU}.node_config.InstanceMarketOptions.MarketType",
        f"{GPU}.node_config.InstanceMarketOptions.MarketType",
        "Spot",
    ),
    (
        "azure",
        "launcher-spot",
        f"{HEAD}.node_config",
        f"{HEAD}.node_config.azure_arm_parameters.priority",
        "Spot",
    ),
    (
        "aws",
        "launcher-start",
        "head_start_ray_commands",
        "head_start_ray_commands[1]",
        "RAY_AUTH_MODE=token ray start --head",
    ),
    (
        "aws",
        "launcher-token-auth",
        "worker_start_ray_commands",
        "worker_start_ray_commands[1]",
        "ray start --address=$RAY_HEAD_IP:6379",
    ),
    ("aws", "launcher-image", "docker.image", "docker.image", "rayproject/ray:latest"),
    ("local", "launcher-provider", "provider.worker_ips", "provider.worker_ips", []),
]


@pytest.mark.parametrize("provider", ["aws", "gcp", "azure", "local"])
def test_nothing_is_wrong_with_a_sound_file(provider):
    assert launcher.faults("c.yaml", sound.launcher(provider), production=True) == []


@pytest.mark.parametrize(("provider", "rule", "field", "changed", "value"), FAULTS)
def test_a_planted_fault_is_found_where_it_is_and_nothing_else(provider, rule, field, changed, value):
    tree = sound.launcher(provider)
    plant(tree, changed, deepcopy(value))

    faults = launcher.faults("c.yaml", tree, production=True)

    assert {fault.rule for fault in faults} == {rule}, [str(fault) for fault in faults]
    assert field in {fault.field for fault in faults}, [str(fault) for fault in faults]
    assert all(fault.object.startswith("Cluster/") and fault.fix for fault in faults)


def test_every_rule_has_a_fault_planted_for_it():
    rules = {*launcher.RULES.names(), *launcher.PRODUCTION.names(), "launcher-schema"}

    assert rules == {fault[1] for fault in FAULTS}
