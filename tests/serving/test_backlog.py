"""When requests in front of an engine are refused."""

from __future__ import annotations

import pytest

from qwen_ray.errors import UserError
from qwen_ray.serving.backlog import Backlog


def test_beyond_the_limit_the_client_is_told_when_to_come_back() -> None:
    seconds = 0.0
    backlog = Backlog(1000, clock=lambda: seconds)
    first = backlog.enter(5000)  # one alone is taken
    with pytest.raises(UserError) as e:
        backlog.enter(1)
    assert (e.value.status, e.value.retry_after) == (429, 1.0)
    seconds = 10.0
    backlog.work(4000)
    assert backlog.speed == pytest.approx(400)
    with pytest.raises(UserError) as e:
        backlog.enter(1)
    assert e.value.retry_after == pytest.approx(4001 / 400)
    first.start()
    backlog.enter(1000)
    first.start()
    first.leave()
    assert backlog.waiting == 1000


def test_speed_counts_working_time_and_forgets() -> None:
    seconds = 0.0
    backlog = Backlog(clock=lambda: seconds)
    place = backlog.enter(10)
    seconds = 1.0
    backlog.work(10_000)
    assert backlog.most == 600_000
    place.leave()
    place.leave()
    assert backlog.waiting == 0
    seconds = 5000.0  # nobody asks
    backlog.enter(10)
    seconds = 5001.0
    backlog.work(10_000)
    assert backlog.speed == pytest.approx(10_000)
    for second in range(200):
        seconds = 5002.0 + second
        backlog.work(100)
    assert backlog.speed == pytest.approx(100, rel=0.2)
    assert backlog.most == 2**17
