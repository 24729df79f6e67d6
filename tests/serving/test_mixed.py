"""Many clients, many adapters and versions, loaded, dropped and replaced meanwhile, on the real server: every
answer comes from the adapter and version that it names, and that were asked for."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoModelForCausalLM

from qwen_ray import cluster, models
from qwen_ray.registry import Registry
from qwen_ray.serving import launch
from qwen_ray.serving.affinity import BUSY
from qwen_ray.serving.handles import HandleClient
from qwen_ray.serving.protocol import ScoreItemBody, ScoreRequest
from tests.serving.conftest import make_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

REQUESTS = int(os.environ.get("QWEN_RAY_MIXED_REQUESTS", "1000"))
CLIENTS = 64
NAMES = ("red", "green", "blue")
WEIGHTS = 6  # unlike adapters; a name's version n has weights (place of the name + 2 n) modulo so many
ITEMS = [
    ([5, 9, 17, 33], [[40, 41], [7]]),
    ([101, 3, 3, 250, 12], [[8, 99, 100]]),
    ([60], [[61], [62, 63], [64]]),
    ([300, 301, 302, 303, 304, 305], [[306], [12, 307]]),
]
PROMPTS = [[5, 9, 17], [101, 3, 3, 250], [60, 61]]
NEW_TOKENS = 4
BURSTS = 40  # at most, until enough requests went to the other replica

Answer = tuple[list[list[float]], list[list[int]]]
"""For each of ITEMS the log-probabilities of its continuations; for each of PROMPTS its greedy tokens."""


def weights_of(ref: str) -> int:
    name, _, version = ref.partition("@")
    return (NAMES.index(name) + 2 * int(version)) % WEIGHTS


@torch.inference_mode()
def answer_of(model: Any) -> Answer:
    """By transformers and PEFT alone."""
    scores = []
    for context, continuations in ITEMS:
        row = []
        for continuation in continuations:
            logits = model(torch.tensor([context + continuation])).logits[0, len(context) - 1 : -1]
            logprobs = logits.log_softmax(-1)
            row.append(sum(float(logprobs[i, token]) for i, token in enumerate(continuation)))
        scores.append(row)
    texts = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW_TOKENS):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        texts.append(ids[len(prompt) :])
    return scores, texts


@pytest.fixture(scope="module")
def planted(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("planted")
    lora = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}
    return [make_adapter(model_dir, root / str(i), seed=100 + i, **lora) for i in range(WEIGHTS)]


@pytest.fixture(scope="module")
def answers(model_dir: Path, planted: list[Path]) -> dict[int | None, Answer]:
    """By weights; None: the base."""
    from peft import PeftModel

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    found: dict[int | None, Answer] = {None: answer_of(base())}
    for i, folder in enumerate(planted):
        found[i] = answer_of(PeftModel.from_pretrained(base(), folder).eval())
    for one, other in itertools.combinations(found.values(), 2):
        for a, b in zip(one[0], other[0], strict=True):
            assert max(map(abs, map(float.__sub__, a, b))) > 0.01, "each item must tell the adapters apart"
    return found


@pytest.fixture(scope="module")
def world(model_dir: Path, planted: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    base = {"id": "rand", "fingerprint": models.fingerprint(models.resolve(str(model_dir)))}
    world = World(Registry(tmp_path_factory.mktemp("registry")), planted, {"base": base})
    for name in NAMES:
        for _ in range(2):
            world.replace(name)
    one = (planted[0] / "adapter_model.safetensors").stat().st_size
    cluster.connect("local", num_cpus=2)
    world.url = launch.start(
        str(model_dir), registry=world.registry.root, adapter_bytes=int(2.5 * one), replicas=2, port=0
    )
    yield world
    launch.stop()
    cluster.disconnect()


@dataclass
class World:
    registry: Registry
    planted: list[Path]
    lineage: dict[str, Any]
    url: str = ""

    def replace(self, name: str) -> None:
        """Publish the next version and put it in production."""
        number = len(self.registry.versions(name)) + 1
        lineage = {**self.lineage, "number": number}  # else it would be a version that is there already
        version = self.registry.publish(name, self.planted[weights_of(f"{name}@{number}")], lineage)
        assert version.version == number
        self.registry.point(name, "production", number, reason="test")


@dataclass
class Tally:
    answers: dict[int | None, Answer]
    statuses: Counter[int] = field(default_factory=Counter)
    served: Counter[str | None] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def check(self, asked: str, said: str | None, got: Any, place: int, kind: str) -> None:
        """That what says to come from ``said`` does, and that this is what was asked for."""
        self.served[said] += 1
        adapter = asked.partition(":")[2] or None
        meant = (
            said is None if adapter is None else said is not None and (said + "@").startswith(adapter + "@")
        )
        truth = self.answers[None if said is None else weights_of(said)]
        right = got == truth[1][place] if kind == "text" else got == pytest.approx(truth[0][place], abs=1e-3)
        if not (meant and right):
            self.wrong.append(f"{asked} -> {said}: {got}")


async def ask(client: httpx.AsyncClient, rng: random.Random, ids: list[str], tally: Tally) -> None:
    """One request of a random kind, checked."""
    kind = rng.choices(["score", "many", "text", "stream"], [6, 1, 2, 1])[0]
    model = rng.choice(ids)
    if kind in ("score", "many"):
        places = rng.sample(range(len(ITEMS)), 2)
        items = [{"context": ITEMS[p][0], "continuations": ITEMS[p][1]} for p in places]
        wanted = rng.sample(sorted(set(ids)), 3) if kind == "many" else [model]
        body = {"models": wanted} if kind == "many" else {"model": model}
        reply = await client.post("/v1/score", json=body | {"items": items})
        tally.statuses[reply.status_code] += 1
        if reply.is_success:
            by_model = reply.json()["models"] if kind == "many" else {model: reply.json()}
            for asked, result in by_model.items():
                for place, item, about in zip(
                    places, result["items"], result["qwen_ray"]["prompts"], strict=True
                ):
                    tally.check(asked, about["adapter"], item["logprobs"], place, "score")
        return
    place = rng.randrange(len(PROMPTS))
    request = {"model": model, "prompt": PROMPTS[place], "max_tokens": NEW_TOKENS, "temperature": 0}
    reply = await client.post("/v1/completions", json=request | {"logprobs": 0, "stream": kind == "stream"})
    tally.statuses[reply.status_code] += 1
    if not reply.is_success:
        return
    if kind == "stream":
        lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
    else:
        chunks = [reply.json()]
    tokens = [t for chunk in chunks for t in (chunk["choices"][0]["logprobs"] or {}).get("tokens", [])]
    tally.check(model, chunks[0]["qwen_ray"]["prompts"][0]["adapter"], tokens, place, "text")


def test_every_answer_is_its_adapters_own(
    world: World, answers: dict[int | None, Answer], model_dir: Path
) -> None:
    tokenizer = models.load_tokenizer(models.resolve(str(model_dir)))
    shown = {
        key: (scores, [[tokenizer.decode([t]) for t in ids] for ids in texts])
        for key, (scores, texts) in answers.items()
    }
    ids = ["rand", *(f"rand:{name}{at}" for name in NAMES for at in ("", "", "@1", "@2"))]
    tally = Tally(shown)
    rng = random.Random(6)
    left = iter(range(REQUESTS))
    done = threading.Event()

    def replace() -> None:
        for name in itertools.cycle(NAMES):
            if done.wait(1.5):
                return
            world.replace(name)

    async def client(http: httpx.AsyncClient) -> None:
        for _ in left:
            await ask(http, rng, ids, tally)

    async def clients() -> None:
        limits = httpx.Limits(max_connections=CLIENTS)
        async with httpx.AsyncClient(base_url=world.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(client(http) for _ in range(CLIENTS)))

    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(replace)
        try:
            asyncio.run(clients())
        finally:
            done.set()
    publishing.result()
    print(f"{REQUESTS} requests: {dict(tally.statuses)}, answers by {dict(tally.served)}")
    assert tally.wrong == []
    assert tally.statuses == {200: REQUESTS}  # swaps fail nobody
    for name in NAMES:
        seen = {said for said in tally.served if said is not None and said.startswith(name)}
        assert {f"{name}@1", f"{name}@2"} < seen, "no new version was served"
        last = max(world.registry.versions(name))
        reply = httpx.post(f"{world.url}/v1/completions", json={"model": f"rand:{name}", "prompt": [1]})
        assert reply.json()["qwen_ray"]["prompts"][0]["adapter"] == f"{name}@{last}"


def test_requests_go_where_the_adapter_is_and_spread_when_it_has_too_much_to_do(world: World) -> None:
    from ray import serve

    client = HandleClient(serve.get_deployment_handle("engine", launch.APP))

    async def replica_of(model: str) -> str:
        body = ScoreRequest(model=model, items=[ScoreItemBody(context=[1, 2, 3], continuations=[[4, 5]])])
        envelope = await client.call("score", body)
        assert "ok" in envelope, envelope
        return str(envelope["replica"]["id"])

    async def by_adapter() -> dict[str, Counter[str]]:
        counts = {f"rand:{name}@{v}": Counter[str]() for name in NAMES for v in (1, 2)}
        for _ in range(10):
            for (_, count), replica in zip(
                counts.items(), await asyncio.gather(*map(replica_of, counts)), strict=True
            ):
                count[replica] += 1
        return counts

    async def spread() -> int:
        """How many requests of bursts went to the other replica: of as many bursts as it takes, since a
        fast replica is seldom busy. Without spreading each burst goes to one replica."""
        others = 0
        for _ in range(BURSTS):
            burst = Counter(await asyncio.gather(*(replica_of("rand:red@1") for _ in range(8 * BUSY))))
            others += burst.total() - max(burst.values())
            if others >= BUSY // 2:
                break
        return others

    counts = asyncio.run(by_adapter())
    for model, count in counts.items():
        assert count.most_common(1)[0][1] >= 9, (model, count)
    for name in NAMES:  # versions of a name go together, so that a swap is one load
        assert len({counts[f"rand:{name}@{v}"].most_common(1)[0][0] for v in (1, 2)}) == 1
    assert asyncio.run(spread()) >= BUSY // 2


def test_a_rollback_reaches_every_replica_and_fails_nobody(
    world: World, answers: dict[int | None, Answer]
) -> None:
    """Bursts of more than one replica takes go on before, during and after it."""
    from ray import serve

    client = HandleClient(serve.get_deployment_handle("engine", launch.APP))
    context, continuations = ITEMS[0]
    body = ScoreRequest(
        model="rand:blue", items=[ScoreItemBody(context=context, continuations=continuations)]
    )

    async def answer() -> tuple[str, str]:
        """The replica that answered, and the version: what it says and what its figures say."""
        envelope = await client.call("score", body)
        assert "ok" in envelope, envelope
        version = envelope["ok"]["qwen_ray"]["prompts"][0]["adapter"]
        truth = answers[weights_of(version)][0][0]
        assert envelope["ok"]["items"][0]["logprobs"] == pytest.approx(truth, abs=1e-3)
        return str(envelope["replica"]["id"]), version

    async def bursts_until_both(answer_by: str) -> set[str]:
        """Until each replica has answered a burst by that version alone; the versions seen meanwhile."""
        seen, done = set[str](), set[str]()
        deadline = time.monotonic() + 90
        while len(done) < 2:
            assert time.monotonic() < deadline, (seen, done)
            versions: defaultdict[str, set[str]] = defaultdict(set)
            for replica, version in await asyncio.gather(*(answer() for _ in range(8 * BUSY))):
                versions[replica].add(version)
            for replica, by in versions.items():
                assert by == {answer_by} or replica not in done, f"{replica} went back to {by}"
                if by == {answer_by}:
                    done.add(replica)
                seen |= by
        return seen

    async def run() -> None:
        last = max(world.registry.versions("blue"))
        bad, good = f"blue@{last}", f"blue@{last - 1}"
        assert await bursts_until_both(bad) == {bad}
        load = asyncio.create_task(bursts_until_both(good))
        back = await asyncio.to_thread(world.registry.rollback, "blue", reason="test")
        assert back.ref == good
        assert await load <= {bad, good}

    asyncio.run(run())
