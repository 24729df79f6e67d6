"""Ray objects in a queue of Kueue. Source: https://kueue.sigs.k8s.io/docs/tasks/run/ ."""

from __future__ import annotations

from collections.abc import Iterator

from qwen_ray.manifests.faults import Fault, Finding, Rules
from qwen_ray.manifests.objects import Manifest, Part, cluster, containers, items, job, pods

RULES = Rules()
QUEUE_LABEL, ELASTIC = "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/elastic-job"
_MOST_GROUPS = 17


@RULES.rule("kueue-shutdown", "shutdownAfterJobFinishes: true")
def kueue_shutdown(whole: Part) -> Iterator[Finding]:
    spec = job(whole.manifest)
    if _queued(whole) and spec is not None and not spec.get("shutdownAfterJobFinishes"):
        yield spec.at("shutdownAfterJobFinishes"), "Kueue needs it to take the job off its nodes"


@RULES.rule("kueue-cluster-selector", "give the job a rayClusterSpec, or take the queue's label off")
def kueue_cluster_selector(whole: Part) -> Iterator[Finding]:
    spec = job(whole.manifest)
    if _queued(whole) and spec is not None and spec.get("clusterSelector"):
        yield (
            spec.at("clusterSelector"),
            "a job on a cluster that exists asks for nothing that could be queued",
        )


@RULES.rule("kueue-groups", f"at most {_MOST_GROUPS} worker groups")
def kueue_groups(whole: Part) -> Iterator[Finding]:
    for spec in _clusters(whole):
        count = len(spec.parts("workerGroupSpecs"))
        if count > _MOST_GROUPS:
            yield spec.at("workerGroupSpecs"), f"{count} worker groups"


@RULES.rule("kueue-autoscaling", f"the annotation {ELASTIC}: 'true' (and Kueue's gate), or no autoscaling")
def kueue_autoscaling(whole: Part) -> Iterator[Finding]:
    for spec in _clusters(whole):
        if spec.get("enableInTreeAutoscaling") and whole.manifest.annotations.get(ELASTIC) != "true":
            yield spec.at("enableInTreeAutoscaling"), "Kueue admits a cluster of a fixed size"


def _queued(whole: Part) -> bool:
    return whole.manifest.is_ray and QUEUE_LABEL in whole.manifest.labels


def _clusters(whole: Part) -> list[Part]:
    spec = cluster(whole.manifest) if _queued(whole) else None
    return [] if spec is None else [spec]


def faults(manifests: list[Manifest]) -> Iterator[Fault]:
    """Resources of queued objects that the queue, if it is in the set, does not give: they wait for ever."""
    local = {(m.namespace, m.name): m for m in manifests if m.kind == "LocalQueue"}
    queues = {m.name: Part(m, m.tree) for m in manifests if m.kind == "ClusterQueue"}
    for manifest in manifests:
        queue = local.get((manifest.namespace, str(manifest.labels.get(QUEUE_LABEL))))
        of = queues.get(str(queue.tree["spec"].get("clusterQueue"))) if queue else None
        if of is None or not manifest.is_ray:
            continue
        covered = {
            name
            for group in of.parts("spec.resourceGroups")
            for name in items(group.tree, "coveredResources")
        }
        for pod in pods(manifest):
            asked = {
                name
                for container in containers(pod)
                for kind in ("requests", "limits")
                for name in container.get(f"resources.{kind}", {})
            }
            if asked - covered:
                what = f"ClusterQueue {of.manifest.name} does not cover {', '.join(sorted(asked - covered))}"
                fix = "add it to coveredResources and to each flavor of the queue"
                yield Fault(manifest.file, manifest.title, pod.path, "kueue-resources", what, fix)
