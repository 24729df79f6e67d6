"""Memory that is freed goes back to the system, also where a block in use lies behind it."""

from __future__ import annotations

import ctypes

import psutil
import pytest

from qwen_ray.serving.heap import trim
from qwen_ray.serving.replicas import Ingress
from qwen_ray.serving.settings import ServeSettings

BLOCK, COUNT = 60_000, 2000  # below what glibc maps by itself


class Handle:
    """Of the engine; nothing is asked of it."""

    def options(self, **_: object) -> Handle:
        return self


@pytest.fixture
def freed() -> int:
    """The resident set with 120 MB that are free and cannot go by themselves."""
    libc = ctypes.CDLL(None)
    # A developer's Mac: what is tested is a call of glibc's alone, and elsewhere `trim` has nothing to do.
    if not hasattr(libc, "malloc_trim"):
        pytest.skip("the C library has no malloc_trim")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(COUNT)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:
        libc.free(block)
    return psutil.Process().memory_info().rss


def test_what_is_free_goes_back(freed: int) -> None:
    trim()
    assert psutil.Process().memory_info().rss < freed - BLOCK * COUNT / 2


def test_a_replicas_health_check_gives_it_back(freed: int) -> None:
    Ingress(Handle(), ServeSettings.of({"model": "tiny"})).check_health()
    assert psutil.Process().memory_info().rss < freed - BLOCK * COUNT / 2
