"""Mixture: exact shares in any window, in stages and with limits too; curricula; exact resume."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen_ray.config import DataConfig, build_config
from qwen_ray.data.dataset import load_splits
from qwen_ray.data.mixture import Mixture, UsedUp
from qwen_ray.data.records import write_records
from qwen_ray.data.shares import shares_of, temperature_weights
from qwen_ray.errors import UserError
from tests.conftest import sums

ONES = {"a": [1] * 1000, "b": [1] * 10, "c": [1] * 300}


def test_shares_hold_in_every_prefix_whatever_the_sizes() -> None:
    mixture = Mixture(ONES, {"a": 0.5, "b": 0.3, "c": 0.2})
    counts: Counter[str] = Counter()
    for n in range(1, 3001):
        counts[mixture.draw()[0]] += 1
        for domain, share in mixture.shares.items():
            assert abs(counts[domain] - share * n) < 2


def test_shares_by_tokens() -> None:
    sizes = {"long": [90, 110, 100], "short": [9, 11, 10, 10]}
    mixture = Mixture(sizes, {"long": 0.5, "short": 0.5})
    tokens: Counter[str] = Counter()
    for _ in range(2000):
        domain, index = mixture.draw()
        tokens[domain] += sizes[domain][index]
        assert abs(tokens["long"] - tokens["short"]) <= 220
    assert mixture.served == sum(tokens.values())


def test_without_weights_by_size() -> None:
    shares = Mixture(ONES).shares
    assert shares == {d: len(s) / 1310 for d, s in ONES.items()}


def test_each_pass_of_a_domain_is_every_example_once_in_a_new_order() -> None:
    mixture = Mixture({"a": [1] * 50}, seed=3)
    passes = [[mixture.draw()[1] for _ in range(50)] for _ in range(3)]
    assert all(sorted(p) == list(range(50)) for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_pass_ends_when_the_first_domain_is_used_up() -> None:
    mixture = Mixture(ONES, {"a": 0.5, "b": 0.3, "c": 0.2})
    assert mixture.pass_length == pytest.approx(10 / 0.3)


def test_state_goes_through_json_and_continues_exactly() -> None:
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    whole = Mixture(ONES, weights, seed=7)
    stream = [whole.draw() for _ in range(400)]
    first = Mixture(ONES, weights, seed=7)
    for _ in range(123):
        first.draw()
    second = Mixture(ONES, weights, seed=7)
    second.load_state(json.loads(json.dumps(first.state())))
    assert [second.draw() for _ in range(277)] == stream[123:]


def test_seed_changes_the_order_only() -> None:
    one, two = Mixture(ONES, seed=1), Mixture(ONES, seed=2)
    draws = [(one.draw(), two.draw()) for _ in range(200)]
    assert [a[0] for a, _ in draws] == [b[0] for _, b in draws]
    assert [a[1] for a, _ in draws] != [b[1] for _, b in draws]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1, "b": 1, "c": 1, "law": 1}, "domain 'law' has weight 1 but no data"),
        ({"a": 1, "b": 1}, "domain 'c' has data but no weight"),
        ({"a": 0, "b": 0, "c": 0}, "all weights are zero"),
    ],
)
def test_weights_that_do_not_fit_the_data(weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(ONES, weights)


def test_zero_leaves_a_domain_out() -> None:
    mixture = Mixture(ONES, {"a": 1, "b": 0, "c": 1})
    assert {mixture.draw()[0] for _ in range(100)} == {"a", "c"}


STAGES = [
    (0.25, {"a": 1.0, "b": 0.0, "c": 0.0}),
    (0.75, {"a": 1, "b": 1, "c": 2}),
    (1, {"a": 0, "b": 0, "c": 1}),
]


def test_stages_hold_within_each_and_over_the_run() -> None:
    mixture = Mixture(ONES, stages=STAGES)
    mixture.plan(400)
    parts = [Counter(mixture.draw()[0] for _ in range(n)) for n in (100, 200, 100)]
    assert parts[0] == {"a": 100}
    assert all(abs(parts[1][d] - n) < 2 for d, n in {"a": 50, "b": 50, "c": 100}.items())
    assert parts[2]["c"] >= 98
    assert mixture.shares == pytest.approx({"a": 0.375, "b": 0.125, "c": 0.5})
    assert {mixture.draw()[0] for _ in range(100)} == {"c"}  # the last stage goes on


def test_a_pass_of_stages_uses_up_the_first_domain() -> None:
    assert Mixture(ONES, stages=STAGES).pass_length == pytest.approx(10 / 0.125)


def test_stages_resume_exactly() -> None:
    whole = Mixture(ONES, stages=STAGES, seed=3)
    whole.plan(200)
    draws = [whole.draw() for _ in range(220)]
    for cut in (49, 50, 51, 120, 150):
        first, second = Mixture(ONES, stages=STAGES, seed=3), Mixture(ONES, stages=STAGES, seed=3)
        for mixture in (first, second):
            mixture.plan(200)
        for _ in range(cut):
            first.draw()
        second.load_state(json.loads(json.dumps(first.state(), sort_keys=True)))
        assert [second.draw() for _ in range(220 - cut)] == draws[cut:]


def test_a_draw_can_be_taken_back() -> None:
    mixture = Mixture(ONES)
    before = mixture.state()
    draw = mixture.draw()
    mixture.undraw(*draw)
    assert mixture.state() == before
    assert mixture.draw() == draw


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(0.5, {"a": 1, "b": 1, "c": 1})], "the last stage ends at 0.5"),
        ([(0.5, {}), (0.5, {}), (1, {})], "does not ascend"),
        ([(1, {"a": 1, "b": 1, "c": 1, "law": 1})], "'law' has weight 1 but no data"),
        ([(1, {"a": 1, "b": 1})], "'c' has data but no weight"),
        ([(0.5, {}), (1, {"a": 0, "b": 0, "c": 0})], "stages.1.weights: all weights are zero"),
    ],
)
def test_stages_that_make_no_sense(stages: list[tuple[float, dict[str, float]]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Mixture(ONES, stages=stages)


def test_stages_or_weights() -> None:
    with pytest.raises(UserError, match="both given"):
        Mixture(ONES, {"a": 1, "b": 1, "c": 1}, stages=STAGES)


def prefix_counts(draws: list[tuple[str, int]], domain: str, costs: Sequence[int] | None = None) -> list[int]:
    """Cost of the domain among the first 0, 1, 2 ... draws."""
    return [0, *itertools.accumulate((costs[i] if costs else 1) if d == domain else 0 for d, i in draws)]


@pytest.mark.parametrize("seed", range(40))
def test_every_window_of_1000_holds_the_shares(seed: int) -> None:
    """Two to six domains, weights and sizes at random, many passes of the small ones."""
    rng = random.Random(seed)
    domains = "abcdef"[: rng.randint(2, 6)]
    weights = {d: rng.choice([rng.random(), rng.random() ** 6]) + 1e-4 for d in domains}
    mixture = Mixture({d: [1] * rng.randint(5, 900) for d in domains}, weights, seed=seed)
    draws = [mixture.draw() for _ in range(3000)]
    for domain, share in mixture.shares.items():
        counts = prefix_counts(draws, domain)
        worst = max(abs(counts[n + 1000] - counts[n] - 1000 * share) for n in range(2001))
        assert worst < 3  # of 1,000: 0.3%, where 1% is asked for
        off = [count - n * share for n, count in enumerate(counts)]
        assert max(off) < 1
        assert min(off) > -sum(1 / k for k in range(2, len(domains) + 1)) - 1e-9


@pytest.mark.parametrize("seed", range(20))
def test_every_window_holds_the_shares_in_tokens(seed: int) -> None:
    rng = random.Random(seed)
    domains = "abcdef"[: rng.randint(2, 6)]
    sizes = {d: [rng.randint(1, rng.choice([20, 400])) for _ in range(rng.randint(5, 500))] for d in domains}
    mixture = Mixture(sizes, {d: rng.random() + 0.01 for d in domains}, seed=seed)
    draws = [mixture.draw() for _ in range(2000)]
    longest = max(max(s) for s in sizes.values())
    total = [0, *itertools.accumulate(sizes[d][i] for d, i in draws)]
    for domain, share in mixture.shares.items():
        cost = prefix_counts(draws, domain, sizes[domain])
        off = [c - share * t for c, t in zip(cost, total, strict=True)]
        assert max(off) < longest
        assert min(off) > -longest * (len(domains) - 1)
        worst = max(abs(off[n + 1000] - off[n]) for n in range(1001))
        assert worst < longest * len(domains)


# --- limits ----------------------------------------------------------------------------------------


def test_a_domain_leaves_after_its_passes_and_the_others_share_what_it_had() -> None:
    mixture = Mixture(ONES, {"a": 0.3, "b": 0.5, "c": 0.2}, max_epochs={"b": 2.5})
    draws = [mixture.draw() for _ in range(1200)]
    used = [n for n, (d, _) in enumerate(draws) if d == "b"]
    assert len(used) == 25
    assert used[-1] in {48, 49, 50, 51}  # due at draw 50
    assert Counter(Counter(i for d, i in draws if d == "b").values()) == {2: 5, 3: 5}
    counts = prefix_counts(draws, "a")
    assert all(abs(counts[n + 1000] - counts[n] - 600) < 2 for n in range(51, 200))


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("staged", [False, True])
def test_a_limited_mixture_ends_when_all_is_used_up(unit: str, staged: bool) -> None:
    rng = random.Random(unit)
    sizes = {d: [rng.randint(3, 50) if unit == "tokens" else 1 for _ in s] for d, s in ONES.items()}
    weights: dict[str, Any] = {"weights": {"a": 1, "b": 1, "c": 1}}
    if staged:
        weights = {"stages": [(0.5, {"a": 0, "b": 1, "c": 1}), (1, {"a": 1, "b": 1, "c": 1})]}
    mixture = Mixture(sizes, **weights, max_epochs={"a": 1, "b": 3, "c": 0.5})
    drawn: Counter[tuple[str, int]] = Counter()
    while not mixture.used_up:
        drawn[mixture.draw()] += 1
    assert {d: Counter(n for (e, _), n in drawn.items() if e == d) for d in "abc"} == {
        "a": {1: 1000}, "b": {3: 10}, "c": {1: 150},
    }  # fmt: skip
    with pytest.raises(UsedUp):
        mixture.draw()
    assert mixture.pass_length == mixture.served
    assert mixture.passes(mixture.served) == 1


@pytest.mark.parametrize("unit", ["examples", "tokens"])
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize("passes", [1, 2.5])
def test_passes_count_the_domains_without_a_limit(unit: str, staged: bool, passes: float) -> None:
    """b would end a pass at once; limited, it leaves, and c, the next to be used up, ends it."""
    rng = random.Random(unit)
    sizes = {d: [rng.randint(3, 50) if unit == "tokens" else 1 for _ in s] for d, s in ONES.items()}
    weights: dict[str, Any] = {"weights": {"a": 0.4, "b": 0.3, "c": 0.3}}
    if staged:
        weights = {"stages": [(0.5, {"a": 0, "b": 1, "c": 1}), (1, {"a": 1, "b": 1, "c": 1})]}
    mixture = Mixture(sizes, **weights, max_epochs={"b": 4})
    n = mixture.plan_passes(passes)
    drawn = Counter(mixture.draw() for _ in range(n))
    assert mixture.passes(mixture.served) == pytest.approx(passes, rel=0.02)
    assert sum(k for (d, _), k in drawn.items() if d == "b") == 40
    times = [drawn["c", i] for i in range(300)]
    assert (min(times), max(times)) == (math.floor(passes), math.ceil(passes))
    assert sum(times) == pytest.approx(300 * passes, rel=0.01)


def test_a_stage_whose_domains_are_used_up_gives_way_to_the_next() -> None:
    stages = [(0.5, {"a": 0, "b": 1, "c": 0}), (1, {"a": 1, "b": 0, "c": 1})]
    mixture = Mixture(ONES, stages=stages, max_epochs={"b": 1})
    mixture.plan(400)
    domains = [mixture.draw()[0] for _ in range(200)]
    assert domains[:10] == ["b"] * 10
    assert Counter(domains[10:]) == {"a": 95, "c": 95}


def test_a_stage_that_is_cut_short_moves_the_later_ones() -> None:
    stages = [
        (0.5, {"a": 0, "b": 1, "c": 0}),
        (0.75, {"a": 1, "b": 0, "c": 0}),
        (1, {"a": 0, "b": 0, "c": 1}),
    ]
    mixture = Mixture(ONES, stages=stages, max_epochs={"b": 1})
    mixture.plan(400)
    domains = [mixture.draw()[0] for _ in range(150)]
    assert [(d, len(list(g))) for d, g in itertools.groupby(domains)] == [("b", 10), ("a", 100), ("c", 40)]


@pytest.mark.parametrize("seed", range(20))
def test_limits_are_kept_to_the_example(seed: int) -> None:
    """Whatever the weights, and where rounding puts the end of a phase."""
    rng = random.Random(seed)
    sizes = {d: [rng.randint(1, 9) for _ in range(rng.randint(3, 60))] for d in "abcd"}
    limits = {d: rng.choice([1, 2, 0.7, 1.4]) for d in "abcd"}
    mixture = Mixture(sizes, {d: rng.random() + 0.01 for d in "abcd"}, max_epochs=limits, seed=seed)
    drawn: Counter[str] = Counter()
    while not mixture.used_up:
        drawn[mixture.draw()[0]] += 1
    assert drawn == {d: max(1, math.floor(limits[d] * len(s) + 1e-9)) for d, s in sizes.items()}


def test_a_last_stage_of_limited_domains_ends_the_mixture() -> None:
    mixture = Mixture(ONES, stages=STAGES, max_epochs={"c": 0.5})
    mixture.plan(400)
    drawn: Counter[str] = Counter()
    while not mixture.used_up:
        drawn[mixture.draw()[0]] += 1
    assert drawn["c"] == 150


def test_limits_resume_exactly() -> None:
    limits = {"b": 2.5, "c": 0.5}
    for stages in ((), [(0.3, {"a": 1, "b": 1, "c": 0}), (1, {"a": 1, "b": 1, "c": 1})]):
        whole = Mixture(ONES, stages=stages, max_epochs=limits, seed=3)
        whole.plan(500)
        draws = [whole.draw() for _ in range(500)]
        for cut in (0, 24, 25, 26, 150, 300, 499):
            first = Mixture(ONES, stages=stages, max_epochs=limits, seed=3)
            second = Mixture(ONES, stages=stages, max_epochs=limits, seed=3)
            for mixture in (first, second):
                mixture.plan(500)
            for _ in range(cut):
                first.draw()
            second.load_state(json.loads(json.dumps(first.state(), sort_keys=True)))
            assert [second.draw() for _ in range(500 - cut)] == draws[cut:]


def test_a_limit_for_a_domain_without_data_is_refused() -> None:
    with pytest.raises(UserError, match="'law' has a limit of 2 epochs but no data"):
        Mixture(ONES, max_epochs={"law": 2})


# --- temperature -----------------------------------------------------------------------------------


def test_temperature_evens_sizes_out() -> None:
    costs = {"a": 1000, "b": 10}
    by_size = shares_of(costs, temperature_weights(costs, 1))
    assert by_size == pytest.approx({"a": 1000 / 1010, "b": 10 / 1010})
    # Square roots: 10 to 1.
    assert shares_of(costs, temperature_weights(costs, 2)) == pytest.approx({"a": 10 / 11, "b": 1 / 11})
    assert shares_of(costs, temperature_weights(costs, 1e9)) == pytest.approx({"a": 0.5, "b": 0.5})


@pytest.mark.parametrize("key", ["weights={a: 1}", "stages=[{until: 1, weights: {a: 1}}]"])
def test_temperature_is_instead_of_weights_and_stages(key: str) -> None:
    with pytest.raises(UserError, match=r"temperature and (weights|stages) both decide the shares"):
        build_config(sets=["data.temperature=2", f"data.{key}"])


# --- curriculum ------------------------------------------------------------------------------------

DIFFICULTY = {d: [float((7 * i) % len(s)) for i in range(len(s))] for d, s in ONES.items()}


@pytest.mark.parametrize("curriculum", ["easy_to_hard", "hard_to_easy"])
def test_a_pass_goes_by_difficulty(curriculum: Any) -> None:
    mixture = Mixture({"a": ONES["a"]}, curriculum=curriculum, difficulty=DIFFICULTY)
    mixture.plan_passes(2)
    for _ in range(2):
        drawn = [mixture.draw()[1] for _ in range(1000)]
        assert sorted(drawn) == list(range(1000))
        ranks = [DIFFICULTY["a"][i] for i in drawn]
        ranks = ranks if curriculum == "easy_to_hard" else [999 - r for r in ranks]
        assert max(abs(rank - place) for place, rank in enumerate(ranks)) <= 50  # NEIGHBOURHOOD
        assert sum(a > b for a, b in itertools.pairwise(ranks)) > 100  # not just sorted


def test_a_curriculum_changes_neither_shares_nor_what_is_drawn() -> None:
    """A run over a tenth of a domain takes the tenth that chance gives it, not the easiest."""
    weights = {"a": 0.5, "b": 0.3, "c": 0.2}
    plain = Mixture(ONES, weights)
    mixture = Mixture(ONES, weights, curriculum="easy_to_hard", difficulty=DIFFICULTY)
    for each in (plain, mixture):
        each.plan(200)
    draws, ordered = ([m.draw() for _ in range(200)] for m in (plain, mixture))
    assert [d for d, _ in draws] == [d for d, _ in ordered]
    assert Counter(draws) == Counter(ordered)
    hard = [DIFFICULTY["a"][i] for d, i in ordered if d == "a"]
    assert max(hard) > 900
    assert hard != [DIFFICULTY["a"][i] for d, i in draws if d == "a"]
    assert sum(hard[:50]) / 50 < 350
    assert sum(hard[50:]) / 50 > 650


def test_a_curriculum_resumes_exactly() -> None:
    def make() -> Mixture:
        mixture = Mixture(ONES, curriculum="hard_to_easy", difficulty=DIFFICULTY, seed=2)
        mixture.plan_passes(1.5)
        return mixture

    whole = make()
    draws = [whole.draw() for _ in range(1900)]
    for cut in (1, 700, 1310, 1500):
        first, second = make(), make()
        for _ in range(cut):
            first.draw()
        second.load_state(json.loads(json.dumps(first.state())))
        assert [second.draw() for _ in range(1900 - cut)] == draws[cut:]


def test_records_without_difficulty_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with_it = [dataclasses.replace(r, difficulty=1.0) for r in sums(30)]
    write_records(path, [*with_it, *sums(4, domain="more")])
    for streaming in (False, True):
        config = DataConfig(
            train=[str(path)], curriculum="easy_to_hard", validation_fraction=0, streaming=streaming
        )
        with pytest.raises(UserError, match="4 training records have no difficulty") as e:
            load_splits(config, seed=0)
        assert "--difficulty" in e.value.fix
