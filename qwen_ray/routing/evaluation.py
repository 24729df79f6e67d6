"""How well a router does on questions whose domain is known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from qwen_ray.evaluation.statistics import wilson, z_value
from qwen_ray.routing.questions import OTHER
from qwen_ray.routing.router import Router
from qwen_ray.serving.assistant import Route

_RESAMPLES = 1000

Interval = tuple[float, float]


@dataclass(frozen=True)
class Evaluation:
    """Figures with their 95% intervals. ``confusion``: true class -> chosen class -> questions."""

    n: int
    accuracy: float
    accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    auroc: float | None
    """Chance that a question of a domain has a higher score than another; None without either of the two."""
    auroc_interval: Interval | None
    answered: float
    """Share that the right adapter or the base answers: two domains of one answerer may be confused."""
    confusion: dict[str, dict[str, int]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        names = list(self.confusion)
        width = max(map(len, [*names, "is \\ taken for"]))
        table = [f"{'is / taken for':{width}}  " + "  ".join(names)]
        for name, row in self.confusion.items():
            table.append(f"{name:{width}}  " + "  ".join(f"{row[of]:>{len(of)}}" for of in names))
        lines = [
            f"{self.n} questions",
            f"accuracy        {_shown(self.accuracy, self.accuracy_interval)}",
            f"macro-F1        {_shown(self.macro_f1, self.macro_f1_interval)}",
            f"right answerer  {self.answered:.3f}",
        ]
        if self.auroc is not None and self.auroc_interval is not None:
            lines.insert(3, f"abstention AUROC {_shown(self.auroc, self.auroc_interval)}")
        return "\n".join([*lines, "", *table])


def _shown(value: float, interval: Interval) -> str:
    return f"{value:.3f}  [{interval[0]:.3f}, {interval[1]:.3f}]"


def evaluate(router: Router, routes: Sequence[Route], truth: Sequence[str]) -> Evaluation:
    """``truth``: of each route's question, the name of a domain of the router, or :data:`OTHER`.

    Accuracy: Wilson's interval. Macro-F1, over the classes in ``truth``: percentiles of 1,000 resamples.
    AUROC of the score: Hanley and McNeil, Radiology 143:29 (1982).
    """
    names = [domain.name for domain in router.domains] + [OTHER]
    adapters = {domain.name: domain.adapter for domain in router.domains} | {OTHER: None}
    chosen = [router.chosen(route) or OTHER for route in routes]
    counts = np.zeros((len(names), len(names)), np.int64)
    for true, choice in zip(truth, chosen, strict=True):
        counts[names.index(true), names.index(choice)] += 1
    n, right = len(chosen), int(np.trace(counts))
    drawn = np.random.default_rng(0).multinomial(n, counts.ravel() / n, _RESAMPLES)
    resampled = [_macro_f1(sample.reshape(counts.shape)) for sample in drawn]
    low, high = np.percentile(resampled, [2.5, 97.5])
    known = [route.score for route, true in zip(routes, truth, strict=True) if true != OTHER]
    unknown = [route.score for route, true in zip(routes, truth, strict=True) if true == OTHER]
    area = _auroc(known, unknown) if known and unknown else None
    return Evaluation(
        n=n,
        accuracy=right / n,
        accuracy_interval=wilson(right, n),
        macro_f1=_macro_f1(counts),
        macro_f1_interval=(float(low), float(high)),
        auroc=area,
        auroc_interval=None if area is None else _auroc_interval(area, len(known), len(unknown)),
        answered=sum(adapters[true] == adapters[choice] for true, choice in zip(truth, chosen, strict=True))
        / n,
        confusion={
            name: dict(zip(names, map(int, row), strict=True))
            for name, row in zip(names, counts, strict=True)
        },
    )


def _macro_f1(counts: Any) -> float:
    asked, chosen = counts.sum(1), counts.sum(0)
    there = asked > 0
    return float((2 * counts.diagonal()[there] / (asked + chosen)[there]).mean())


def _auroc(known: Sequence[float], unknown: Sequence[float]) -> float:
    from scipy.stats import rankdata

    ranks = rankdata([*known, *unknown])[: len(known)]
    return float((ranks.sum() - len(known) * (len(known) + 1) / 2) / (len(known) * len(unknown)))


def _auroc_interval(area: float, known: int, unknown: int) -> Interval:
    q1, q2 = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (known - 1) * (q1 - area**2) + (unknown - 1) * (q2 - area**2)
    half = z_value(0.95) * math.sqrt(max(0.0, variance) / (known * unknown))
    return max(0.0, area - half), min(1.0, area + half)
