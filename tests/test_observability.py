"""Dashboards and alert rules ask for metrics and labels that exist. promtool and Grafana are not asked: what
is checked here is names, labels, and the shape of the files."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from qwen_ray.serving.app import Client, create_app
from qwen_ray.serving.metrics import Metrics
from qwen_ray.serving.usage import Usage
from qwen_ray.training import prometheus
from tests.conftest import ROOT

DASHBOARDS = sorted((ROOT / "observability/grafana").glob("*.json"))
RULES = ROOT / "k8s/components/monitoring/rules.yaml"
# Ray's own, with where Ray names them and the labels that we use.
RAYS = {
    "ray_node_gpus_utilization": ("dashboard/modules/reporter/reporter_agent.py", {"instance"}),
    "ray_serve_deployment_replica_healthy": (
        "serve/_private/deployment_state.py",
        {"application", "deployment"},
    ),
}
FUNCTIONS = {
    *(
        "sum",
        "max",
        "avg",
        "count",
        "rate",
        "changes",
        "histogram_quantile",
        "time",
        "absent",
        "scalar",
        "vector",
    ),
    *("by", "on", "or", "and", "offset"),
}
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


def exported_by_training() -> dict[str, set[str]]:
    """Names as Ray exports them (tests/training/test_prometheus.py asks an agent), and their labels."""
    tags = set(prometheus.TAGS)
    return {
        **{f"ray_{name}": tags for name in prometheus.GAUGES},
        **{f"ray_{name}": {*tags, "rank"} for name in prometheus.MEMORY_GAUGES},
        f"ray_{prometheus.FAILURES}_total": {*tags, "reason"},
    }


def exported_by_the_endpoint() -> dict[str, set[str]]:
    metrics = Metrics()
    prompt = {"route": {"domain": "law"}, "adapter": "facts@2", "canary": "facts@2"}
    metrics.finished("/v1/chat/completions", 200, 1.0, [Usage("facts@2", 3, 4)], prompts=[prompt])
    metrics.first_token("/v1/chat/completions", 0.5)
    metrics.rejected("engine")
    load = dict.fromkeys(["score_requests", "waiting", "generating", "waiting_tokens"], 1)
    metrics.heard({"replica": {"id": "a", "load": load, "adapters": ["facts@2"]}})
    families = text_string_to_metric_families(metrics.text().decode())
    samples = [sample for family in families for sample in family.samples]
    return {s.name: set(s.labels) for s in samples if not s.name.endswith("_created")}


@cache
def exported() -> dict[str, set[str]]:
    rays = {name: labels for name, (_, labels) in RAYS.items()}
    return {**exported_by_training(), **exported_by_the_endpoint(), **rays}


def rules() -> dict[str, dict[str, Any]]:
    """By the name of the alert."""
    (tree,) = yaml.safe_load_all(RULES.read_text(encoding="utf-8"))
    return {rule["alert"]: rule for group in tree["spec"]["groups"] for rule in group["rules"]}


def panels(path: Path) -> list[dict[str, Any]]:
    return [p for p in json.loads(path.read_text(encoding="utf-8"))["panels"] if p["type"] != "row"]


def expressions() -> Iterator[tuple[str, str, set[str]]]:
    """(where, expression, labels that its legend or its text names)."""
    for path in DASHBOARDS:
        for panel in panels(path):
            for target in panel["targets"]:
                legend = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
                yield f"{path.stem}: {panel['title']}", target["expr"], legend
    for name, rule in rules().items():
        said = " ".join(rule["annotations"].values())
        yield name, rule["expr"], set(re.findall(r"\$labels\.(\w+)", said))


def read(expression: str) -> tuple[set[str], set[str], set[str]]:
    """(metrics, labels in matchers, labels that it groups by)."""
    bare = re.sub(r'"[^"]*"', "", expression)
    matched = {label for part in re.findall(r"{([^}]*)}", bare) for label in IDENTIFIER.findall(part)}
    grouped = {label for part in re.findall(r"\bby \(([^)]*)\)", bare) for label in IDENTIFIER.findall(part)}
    for gone in (r"{[^}]*}", r"\[[^\]]*\]", r"\bby \([^)]*\)", r"\boffset \w+"):
        bare = re.sub(gone, " ", bare)
    return set(IDENTIFIER.findall(bare)) - FUNCTIONS, matched, grouped


def test_every_expression_is_on_metrics_and_labels_that_exist() -> None:
    used: set[str] = set()
    for where, expression, named in expressions():
        assert expression.count("(") == expression.count(")"), where
        metrics, matched, grouped = read(expression)
        assert metrics, where
        assert metrics <= set(exported()), f"{where}: nothing exports {metrics - set(exported())}"
        labels = set.union(*(exported()[metric] for metric in metrics))
        assert matched | grouped <= labels, f"{where}: no label {(matched | grouped) - labels}"
        assert named <= grouped, f"{where}: {named - grouped} is not in the result"
        used |= metrics
    shown = {metric.removesuffix("_bucket") for metric in used}
    ours = set(exported_by_training()) | set(exported_by_the_endpoint())
    for metric in ours:
        family = re.sub("_(bucket|count|sum)$", "", metric)
        assert family in shown or metric in shown, f"no dashboard shows {metric}"


def test_routes_in_expressions_are_the_endpoints() -> None:
    routes = {getattr(route, "path", "") for route in create_app(cast(Client, None)).routes}
    named = {
        path for _, expression, _ in expressions() for path in re.findall(r'route="([^"]*)"', expression)
    }
    assert named
    assert named <= routes


@pytest.mark.parametrize("name", RAYS)
def test_rays_own_metrics_are_rays(name: str) -> None:
    ray = importlib.util.find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    source = Path(ray.origin).parent / RAYS[name][0]
    assert f'"{name.removeprefix("ray_")}"' in source.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboards_are_whole(path: Path) -> None:
    tree = json.loads(path.read_text(encoding="utf-8"))
    assert tree["schemaVersion"] == 39
    assert tree["uid"] == f"qwen-ray-{path.stem}"
    source, *others = tree["templating"]["list"]
    assert (source["type"], source["name"]) == ("datasource", "datasource")
    for variable in others:
        metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["definition"]).groups()  # type: ignore[union-attr]
        assert variable["query"]["query"] == variable["definition"]
        assert variable["name"] == label
        assert label in exported()[metric]
    names = {variable["name"] for variable in others}
    uses = set(re.findall(r"\$(\w+)", " ".join(t["expr"] for p in panels(path) for t in p["targets"])))
    assert uses - {"__rate_interval"} == names
    assert len({panel["id"] for panel in tree["panels"]}) == len(tree["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in tree["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        assert all(x < 24 for x, _ in cells)
        taken |= cells
    for panel in panels(path):
        assert panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_alerts_are_what_the_docs_say() -> None:
    text = (ROOT / "docs/observability.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(QwenRay\w+)`", text, re.MULTILINE))
    assert named == set(rules())
    for rule in rules().values():
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert rule["annotations"]["summary"]
    for metric in exported_by_training():
        assert f"`{metric}`" in text, f"the docs do not have {metric}"


def test_the_alerts_name_is_the_application_and_deployment_that_we_make() -> None:
    source = (ROOT / "qwen_ray/serving/launch.py").read_text(encoding="utf-8")
    expression = rules()["QwenRayNoReplica"]["expr"]
    for path in (ROOT / "k8s/overlays").glob("*/config/serve.yaml"):
        (application,) = yaml.safe_load(path.read_text(encoding="utf-8"))["applications"]
        assert f'application="{application["name"]}"' in expression
    (deployment,) = re.findall(r'deployment="(\w+)"', expression)
    assert re.search(rf'EngineReplica,\s+name="{deployment}"', source)
