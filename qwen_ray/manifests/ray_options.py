"""What the KubeRay operator refuses in options of a cluster: fault tolerance, authentication, network, TLS.

Source, and what rules are given: as in :mod:`qwen_ray.manifests.ray_cluster`.
"""

from __future__ import annotations

from collections.abc import Iterator

from qwen_ray.manifests import names
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, environment, groups, items
from qwen_ray.manifests.ray_cluster import inside, ray_container

RULES = Rules()
FT_ANNOTATION, NAMESPACE_ANNOTATION = "ray.io/ft-enabled", "ray.io/external-storage-namespace"


@RULES.rule("fault-tolerance-twice", "keep gcsFaultToleranceOptions and remove the annotation")
def fault_tolerance_twice(spec: Part) -> Iterator[Finding]:
    if spec.get("gcsFaultToleranceOptions") is None:
        return
    for annotation in (FT_ANNOTATION, NAMESPACE_ANNOTATION):
        if spec.manifest.annotations.get(annotation):
            yield "gcsFaultToleranceOptions", f"the annotation {annotation} is set as well"


@RULES.rule(
    "redis-by-hand", "write it in gcsFaultToleranceOptions (redisAddress, redisUsername, redisPassword)"
)
def redis_by_hand(spec: Part) -> Iterator[Finding]:
    head = groups(spec)[0]
    container = ray_container(head)
    variables, options = environment(container), spec.get("gcsFaultToleranceOptions")
    annotated = str(spec.manifest.annotations.get(FT_ANNOTATION, "")).lower() == "true"
    env = inside(spec, container, "env")
    if "RAY_REDIS_ADDRESS" in variables and (options is not None or not annotated):
        yield env, "RAY_REDIS_ADDRESS switches fault tolerance on by a variable"
    if options is not None and "REDIS_PASSWORD" in variables:
        yield env, "REDIS_PASSWORD is set beside gcsFaultToleranceOptions"
    if options is not None and head.get("rayStartParams", {}).get("redis-password"):
        yield (
            inside(spec, head, "rayStartParams.redis-password"),
            "it is set beside gcsFaultToleranceOptions",
        )
    if head.get("rayStartParams", {}).get("redis-username"):
        yield inside(spec, head, "rayStartParams.redis-username"), "the operator refuses it"
    if "REDIS_USERNAME" in variables:
        yield env, "the operator refuses REDIS_USERNAME"


@RULES.rule("rocksdb-backend", "the embedded backend takes storage alone; the operator does the rest")
def rocksdb_backend(spec: Part) -> Iterator[Finding]:
    options = spec.part("gcsFaultToleranceOptions")
    if options.get("backend") != "rocksdb":
        return
    for key in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if options.get(key):
            yield inside(spec, options, key), "it is for the redis backend"
    storage = options.get("storage", {})
    for key in ("size", "storageClassName", "accessModes"):
        if storage.get("claimName") and storage.get(key):
            yield inside(spec, options, f"storage.{key}"), "a claim that exists (claimName) has its own"
    head = groups(spec)[0]
    container = ray_container(head)
    for name in ("RAY_gcs_storage", "RAY_gcs_storage_path"):
        if name in environment(container):
            yield inside(spec, container, "env"), f"{name} is the operator's"
    for mount in items(container.tree, "volumeMounts"):
        if mount.get("name") == "gcs-storage" or mount.get("mountPath") == "/data/gcs":
            yield inside(spec, container, "volumeMounts"), "gcs-storage and /data/gcs are the operator's"
    if any(volume.get("name") == "gcs-storage" for volume in items(head.tree, "template.spec.volumes")):
        yield inside(spec, head, "template.spec.volumes"), "gcs-storage is the operator's"


@RULES.rule("redis-backend", "remove storage, or set backend: rocksdb")
def redis_backend(spec: Part) -> Iterator[Finding]:
    options = spec.get("gcsFaultToleranceOptions", {})
    if options.get("backend", "redis") == "redis" and options.get("storage") is not None:
        yield "gcsFaultToleranceOptions.storage", "it is for the rocksdb backend"


