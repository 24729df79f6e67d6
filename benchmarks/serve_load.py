"""The server under more load than it can take: what it answers, how late, and what it does with its memory.

Not a comparison. One replica of the embedded model serves the base and four adapters, of which three fit in
memory. Clients that wait for their answers fill its cache of prompts' beginnings, and measure its capacity;
then requests arrive at 1.5 times that rate, at random moments (Poisson) and whether or not earlier ones were
answered. It should refuse what is too much at once (429 with Retry-After), time out never, and end as large
as it was. ``met`` in the report:

``no_crash``: the processes are those of the start, and answer afterwards. ``refused_not_late``: every answer
is 200 or 429, these with Retry-After. ``memory_flat``: in each process of the server the median of the
resident set over the last quarter of the load is at most 5 % above that over the second quarter. The first
quarter does not count: 256 requests at one time take more memory than the 32 that filled the cache.

    python benchmarks/serve_load.py --out FILE [--minutes 5] [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from _common import commit, machine, versions

from qwen_ray import cluster, models
from qwen_ray.fsio import write_json
from qwen_ray.peft_folder import WEIGHTS
from qwen_ray.registry import Registry
from qwen_ray.serving import launch

OVERLOAD = 1.5
CLIENTS = 32  # that measure the capacity
ADAPTERS, RESIDENT = 4, 3
CONTEXT, CONTINUATION, CHOICES = 60, 6, 4
NEW_TOKENS = 16
CLIENT_SECONDS = 60.0  # after which a client gives up; the server's own limit is 30
SAMPLE_SECONDS = 1.0
FULL = 0.9  # of its limit; the cache loses a part whenever an adapter is dropped
FILL_SECONDS = 5.0  # between looks at it
MOST_FILL_SECONDS = 300.0
FLAT = 0.05  # growth from the second quarter to the last
# Of the server, by how Ray names them.
PROCESSES = {
    "ray::ServeReplica:qwen-ray:engine": "engine",
    "ray::ServeReplica:qwen-ray:ingress": "ingress",
    "ray::ProxyActor": "proxy",
    "ray::ServeController": "controller",
}


@dataclass
class Tally:
    """What became of requests; ``seconds``: of the answered ones."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    refused_seconds: list[float] = field(default_factory=list)
    without_retry_after: int = 0

    def describe(self) -> dict[str, Any]:
        return {
            "by_status": dict(sorted(self.statuses.items())),
            "answered_seconds": quantiles(self.seconds),
            "refused_seconds": quantiles(self.refused_seconds),
            "429_without_retry_after": self.without_retry_after,
        }


def quantiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    ordered = sorted(seconds)

    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 3)

    return {"p50": at(0.5), "p95": at(0.95), "p99": at(0.99), "longest": round(ordered[-1], 3)}


def plant(folder: Path) -> Registry:
    """A registry with random adapters of the embedded model."""
    import torch
    from peft import LoraConfig, get_peft_model

    ref = models.resolve("tiny")
    registry = Registry(folder / "registry")
    lineage = {"base": {"id": ref.id, "fingerprint": models.fingerprint(ref)}}
    for i in range(ADAPTERS):
        torch.manual_seed(i)
        config = LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear", init_lora_weights=False)
        get_peft_model(models.load_model(ref, dtype=torch.float32), config).save_pretrained(
            folder / str(i), save_embedding_layers=False
        )
        registry.publish(f"a{i}", folder / str(i), lineage)
        registry.point(f"a{i}", "production", 1, reason="benchmark")
    return registry


