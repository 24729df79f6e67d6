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
    n = _paired(baseline, candidate)
    if _right_or_wrong(baseline, candidate):
        return _newcombe(baseline, candidate, confidence)
    mean, error = _mean_and_error(baseline, candidate)
    if n == 1:
        return mean, -1.0, 1.0
    from scipy.special import stdtrit  # Student's t; scipy.stats would take a second to import

    half = float(stdtrit(n - 1, 0.5 + confidence / 2)) * error
    return mean, mean - half, mean + half


def paired_p(baseline: Sequence[float], candidate: Sequence[float]) -> float:
    """Two-sided p-value of no difference over the same items: the test that goes with
    :func:`paired_difference`.

    Right/wrong scores: McNemar's exact test (:func:`mcnemar`). Others: Student's t on the differences; 1 for
    a single item, which cannot tell.
    """
    n = _paired(baseline, candidate)
    if _right_or_wrong(baseline, candidate):
        _, gained, lost, _ = _table(baseline, candidate)
        return mcnemar(gained, lost)
    mean, error = _mean_and_error(baseline, candidate)
    if n == 1 or mean == 0:
        return 1.0
    if error == 0:
        return 0.0
    from scipy.special import stdtr

    return min(1.0, 2 * float(stdtr(n - 1, -abs(mean) / error)))


def mcnemar(gained: int, lost: int) -> float:
    """McNemar's test, exact and two-sided: of ``gained + lost`` changed items half would be gained by chance.

    As it is conditional on the number of items that changed, its level holds for any number of items and
    any share of changes (Fagerland, BMC Medical Research Methodology 13:91, 2013).
    """
    changed, fewer = gained + lost, min(gained, lost)
    ways = total = 1
    for i in range(fewer):
        ways = ways * (changed - i) // (i + 1)
        total += ways
    return min(1.0, 2 * total / 2**changed)  # integers: exact however many there are


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, Scandinavian Journal of Statistics 6:65, 1979): the chance
    that any true null hypothesis among those at most ``a`` is at most ``a``, whatever their dependence."""
    corrected, largest, count = [0.0] * len(p_values), 0.0, len(p_values)
    for rank, i in enumerate(sorted(range(count), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (count - rank) * p_values[i]))
        corrected[i] = largest
    return corrected


def smallest_difference(
    n: int, *, changed: float = CHANGED, power: float = 0.8, confidence: float = 0.95
) -> float:
    """Smallest true difference of two accuracies on the same ``n`` items that a test sees.

    ``power`` is how often it does, at level 1 - ``confidence``; ``changed`` the share of items that only one
    of the two answers right, taken to be more where so many could not make the difference.
    McNemar's test; Connor, Biometrics 43:207 (1987), solved for the difference.
    """
    if mcnemar(n, 0) > 1 - confidence:
        return 1.0  # not even if every item changed
    beside_chance, with_power = z_value(confidence), z_value(2 * power - 1)
    a, b = n + with_power**2, beside_chance * math.sqrt(changed * n)
    c = changed * (beside_chance**2 - with_power**2)
    difference = min(1.0, (b + math.sqrt(b * b - a * c)) / a)
    if difference <= changed + ROUNDING:
        return difference
    return smallest_difference(n, changed=difference, power=power, confidence=confidence)


def detectable_difference(
    baseline: Sequence[float],
    candidate: Sequence[float],
    *,
    at_least: float,
    power: float = 0.8,
    confidence: float = 0.95,
) -> float:
    """Smallest true difference that these items would show in a share ``power`` of comparisons.

    From how much the scores changed here, but from no fewer changed items than a difference of
    ``at_least`` makes: where nothing changed, that is known of these items only.
    """
    n = _paired(baseline, candidate)
    if _right_or_wrong(baseline, candidate):
        _, gained, lost, _ = _table(baseline, candidate)
        changed = max((gained + lost) / n, at_least, 1 / n)
        return smallest_difference(n, changed=changed, power=power, confidence=confidence)
    if n == 1:
        return 1.0
    error = _mean_and_error(baseline, candidate)[1]
    return min(1.0, (z_value(confidence) + z_value(2 * power - 1)) * error)


def _newcombe(
    baseline: Sequence[float], candidate: Sequence[float], confidence: float
) -> tuple[float, float, float]:
    n = len(baseline)
    both, gained, lost, neither = _table(baseline, candidate)
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


def _paired(baseline: Sequence[float], candidate: Sequence[float]) -> int:
    """Their number of items, after checking that it is the same."""
    if len(baseline) != len(candidate) or not baseline:
        raise ValueError("paired scores need the same, non-zero number of items")
    return len(baseline)


def _right_or_wrong(*scores: Sequence[float]) -> bool:
    return all(set(values) <= {0.0, 1.0} for values in scores)


def _table(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[int, int, int, int]:
    """Items right in both, gained, lost, right in neither."""
    pairs = list(zip(candidate, baseline, strict=True))
    return tuple(pairs.count(pair) for pair in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)))  # type: ignore[return-value]


def _mean_and_error(baseline: Sequence[float], candidate: Sequence[float]) -> tuple[float, float]:
    """Mean difference and its standard error (0 for a single item)."""
    differences = [c - b for b, c in zip(baseline, candidate, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    return mean, math.sqrt(sum((d - mean) ** 2 for d in differences) / max(1, n - 1) / n)
