"""Cluster-launcher files (`ray up`): Ray's own validator, and what it leaves open.

Ray checks the outer keys; ``node_config`` is passed on to the cloud as it is, so a fault there shows when the
first machine is asked for. Keys by the clouds' reference pages: EC2 RunInstances, Compute Engine instances;
on Azure by the template that Ray fills in.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from collections.abc import Iterator
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from qwen_ray.errors import did_you_mean
from qwen_ray.manifests.builtin import without_nulls
from qwen_ray.manifests.faults import Fault, Finding, Rules
from qwen_ray.manifests.hardening import pinned
from qwen_ray.manifests.objects import Manifest, Part, Tree, dig
from qwen_ray.manifests.schema import value_faults

RULES, PRODUCTION = Rules(), Rules()
PROVIDERS: dict[str, dict[str, list[str]]] = {
    "aws": {
        "provider": ["region"],
        "required": ["InstanceType"],
        "known": [
            "BlockDeviceMappings", "CapacityReservationSpecification", "CpuOptions", "CreditSpecification",
            "DisableApiTermination", "EbsOptimized", "EnclaveOptions", "HibernationOptions",
            "IamInstanceProfile", "ImageId", "InstanceInitiatedShutdownBehavior", "InstanceMarketOptions",
            "InstanceType", "KeyName", "LaunchTemplate", "MetadataOptions", "Monitoring",
            "NetworkInterfaces", "Placement", "PrivateDnsNameOptions", "SecurityGroupIds", "SubnetId",
            "SubnetIds", "TagSpecifications", "UserData",
        ],
    },
    "gcp": {
        "provider": ["region", "project_id"],
        "required": ["machineType", "disks"],
        "known": [
            "acceleratorType", "advancedMachineFeatures", "canIpForward", "confidentialInstanceConfig",
            "deletionProtection", "description", "disks", "displayDevice", "guestAccelerators", "hostname",
            "labels", "machineType", "metadata", "minCpuPlatform", "name", "networkConfig",
            "networkInterfaces", "networkPerformanceConfig", "params", "reservationAffinity",
            "resourcePolicies", "runtimeVersion", "scheduling", "schedulingConfig", "serviceAccounts",
            "shieldedInstanceConfig", "sourceInstanceTemplate", "sourceMachineImage", "tags",
        ],
    },
    "azure": {
        "provider": ["location", "resource_group"],
        "required": ["azure_arm_parameters.vmSize"],
        "known": ["azure_arm_parameters", "azure_arm_template", "tags"],
    },
    "local": {"provider": ["head_ip", "worker_ips"], "required": [], "known": []},
}  # fmt: skip
_AZURE_IMAGE = ["imagePublisher", "imageOffer", "imageSku", "imageVersion"]


def faults(file: str, tree: Tree, *, production: bool) -> list[Fault]:
    """What is wrong with a cluster-launcher file."""
    of = Manifest(file, {"kind": "Cluster", "metadata": {"name": tree.get("cluster_name")}})
    found = [Fault(file, of.title, *fault) for fault in _of_ray(tree)]
    if found:  # its shape cannot be relied on
        return found
    whole = Part(of, without_nulls(tree))
    found += RULES.faults(whole)
    return [*found, *PRODUCTION.faults(whole)] if production else found


def _of_ray(tree: Tree) -> Iterator[tuple[str, str, str, str]]:
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler._private.util").setLevel(logging.WARNING)
    rule, fix = "launcher-schema", "as in Ray's cluster YAML reference"
    copy = deepcopy(tree)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(copy))
    except ValidationError as e:
        for field, _, what, mend in value_faults(e):
            yield field, rule, what, mend
    except KeyError as e:
        yield str(e).strip("'"), rule, "it is missing", fix
    except Exception as e:  # Ray raises many kinds here, its own ClickException among them
        yield "", rule, " ".join(str(e).split()) or type(e).__name__, fix


def _provider(whole: Part) -> str:
    return str(whole.get("provider.type"))


def _types(whole: Part) -> list[tuple[str, Part]]:
    return [
        (name, whole.part("available_node_types").part(name))
        for name in whole.get("available_node_types", {})
        if "." not in name  # Ray's own names have none; a path could not be read otherwise
    ]


@RULES.rule("launcher-provider", f"one of {', '.join(PROVIDERS)}, with its region, project or addresses")
def launcher_provider(whole: Part) -> Iterator[Finding]:
    kind = _provider(whole)
    if kind not in PROVIDERS:
        yield "provider.type", f"'{kind}'; {did_you_mean(kind, PROVIDERS)}"
        return
    for key in PROVIDERS[kind]["provider"]:
        if whole.get(f"provider.{key}") in (None, "", []):
            yield f"provider.{key}", f"{kind} needs it"


@RULES.rule("launcher-head", "head_node_type: one of available_node_types, with max_workers: 0")
def launcher_head(whole: Part) -> Iterator[Finding]:
    if _provider(whole) == "local":
        return
    head = whole.get("head_node_type")
    types = whole.get("available_node_types", {})
    if head not in types:
        yield "head_node_type", f"'{head}'; {did_you_mean(str(head), types)}"
    elif types[head].get("max_workers", 0) or types[head].get("min_workers", 0):
        yield f"available_node_types.{head}.max_workers", "the head's type would be started as workers too"


@RULES.rule("launcher-workers", "0 <= min_workers <= max_workers <= the cluster's max_workers")
def launcher_workers(whole: Part) -> Iterator[Finding]:
    most = whole.get("max_workers", 2)
    for name, part in _types(whole):
        low, high = part.get("min_workers", 0), part.get("max_workers", most)
        if not 0 <= low <= high:
            yield part.at("min_workers"), f"{low}, and max_workers is {high}"
        if name != whole.get("head_node_type") and high > most:
            yield part.at("max_workers"), f"{high}, and the cluster's max_workers is {most}"


@RULES.rule("launcher-resources", "resources with CPU (and GPU) of the machine; the head's may be 0")
def launcher_resources(whole: Part) -> Iterator[Finding]:
    if _provider(whole) == "local":
        return
    for _, part in _types(whole):
        if "CPU" not in part.get("resources", {}):
            yield part.at("resources"), "the autoscaler cannot tell what the machine has"
        accelerated = part.get("node_config.guestAccelerators")
        if accelerated and not part.get("resources", {}).get("GPU"):
            yield part.at("resources.GPU"), "the machine has GPUs that Ray is not told of"


@RULES.rule("launcher-node-config", "keys as the cloud's reference has them")
def launcher_node_config(whole: Part) -> Iterator[Finding]:
    rules = PROVIDERS.get(_provider(whole))
    if rules is None or _provider(whole) == "local":
        return
    for _, part in _types(whole):
        node = part.part("node_config")
        for key in node.tree:
            if key not in rules["known"]:
                yield node.at(key), f"there is no such key; {did_you_mean(str(key), rules['known'])}"
        for key in rules["required"]:
            if not node.get(key):
                yield node.at(key), "it is missing"
        parameters = node.part("azure_arm_parameters").tree
        for key in parameters:
            if key not in _azure_parameters():
                wrong = f"there is no such parameter; {did_you_mean(str(key), _azure_parameters())}"
                yield node.at(f"azure_arm_parameters.{key}"), wrong
        for key in _AZURE_IMAGE if parameters and not parameters.get("imageId") else ():
            if not parameters.get(key):
                yield node.at(f"azure_arm_parameters.{key}"), "it is missing"


@lru_cache(maxsize=1)
def _azure_parameters() -> list[str]:
    import ray.autoscaler._private._azure as azure

    template = Path(azure.__file__).parent / "azure-vm-template.json"
    known = json.loads(template.read_text(encoding="utf-8"))["parameters"]
    return [*known, "availability_zone"]  # which Ray turns into the template's zones


@RULES.rule(
    "launcher-spot",
    "AWS: InstanceMarketOptions.MarketType: spot; GCP: a list of scheduling; Azure: priority: Spot",
)
def launcher_spot(whole: Part) -> Iterator[Finding]:
    for name, part in _types(whole):
        market = part.get("node_config.InstanceMarketOptions.MarketType")
        scheduling = part.get("node_config.scheduling")
        priority = part.get("node_config.azure_arm_parameters.priority")
        if part.get("node_config.InstanceMarketOptions") is not None and market not in (
            "spot",
            "capacity-block",
        ):
            yield part.at("node_config.InstanceMarketOptions.MarketType"), f"'{market}'"
        if scheduling is not None and not isinstance(scheduling, (list, dict)):
            yield part.at("node_config.scheduling"), f"'{scheduling}'"
        if priority not in (None, "Regular", "Low", "Spot"):
            yield part.at("node_config.azure_arm_parameters.priority"), f"'{priority}'"
        spot = market == "spot" or priority == "Spot" or _spot(scheduling)
        if spot and name == whole.get("head_node_type"):
            yield part.at("node_config"), "the head is a spot machine: when it goes, the cluster goes"


def _spot(scheduling: Any) -> bool:
    entries = scheduling if isinstance(scheduling, list) else [scheduling or {}]
    return any(
        isinstance(entry, dict) and (entry.get("preemptible") or entry.get("provisioningModel") == "SPOT")
        for entry in entries
    )


@RULES.rule(
    "launcher-start",
    "ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml; --address=$RAY_HEAD_IP:6379",
)
def launcher_start(whole: Part) -> Iterator[Finding]:
    for field, needs in (
        ("head_start_ray_commands", ("ray start", "--head", "--autoscaling-config")),
        ("worker_start_ray_commands", ("ray start", "--address")),
    ):
        text = "\n".join(str(command) for command in whole.get(field) or [])
        for word in needs if text else ():
            if word not in text:
                yield field, f"no {word}"


@PRODUCTION.rule("launcher-token-auth", "RAY_AUTH_MODE=token before every `ray start`")
def launcher_token_auth(whole: Part) -> Iterator[Finding]:
    for field in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = "\n".join(str(command) for command in whole.get(field) or [])
        options = " ".join(map(str, whole.get("docker.run_options") or []))
        if "RAY_AUTH_MODE=token" not in commands + options:
            yield field, "whoever reaches the head runs programs on it"


@PRODUCTION.rule("launcher-image", "a digest, or the tag of a version")
def launcher_image(whole: Part) -> Iterator[Finding]:
    for field in ("image", "head_image", "worker_image"):
        image = dig(whole.tree, f"docker.{field}")
        if image and not pinned(str(image)):
            yield f"docker.{field}", f"'{image}' is another image tomorrow"
