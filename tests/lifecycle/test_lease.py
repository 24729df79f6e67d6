"""Leases: one holder at a time, whoever dies, and a holder that was too slow learns of it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen_ray.errors import UserError
from qwen_ray.lifecycle.lease import Lease, LeaseLost
from qwen_ray.storage import LocalStorage, Stored, open_storage, read_document, unavailable

WAIT = 30.0


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


RACER = """
import sys, time
from pathlib import Path
from qwen_ray.lifecycle.lease import Lease
from qwen_ray.storage import open_storage

folder, name, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
tokens, done = [], 0
while done < rounds:
    lease = Lease(open_storage(folder), "lease.json", name, 60)
    if not lease.acquire():
        time.sleep(0.002)
        continue
    lease.check()
    count = int((folder / "count").read_text())
    time.sleep(0.001)
    (folder / "count").write_text(str(count + 1))
    tokens.append(lease.token)
    lease.release()
    done += 1
print(*tokens)
"""


def test_processes_that_race_hold_it_one_at_a_time(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), f"racer {i}", "20"], stdout=subprocess.PIPE
        )
        for i in range(4)
    ]
    tokens = [int(word) for racer in racers for word in racer.communicate(timeout=WAIT * 4)[0].split()]
    assert [racer.returncode for racer in racers] == [0, 0, 0, 0]
    assert int((tmp_path / "count").read_text()) == 80
    assert sorted(tokens) == list(range(1, 81))


@pytest.mark.parametrize("kind", ["folder", "memory"])
def test_others_are_kept_out_until_it_is_released_or_its_time_is_over(tmp_path: Path, kind: str) -> None:
    storage = open_storage(tmp_path if kind == "folder" else f"memory://{tmp_path.name}")
    clock = Clock()
    first, second = (Lease(storage, "a/lease.json", name, 60, clock=clock) for name in ("first", "second"))
    assert first.acquire()
    assert not second.acquire()
    holder = second.holder()
    assert holder is not None
    assert (holder.owner, holder.token, holder.until) == ("first", 1, clock.now + 60)
    first.release()
    assert second.holder() is None
    assert second.acquire()
    clock.now += 59
    assert not first.acquire()
    clock.now += 1
    assert first.acquire()
    assert (second.token, first.token) == (2, 3)


def test_who_was_too_slow_is_told_and_changes_nothing(tmp_path: Path) -> None:
    storage, clock = open_storage(tmp_path), Clock()
    slow, fast = (Lease(storage, "lease.json", name, 60, clock=clock) for name in ("slow", "fast"))
    assert slow.acquire()
    clock.now += 40
    slow.renew()
    clock.now += 40
    slow.check()
    clock.now += 15  # the lease is good for others until a minute is over, its holder stops before
    with pytest.raises(LeaseLost):
        slow.check()
    assert slow.lost.is_set()
    assert not fast.acquire()
    clock.now += 5
    assert fast.acquire()
    with pytest.raises(LeaseLost, match="slow was too slow"):
        slow.renew()
    slow.release()
    fast.check()
    assert fast.holder() is not None


def test_a_killed_holder_keeps_others_out_for_its_time_only(tmp_path: Path) -> None:
    script = (
        "import sys, time\nfrom qwen_ray.lifecycle.lease import Lease\n"
        "from qwen_ray.storage import open_storage\n"
        "with Lease(open_storage(sys.argv[1]), 'lease.json', 'victim', 600):\n"
        "    print('held', flush=True)\n    time.sleep(600)\n"
    )
    victim = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
    assert victim.stdout is not None
    assert victim.stdout.readline() == b"held\n"
    victim.send_signal(signal.SIGKILL)
    victim.wait(WAIT)
    victim.stdout.close()
    storage = open_storage(tmp_path)
    with pytest.raises(UserError, match="by victim, since") as e, Lease(storage, "lease.json", "next", 600):
        pass
    assert e.value.status == 409
    assert Lease(storage, "lease.json", "next", 600, clock=lambda: time.time() + 600).acquire()


def test_it_is_renewed_while_the_block_lasts(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with Lease(storage, "lease.json", "me", 0.4) as lease:
        first = read_document(storage, "lease.json")["until"]
        until(lambda: read_document(storage, "lease.json")["until"] > first + 0.4)
        assert lease.token == 1
    assert lease.holder() is None
    assert not lease.held


class Moody(LocalStorage):
    """Takes a write and says that it did not, or does not answer."""

    lies = away = False

    def read(self, key: str) -> Stored:
        if self.away:
            raise unavailable(self.location, "away")
        return super().read(key)

    def create(self, key: str, data: bytes) -> bool:
        return super().create(key, data) and not self._lie()

    def replace(self, key: str, data: bytes, tag: str) -> bool:
        return super().replace(key, data, tag) and not self._lie()

    def _lie(self) -> bool:
        lied, self.lies = self.lies, False
        return lied


def test_a_write_whose_answer_was_lost_counts_once(tmp_path: Path) -> None:
    storage = Moody(tmp_path)
    lease = Lease(storage, "lease.json", "me", 60)
    storage.lies = True
    assert lease.acquire()
    storage.lies = True
    lease.renew()
    assert lease.token == 1
    lease.release()
    storage.lies = True
    assert lease.acquire()
    assert lease.token == 2


def test_storage_that_is_away_too_long_loses_it(tmp_path: Path) -> None:
    storage = Moody(tmp_path)
    with Lease(storage, "lease.json", "me", 0.4) as lease:
        storage.away = True
        assert lease.lost.wait(WAIT)
        with pytest.raises(LeaseLost):
            lease.check()
        storage.away = False