def request(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """One question of four choices, or, one time in five, a short text."""
    model = rng.choice(["tiny", *(f"tiny:a{i}" for i in range(ADAPTERS))])
    context = rng.choices(range(10, 2000), k=CONTEXT)
    if rng.random() < 0.2:
        return "/v1/completions", {"model": model, "prompt": context, "max_tokens": NEW_TOKENS}
    continuations = [rng.choices(range(10, 2000), k=CONTINUATION) for _ in range(CHOICES)]
    return "/v1/score", {"model": model, "items": [{"context": context, "continuations": continuations}]}


async def send(http: aiohttp.ClientSession, rng: random.Random, tally: Tally) -> None:
    path, body = request(rng)
    began = time.perf_counter()
    try:
        async with http.post(path, json=body) as reply:
            await reply.read()
    except (aiohttp.ClientError, TimeoutError) as e:
        tally.statuses[type(e).__name__] += 1
        return
    took = time.perf_counter() - began
    tally.statuses[str(reply.status)] += 1
    if reply.ok:
        tally.seconds.append(took)
    elif reply.status == 429:
        tally.refused_seconds.append(took)
        tally.without_retry_after += "retry-after" not in reply.headers


async def closed_loop(http: aiohttp.ClientSession, seconds: float) -> float:
    """Answers a second when each client waits for its answer."""
    tally, end = Tally(), time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < end:
            await send(http, rng, tally)

    await asyncio.gather(*map(client, range(CLIENTS)))
    return len(tally.seconds) / seconds


async def open_loop(http: aiohttp.ClientSession, rate: float, seconds: float) -> tuple[Tally, float]:
    """Requests at random moments, ``rate`` a second; also returns the rate that was kept."""
    tally, rng, running = Tally(), random.Random(0), set[asyncio.Task[None]]()
    began = at = time.perf_counter()
    sent = 0
    while at < began + seconds:
        at += rng.expovariate(rate)
        await asyncio.sleep(max(0.0, at - time.perf_counter()))
        task = asyncio.create_task(send(http, rng, tally))
        running.add(task)
        task.add_done_callback(running.discard)
        sent += 1
    took = time.perf_counter() - began
    await asyncio.gather(*running)
    return tally, sent / took


async def cache(http: aiohttp.ClientSession) -> dict[str, float]:
    """MiB of the cache of prompts' beginnings: its limit, and what is in it."""
    async with http.get("/health") as reply:
        load = (await reply.json())["load"]
    return {"limit": load["max_prefix_bytes"] / 2**20, "filled": round(load["prefix_bytes"] / 2**20, 1)}


async def fill(http: aiohttp.ClientSession) -> dict[str, float]:
    """Send requests until the cache is full, and return what is in it; adapters are loaded then too."""
    end = time.perf_counter() + MOST_FILL_SECONDS
    while True:
        await closed_loop(http, FILL_SECONDS)
        found = await cache(http)
        if found["filled"] >= FULL * found["limit"] or time.perf_counter() > end:
            return found


def server_processes() -> dict[int, str]:
    """Those of the server by process id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            title = "".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        for start, name in PROCESSES.items():
            if title.startswith(start):
                found[process.pid] = name
    return found


async def watch(pids: dict[int, str], samples: dict[str, list[float]]) -> None:
    """MiB in memory of each process, every second."""
    while True:
        for pid, name in pids.items():
            if psutil.pid_exists(pid):
                samples[name].append(psutil.Process(pid).memory_info().rss / 2**20)
        await asyncio.sleep(SAMPLE_SECONDS)


def memory(samples: list[float]) -> dict[str, Any]:
    """Medians of the quarters of a process's samples, and whether it is flat."""
    quarter = max(1, len(samples) // 4)
    parts = [samples[i * quarter : (i + 1) * quarter] or samples[-1:] for i in range(4)]
    medians = [round(statistics.median(part), 1) for part in parts]
    growth = medians[3] / medians[1] - 1
    return {"quarters_mib": medians, "growth": round(growth, 4), "flat": growth <= FLAT}


async def measure(url: str, *, capacity_seconds: float, load_seconds: float) -> dict[str, Any]:
    connections = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=CLIENT_SECONDS)
    # Not httpx: with a thousand connections its pool takes more time than the server.
    async with aiohttp.ClientSession(url, connector=connections, timeout=timeout) as http:
        full = await fill(http)
        capacity = await closed_loop(http, capacity_seconds)
        pids = server_processes()
        samples: dict[str, list[float]] = {name: [] for name in pids.values()}
        watching = asyncio.create_task(watch(pids, samples))
        tally, rate = await open_loop(http, OVERLOAD * capacity, load_seconds)
        watching.cancel()
        afterwards = Tally()
        await send(http, random.Random(0), afterwards)
        after = await cache(http)
    grown = {name: memory(found) for name, found in samples.items()}
    same = server_processes() == pids
    return {
        "capacity_per_second": round(capacity, 1),
        "offered_per_second": round(rate, 1),
        "answered_per_second": round(len(tally.seconds) / load_seconds, 1),
        **tally.describe(),
        "cache_mib": {**full, "end": after["filled"]},
        "memory": grown,
        "same_processes": same,
        "afterwards": afterwards.describe()["by_status"],
        "met": {
            "no_crash": same and set(afterwards.statuses) == {"200"},
            "refused_not_late": set(tally.statuses) <= {"200", "429"} and not tally.without_retry_after,
            "memory_flat": all(one["flat"] for one in grown.values()),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few seconds; its figures mean little")
    parser.add_argument("--minutes", type=float, default=5.0, help="of load (%(default)g)")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON report goes")
    args = parser.parse_args()
    load_seconds = 6.0 if args.quick else args.minutes * 60
    about = {"machine": machine(), "versions": versions("torch", "ray", "fastapi"), "commit": commit()}
    with tempfile.TemporaryDirectory() as folder:
        registry = plant(Path(folder))
        size = (registry.get("a0", 1).path / WEIGHTS).stat().st_size
        settings: dict[str, Any] = {
            "adapter_bytes": int((RESIDENT + 0.5) * size),
            "limits": {"timeout_seconds": 30, **({"in_flight": 24} if args.quick else {})},
            **({"prefix_bytes": 4 * 2**20} if args.quick else {}),
        }
        cluster.connect("local", num_cpus=2)
        try:
            url = launch.start("tiny", port=0, registry=registry.root, **settings)
            found = asyncio.run(
                measure(url, capacity_seconds=2.0 if args.quick else 15.0, load_seconds=load_seconds)
            )
        finally:
            launch.stop()
            cluster.disconnect()
    report = {"name": "serve_load", "quick": args.quick, "load_seconds": load_seconds, "settings": settings}
    write_json(args.out, {**report, **about, **found})
    grown = {name: one["quarters_mib"] for name, one in found["memory"].items()}
    print(
        f"serve_load: {found['by_status']} at {found['offered_per_second']}/s of"
        f" {found['capacity_per_second']}/s; answered in {found['answered_seconds']} s;"
        f" MiB by quarters {grown}; met {found['met']} -> {args.out}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
