"""The figures of `router eval`, against scikit-learn and by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from qwen_ray.routing.evaluation import evaluate
from qwen_ray.routing.questions import OTHER
from qwen_ray.routing.router import Calibration, Domain, Router
from qwen_ray.serving.assistant import Route

ADAPTERS = {"biology": "facts", "history": "facts", "mathematics": None}


def router() -> Router:
    domains = [Domain(name, adapter, 1, 1, 1.0) for name, adapter in ADAPTERS.items()]
    rows = np.eye(1, 3, dtype=np.float32)
    return Router(
        domains,
        [rows] * 3,
        rows,
        embedder="e",
        embedder_name="e",
        method="knn",
        calibration=Calibration(0.0, 0.0, 1),
    )


def drawn(n: int) -> tuple[list[Route], list[str]]:
    """Routes that are right three times of four, with scores rounded so that some are tied."""
    rng = random.Random(0)
    names = [*ADAPTERS, OTHER]
    truth = [rng.choice(names) for _ in range(n)]
    routes = []
    for true in truth:
        choice = true if rng.random() < 0.75 else rng.choice(names)
        score = round(rng.uniform(0, 0.3), 2) if choice != OTHER else round(rng.uniform(-0.3, -0.01), 2)
        domain = "biology" if choice == OTHER else choice
        routes.append(Route(ADAPTERS[domain] if score >= 0 else None, score, domain))
    return routes, truth


def test_the_figures_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    routes, truth = drawn(400)
    found = evaluate(router(), routes, truth)
    chosen = [route.domain if route.score >= 0 else OTHER for route in routes]
    names = [*ADAPTERS, OTHER]
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, chosen))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth, chosen, average="macro"))
    known = [true != OTHER for true in truth]
    assert found.auroc is not None
    assert found.auroc == pytest.approx(metrics.roc_auc_score(known, [route.score for route in routes]))
    matrix = metrics.confusion_matrix(truth, chosen, labels=names)
    assert [list(row.values()) for row in found.confusion.values()] == matrix.tolist()
    assert list(found.confusion) == names
    for value, (low, high) in (
        (found.accuracy, found.accuracy_interval),
        (found.macro_f1, found.macro_f1_interval),
        (found.auroc, found.auroc_interval or (0, 0)),
    ):
        assert low < value < high
        assert 0.05 < high - low < 0.15
    assert evaluate(router(), routes, truth) == found
    assert "AUROC" in str(found)


def test_two_domains_of_one_adapter_may_be_confused() -> None:
    routes = [Route("facts", 0.1, "history"), Route(None, 0.1, "mathematics"), Route("facts", 0.1, "biology")]
    found = evaluate(router(), routes, ["biology", OTHER, "mathematics"])
    assert found.accuracy == 0
    assert found.answered == pytest.approx(2 / 3)


def test_without_others_there_is_no_auroc() -> None:
    found = evaluate(router(), [Route("facts", 0.1, "history")], ["history"])
    assert found.auroc is None
    assert found.auroc_interval is None
    assert (found.accuracy, found.macro_f1) == (1, 1)
    assert "AUROC" not in str(found)