@RULES.rule(
    "token-auth-version",
    "set rayVersion to the Ray of the image: 2.52.0 or later (2.55.0 for Kubernetes tokens)",
)
def token_auth_version(spec: Part) -> Iterator[Finding]:
    if spec.get("authOptions.mode") != "token":
        return
    needs = (2, 55, 0) if spec.get("authOptions.enableK8sTokenAuth") else (2, 52, 0)
    old = names.older(spec.get("rayVersion"), needs)
    if old:
        yield "rayVersion", f"token authentication needs it: {old}"


@RULES.rule("kubernetes-token-auth", "mode: token without secretName, in a RayCluster")
def kubernetes_token_auth(spec: Part) -> Iterator[Finding]:
    options = spec.get("authOptions", {})
    if not options.get("enableK8sTokenAuth"):
        return
    if spec.manifest.kind != "RayCluster":
        yield "authOptions.enableK8sTokenAuth", f"not supported for a {spec.manifest.kind}"
    if options.get("mode") != "token":
        yield "authOptions.enableK8sTokenAuth", "authOptions.mode is not token"
    if options.get("secretName"):
        yield "authOptions.secretName", "enableK8sTokenAuth is set as well"


@RULES.rule(
    "history-server", "collectorOptions with image and STORAGE_BACKEND, and no variable of the operator"
)
def history_server(spec: Part) -> Iterator[Finding]:
    if spec.get("historyServerOptions") is None:
        return
    options = spec.part("historyServerOptions.collectorOptions")
    if not options.get("image"):
        yield "historyServerOptions.collectorOptions.image", "it must be set"
    variables = environment(options)
    for name in sorted(
        {"POD_IP", "FQ_RAY_IP", "RAY_CLUSTER_NAME", "RAY_ROLE", "OWNER_KIND", "OWNER_NAME"} & variables.keys()
    ):
        yield "historyServerOptions.collectorOptions.env", f"{name} is the operator's"
    if not variables.get("STORAGE_BACKEND", {}).get("value"):
        yield "historyServerOptions.collectorOptions.env", "STORAGE_BACKEND must be set"
    for group in groups(spec):
        if any(c.get("name") == "ray-history-collector" for c in group.parts("template.spec.containers")):
            yield inside(spec, group, "template.spec.containers"), "ray-history-collector is the operator's"


@RULES.rule(
    "cluster-network-policy", "rules only for a direction that the mode denies, and for groups that exist"
)
def cluster_network_policy(spec: Part) -> Iterator[Finding]:
    policy = spec.part("networkPolicy")
    if spec.get("networkPolicy") is None:
        return
    free = {"DenyAllEgress": "ingressRules", "DenyAllIngress": "egressRules"}.get(
        policy.get("mode", "DenyAll")
    )
    of_groups = policy.parts("workerGroups")
    for part in (policy.part("head"), policy.part("worker"), *of_groups):
        if free and part.get(free):
            yield inside(spec, part, free), f"{policy.get('mode')} does not restrict it"
    existing = [group.get("groupName") for group in spec.parts("workerGroupSpecs")]
    for part in of_groups:
        if part.get("groupName") not in existing:
            yield inside(spec, part, "groupName"), f"there is no worker group {part.get('groupName')}"
    for group in spec.parts("workerGroupSpecs"):
        wrong = names.dns_1123_label(str(group.get("groupName")))
        if wrong:
            yield inside(spec, group, "groupName"), f"it becomes part of a policy's name: {wrong}"


@RULES.rule("operator-tls", "remove it; the operator manages TLS where tlsOptions is set")
def operator_tls(spec: Part) -> Iterator[Finding]:
    if not spec.get("tlsOptions.enabled"):
        return
    for part in (*(ray_container(group) for group in groups(spec)), spec.part("autoscalerOptions")):
        for name in environment(part):
            if name in ("RAY_USE_TLS", "RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
                yield inside(spec, part, "env"), f"{name} is the operator's"
        for mount in items(part.tree, "volumeMounts"):
            if mount.get("name") == "ray-tls" or mount.get("mountPath") == "/etc/ray/tls":
                yield inside(spec, part, "volumeMounts"), "ray-tls and /etc/ray/tls are the operator's"
