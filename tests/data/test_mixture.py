"""Mixture: exact shares, in stages too, and exact resume."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from qwen_ray.data.mixture import Mixture
from qwen_ray.errors import UserError

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
