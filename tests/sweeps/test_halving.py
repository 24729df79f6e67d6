"""Successive halving: who goes on, and what a sweep costs."""

from __future__ import annotations

import pytest

from qwen_ray.sweeps.halving import Halving, passes, trial_steps


def test_the_best_third_of_a_batch_goes_on() -> None:
    halving = Halving([0.1, 0.3], eta=3, protected=())
    scores = {trial: float(trial % 5) + trial / 100 for trial in range(9)}
    goes_on = halving.arrive(0, scores)
    assert goes_on.keys() == scores.keys()
    assert {t for t, on in goes_on.items() if on} == {4, 8, 3}  # 4.04, 3.08, 3.03


def test_later_trials_compete_with_all_that_ever_arrived() -> None:
    halving = Halving([0.1], eta=3, protected=())
    assert halving.arrive(0, {0: 5.0, 1: 4.0, 2: 3.0}) == {0: True, 1: False, 2: False}
    # Of six, the best two: 0 and 1, so that the best of the second batch is not good enough.
    assert halving.arrive(0, {3: 3.5, 4: 3.4, 5: 3.3}) == {3: False, 4: False, 5: False}
    assert halving.arrive(0, {6: 9.0, 7: 4.5, 8: 0.0}) == {6: True, 7: True, 8: False}


def test_at_least_one_goes_on_and_the_lower_index_of_equals() -> None:
    halving = Halving([0.1], eta=3, protected=())
    assert halving.arrive(0, {5: 1.0, 2: 1.0}) == {2: True, 5: False}


def test_protected_trials_go_on_and_count_for_nobody() -> None:
    plain, protected = Halving([0.1], eta=3, protected=()), Halving([0.1], eta=3)
    others = {1: 0.5, 2: 0.4, 3: 0.3}
    assert protected.arrive(0, {0: -1e9, **others}) == {0: True, **plain.arrive(0, others)}
    best = Halving([0.1], eta=3).arrive(0, {0: 99.0, **others})
    assert best == {0: True, 1: True, 2: False, 3: False}


def test_rungs_are_apart_and_nobody_arrives_twice() -> None:
    halving = Halving([0.1, 0.3], eta=2, protected=())
    halving.arrive(0, {0: 1.0, 1: 2.0})
    assert halving.arrive(1, {1: 0.0}) == {1: True}
    with pytest.raises(ValueError, match="before"):
        halving.arrive(0, {1: 3.0, 2: 0.0})


def test_repeating_the_arrivals_repeats_the_decisions() -> None:
    batches = [(0, {0: 1.0, 1: 3.0, 2: 2.0}), (1, {1: 1.0}), (0, {3: 2.5, 4: 0.1}), (1, {0: 2.0, 3: 3.0})]
    first, second = (Halving([0.1, 0.3], eta=2) for _ in range(2))
    assert [first.arrive(*b) for b in batches] == [second.arrive(*b) for b in batches]


def test_cost_of_the_published_example() -> None:
    """12 trials, eta 3, rungs at 1 and 3 of 9: 12 + 4 x 2 + 1 x 6 = 26 of 108 steps."""
    assert trial_steps(12, (1 / 9, 1 / 3), 3, slots=12, protected=()) * 9 == pytest.approx(26)
    # A protected trial runs its whole length, and the others share what 11 of them are allowed.
    assert trial_steps(12, (1 / 9, 1 / 3), 3, slots=12) * 9 == pytest.approx(9 + 11 + 3 * 2 + 6)


def test_without_rungs_every_trial_runs_to_its_end_in_full_packs() -> None:
    assert passes(5, (), 3, slots=2) == [(1.0, 2), (1.0, 2), (1.0, 1)]
    assert trial_steps(5, (), 3, slots=2) == 5


@pytest.mark.parametrize("slots", [1, 3, 4, 8])
def test_packs_hold_no_more_than_their_slots_and_every_trial_starts(slots: int) -> None:
    for draw in range(5):
        made = passes(10, (0.2, 0.5), 2, slots, draw=draw)
        assert max(active for _, active in made) == min(10, slots)
        assert sum(length * active for length, active in made) >= 10 * 0.2 + 0.8  # one came to its end
        assert sum(length * active for length, active in made) < 10
