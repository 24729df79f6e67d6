"""Mixtures: the region, drawing from it, coordinates, lattice, projection."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest
from scipy import stats

from qwen_ray.errors import UserError
from qwen_ray.sweeps.simplex import Simplex

DOMAINS = ["biology", "history", "security", "replay"]
FIXED = Simplex(DOMAINS, 0.02, {"replay": (0.2, 0.2), "security": (0.1, 0.1)})
REGIONS = [
    Simplex(DOMAINS),
    Simplex(DOMAINS, 0.02),
    Simplex(DOMAINS, 0.02, {"replay": (0.05, 0.6)}),
    Simplex(DOMAINS, 0.05, {"replay": (0.3, 0.4), "biology": (0.0, 0.2)} | {"biology": (0.05, 0.2)}),
    Simplex(DOMAINS, 0.2, {"replay": (0.2, 0.26), "security": (0.2, 0.27)}),
    Simplex(DOMAINS[:2], 0.1),
    FIXED,
    Simplex(DOMAINS, 0.02, {"replay": (0.2, 0.2), "biology": (0.02, 0.3), "history": (0.02, 0.3)}),
    Simplex(DOMAINS[:2], 0.0, {"biology": (0.4, 0.4), "history": (0.6, 0.6)}),
]


@pytest.mark.parametrize("region", REGIONS)
def test_draws_keep_floor_and_ranges(region: Simplex) -> None:
    for i in range(300):
        mix = region.sample(random.Random(i))
        assert list(mix) == list(region.domains)
        assert math.fsum(mix.values()) == pytest.approx(1, abs=1e-12)
        for domain, share in mix.items():
            low, high = region.ranges.get(domain, (0, 1))
            assert max(low, region.floor) - 1e-9 <= share <= high + 1e-9


def test_draws_are_uniform() -> None:
    """A flat Dirichlet's shares are Beta(1, D - 1); so they are above the floors, and a corner that ranges
    cut off is rejected, which leaves the rest uniform."""
    region, rng = Simplex(DOMAINS, 0.1), random.Random(7)
    draws = [region.sample(rng) for _ in range(3000)]
    for domain in DOMAINS:
        above = [(mix[domain] - 0.1) / 0.6 for mix in draws]
        assert stats.kstest(above, stats.beta(1, 3).cdf).pvalue > 0.01
    cut = Simplex(DOMAINS, 0.1, {"replay": (0.25, 0.4)})
    kept = [mix["replay"] for mix in draws if 0.25 <= mix["replay"] <= 0.4]
    drawn = [cut.sample(rng)["replay"] for _ in range(2000)]
    assert stats.ks_2samp(kept, drawn).pvalue > 0.01


def test_draws_from_the_upper_ends_are_uniform_too() -> None:
    """Three shares of at most 0.4 form a triangle that points down; its corners are (0.4, 0.4, 0.2)."""
    region, rng = Simplex(DOMAINS[:3], 0.0, dict.fromkeys(DOMAINS[:3], (0.0, 0.4))), random.Random(3)
    missing = [(0.4 - region.sample(rng)["biology"]) / 0.2 for _ in range(2000)]
    assert stats.kstest(missing, stats.beta(1, 2).cdf).pvalue > 0.01


def test_a_region_of_one_point_and_an_empty_one() -> None:
    assert Simplex(DOMAINS, 0.25).sample(random.Random(0)) == pytest.approx(dict.fromkeys(DOMAINS, 0.25))
    for floor, ranges in [(0.3, {}), (0.0, dict.fromkeys(DOMAINS, (0.0, 0.2)))]:
        with pytest.raises(UserError, match="no mixture is possible"):
            Simplex(DOMAINS, floor, ranges)
    with pytest.raises(UserError, match="unknown domain 'replai'"):
        Simplex(DOMAINS, 0.0, {"replai": (0.1, 0.2)})
    with pytest.raises(UserError, match="between"):
        Simplex(DOMAINS, 0.1, {"replay": (0.0, 0.05)})


@pytest.mark.parametrize("region", REGIONS[1:])
def test_log_ratio_coordinates_there_and_back(region: Simplex) -> None:
    bounds = region.ilr_bounds()
    for i in range(50):
        mix = region.sample(random.Random(i))
        coordinates = region.to_ilr(mix)
        assert len(coordinates) == len(region.domains) - 1
        assert region.from_ilr(coordinates) == pytest.approx(mix, abs=1e-12)
        assert all(lo - 1e-9 <= z <= hi + 1e-9 for z, (lo, hi) in zip(coordinates, bounds, strict=True))


def test_log_ratio_coordinates_keep_aitchison_distances() -> None:
    region = Simplex(DOMAINS, 0.01)
    a, b = region.sample(random.Random(1)), region.sample(random.Random(2))
    pairs = itertools.product(DOMAINS, DOMAINS)
    aitchison = sum((math.log(a[x] / a[y]) - math.log(b[x] / b[y])) ** 2 for x, y in pairs) / (2 * 4)
    assert math.dist(region.to_ilr(a), region.to_ilr(b)) ** 2 == pytest.approx(aitchison)
    assert region.to_ilr(region.uniform()) == pytest.approx([0, 0, 0])


@pytest.mark.parametrize("region", REGIONS)
def test_cube_coordinates_there_and_back(region: Simplex) -> None:
    for i in range(50):
        mix = region.sample(random.Random(i))
        if math.fsum(low for low, _ in region.bounds) < 1:
            assert region.from_cube(region.to_cube(mix)) == pytest.approx(mix, abs=1e-9)


def test_even_draws_from_the_cube_are_even_mixtures() -> None:
    region, rng = Simplex(DOMAINS, 0.1), random.Random(5)
    mixes = [region.from_cube([rng.random() for _ in range(3)]) for _ in range(2000)]
    assert all(region.holds(mix) for mix in mixes)
    for domain in DOMAINS:
        above = [(mix[domain] - 0.1) / 0.6 for mix in mixes]
        assert stats.kstest(above, stats.beta(1, 3).cdf).pvalue > 0.01


@pytest.mark.parametrize(("domains", "parts"), [(3, 4), (4, 2), (4, 5), (2, 3), (1, 3)])
def test_lattice_sizes(domains: int, parts: int) -> None:
    region = Simplex([f"d{i}" for i in range(domains)])
    mixes = list(region.lattice(parts))
    assert len(mixes) == math.comb(parts + domains - 1, domains - 1)
    assert len({tuple(m.values()) for m in mixes}) == len(mixes)
    assert all(region.holds(mix) for mix in mixes)
    assert all(share * parts == pytest.approx(round(share * parts)) for m in mixes for share in m.values())


def test_a_lattice_keeps_bounds() -> None:
    assert len(list(REGIONS[1].lattice(5))) == 56  # the floor moves points and loses none
    cut = list(REGIONS[2].lattice(5))
    assert 0 < len(cut) < 56
    assert all(REGIONS[2].holds(mix) for mix in cut)
    for region in REGIONS:  # all that are in range, in the order in which they are dealt out
        lows, left = region._lows, 1 - math.fsum(region._lows)
        whole = [
            {d: low + left * n / 6 for d, low, n in zip(region.domains, lows, counts, strict=True)}
            for counts in itertools.product(range(6, -1, -1), repeat=len(region.domains))
            if sum(counts) == 6
        ]
        kept = {tuple(mix.values()): mix for mix in whole if region.holds(mix)}
        assert list(region.lattice(6)) == list(kept.values())


def test_a_lattice_with_fixed_shares_is_not_searched_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ways to deal out 60 parts to four would be 39,711."""
    asked: list[Mapping[str, float]] = []

    def holds(_: Simplex, mix: Mapping[str, float]) -> bool:
        asked.append(mix)
        return True

    monkeypatch.setattr(Simplex, "holds", holds)
    assert list(FIXED.lattice(60)) == asked
    assert len(asked) == 61


def test_vertices_are_the_purest_mixtures() -> None:
    vertices = REGIONS[2].vertices()
    assert list(vertices) == DOMAINS
    assert vertices["biology"] == pytest.approx(
        {"biology": 0.91, "history": 0.02, "security": 0.02, "replay": 0.05}
    )
    assert vertices["replay"]["replay"] == pytest.approx(0.6)
    assert all(REGIONS[2].holds(mix) for mix in vertices.values())
    assert REGIONS[2].uniform() == dict.fromkeys(DOMAINS, 0.25)


@pytest.mark.parametrize("region", REGIONS)
def test_the_nearest_mixture_is_nearer_than_any_drawn(region: Simplex) -> None:
    for i in range(20):
        rng = random.Random(i)
        point = {d: rng.uniform(-0.5, 1.5) for d in region.domains}
        near = region.nearest(point)
        assert region.holds(near)
        away = math.dist(list(near.values()), list(point.values()))
        for _ in range(20):
            other = region.sample(rng)
            assert away <= math.dist(list(other.values()), list(point.values())) + 1e-9
        assert region.nearest(near) == pytest.approx(near)
