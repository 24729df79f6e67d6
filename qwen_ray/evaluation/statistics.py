"""Intervals for shares and for paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

ROUNDING = 1e-9
"""Of shares: a fall of exactly a tolerance is allowed, though 0.94 - 0.98 is a little less than -0.04."""
CHANGED = 0.2
"""Share of items assumed to turn from right to wrong or back between two models."""


def z_value(confidence: float) -> float:
    """Two-sided standard normal quantile: 1.96 for 0.95."""
    return NormalDist().inv_cdf(0.5 + confidence / 2)


def wilson(successes: float, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a proportion (Wilson, JASA 1927): stays inside [0, 1], holds at 0 and n."""
    if n == 0:
        return 0.0, 1.0
    z = z_value(confidence)
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of candidate minus baseline over the same items, with its interval: ``(delta, lo, hi)``.

    Right/wrong scores use Newcombe's square-and-add interval for paired proportions (Statistics in
    Medicine 17:2635, 1998, method 10), which does not shrink to a point when no item changed; other scores
    Student's t on the differences.
    """
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError("paired scores need the same, non-zero number of items")
    n = len(baseline)
    if set(baseline) | set(candidate) <= {0.0, 1.0}:
        return _newcombe(baseline, candidate, confidence)
    differences = [c - b for b, c in zip(baseline, candidate, strict=True)]
    mean = sum(differences) / n
    if n == 1:
        return mean, -1.0, 1.0
    from scipy.special import stdtrit  # Student's t; scipy.stats would take a second to import

    error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return mean, mean - half, mean + half


def smallest_difference(n: int, *, changed: float = CHANGED, power: float = 0.8) -> float:
    """Smallest true difference of two accuracies on the same ``n`` items that a test at 5% sees.

    ``power`` is how often it does; ``changed`` the share of items that only one of the two answers right.
    McNemar's test; Connor, Biometrics 43:207 (1987), solved for the difference.
    """
    beside_chance, with_power = z_value(0.95), z_value(2 * power - 1)
    a, b = n + with_power**2, beside_chance * math.sqrt(changed * n)
    c = changed * (beside_chance**2 - with_power**2)
    return min(1.0, (b + math.sqrt(b * b - a * c)) / a)


def _newcombe(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    n = len(baseline)
    pairs = list(zip(candidate, baseline, strict=True))
    both, gained = pairs.count((1.0, 1.0)), pairs.count((1.0, 0.0))
    lost, neither = pairs.count((0.0, 1.0)), pairs.count((0.0, 0.0))
    p1, p2 = (both + gained) / n, (both + lost) / n
    low1, high1 = wilson(both + gained, n, confidence)
    low2, high2 = wilson(both + lost, n, confidence)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    if product > 0:  # continuity correction
        product = max(0.0, product - n / 2)
    phi = product / math.sqrt(margins) if margins else 0.0
    below, above = p1 - low1, high2 - p2
    lo = math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    below, above = high1 - p1, p2 - low2
    hi = math.sqrt(max(0.0, below**2 - 2 * phi * below * above + above**2))
    return p1 - p2, max(-1.0, p1 - p2 - lo), min(1.0, p1 - p2 + hi)
