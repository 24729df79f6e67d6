"""Tokens a second that our server generates for 1, 8 and 32 clients at a time that ask for mixed adapters.

Prompts for the base model and four adapters in turn, greedy, one torch thread for the model on every side,
all in one run on one machine:

- ours over HTTP, against a Ray Serve application that the script starts: whole answers, and streamed ones;
- our engine without HTTP;
- transformers ``generate`` with PEFT, given all prompts beforehand, in batches of as many as there are
  clients: ``mixed`` in one call (``adapter_names``), and ``sorted``, each adapter's prompts in batches of
  their own. The faster counts;
- vLLM on the CPU in batches of as many, with ``--vllm-python`` (the Python of an environment that has it).

Tokens are those generated, prompts are not counted. Sides alternate, each round with prompts of its own (the
server would know the old ones); medians are compared. All sides must generate the same tokens (one prompt in
fifty may differ: the likeliest two can be as good as equal).

``python benchmarks/serve_generate.py [--quick] [--vllm-python PYTHON] --out FILE`` from the root.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _common
from _serve_sides import ADAPTERS, RANK, make_adapters

MODEL = "tiny"
CLIENTS = (1, 8, 32)
NEW_TOKENS = 64
DIFFERING = 0.02  # of the prompts, at the most

Prompt = tuple[str | None, list[int]]
"""An adapter's name, None for the base model, and token ids."""
Made = list[list[int]]


def prompts(count: int, vocabulary: int, seed: int) -> list[Prompt]:
    """20 to 60 random tokens each, for the base model and the adapters in turn."""
    rng = random.Random(seed)
    names = [None, *ADAPTERS]
    return [
        (names[i % len(names)], [rng.randrange(1, vocabulary) for _ in range(rng.randint(20, 60))])
        for i in range(count)
    ]


def turned(given: Sequence[Prompt]) -> list[Prompt]:
    return [(name, ids[::-1]) for name, ids in given]


def groups(given: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    return [given[start : start + size] for start in range(0, len(given), size)]


class Transformers:
    """``generate`` on a PEFT model that has all adapters loaded."""

    def __init__(self, location: str, adapters: dict[str, Path], new_tokens: int) -> None:
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
        first, *others = adapters
        self._model = PeftModel.from_pretrained(base, adapters[first], adapter_name=first)
        for name in others:
            self._model.load_adapter(adapters[name], adapter_name=name)
        self._model.eval()
        self._new_tokens = new_tokens
        eos = base.generation_config.eos_token_id
        self._eos = set(eos if isinstance(eos, list) else [eos])

    def mixed(self, given: Sequence[Prompt], size: int) -> Made:
        made: Made = []
        for group in groups(given, size):
            names = ["__base__" if name is None else name for name, _ in group]
            made += self._generate([ids for _, ids in group], adapter_names=names)
        return made

    def sorted(self, given: Sequence[Prompt], size: int) -> Made:
        """Each adapter's own prompts together, as many as may be, so that no call mixes."""
        made: Made = [[] for _ in given]
        for name in (None, *ADAPTERS):
            own = [i for i, (asked, _) in enumerate(given) if asked == name]
            for part in (own[start : start + size] for start in range(0, len(own), size)):
                ids = [given[i][1] for i in part]
                if name is None:
                    with self._model.disable_adapter():
                        answers = self._generate(ids)
                else:
                    self._model.set_adapter(name)
                    answers = self._generate(ids)
                for i, answer in zip(part, answers, strict=True):
                    made[i] = answer
        return made

    def _generate(self, sequences: Sequence[list[int]], **settings: Any) -> Made:
        import torch

        longest = max(map(len, sequences))
        ids = torch.tensor([[0] * (longest - len(s)) + s for s in sequences])
        mask = torch.tensor([[0] * (longest - len(s)) + [1] * len(s) for s in sequences])
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=self._new_tokens,
                pad_token_id=next(iter(self._eos)), **settings,
            )  # fmt: skip
        return [self._cut(row) for row in out[:, longest:].tolist()]

    def _cut(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self._eos]
        return row[: ends[0] + 1] if ends else row


class Http:
    """Clients of the server, each with one request at a time."""

    def __init__(self, url: str, model: str, new_tokens: int) -> None:
        self._url, self._model, self._new_tokens = url, model, new_tokens

    def whole(self, given: Sequence[Prompt], clients: int) -> Made:
        return asyncio.run(self._all(given, clients, stream=False))

    def streamed(self, given: Sequence[Prompt], clients: int) -> Made:
        return asyncio.run(self._all(given, clients, stream=True))

    async def _all(self, given: Sequence[Prompt], clients: int, *, stream: bool) -> Made:
        import httpx

        waiting = list(enumerate(given))[::-1]
        made: Made = [[] for _ in given]
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self._url, timeout=600, limits=limits) as client:

            async def work() -> None:
                while waiting:
                    i, (name, ids) = waiting.pop()
                    body = {
                        "model": self._model if name is None else f"{self._model}:{name}",
                        "prompt": ids,
                        "max_tokens": self._new_tokens,
                        "temperature": 0,
                        "stream": stream,
                    }
                    if stream:
                        body["stream_options"] = {"include_usage": True}
                        made[i] = await self._stream(client, body)
                    else:
                        reply = await client.post("/v1/completions", json=body)
                        reply.raise_for_status()
                        made[i] = [0] * reply.json()["usage"]["completion_tokens"]

            await asyncio.gather(*(work() for _ in range(clients)))
        return made

    async def _stream(self, client: Any, body: dict[str, Any]) -> list[int]:
        count = 0
        async with client.stream("POST", "/v1/completions", json=body) as reply:
            reply.raise_for_status()
            async for line in reply.aiter_lines():
                if line.startswith("data: {") and (usage := json.loads(line[6:]).get("usage")):
                    count = usage["completion_tokens"]
        return [0] * count


def check(want: Made, got: Made, who: str) -> float:
    """The share of prompts that a side answers otherwise; ends the program where it is too large.

    Sides that give no ids are compared by the number of tokens."""
    differing = sum(len(a) != len(b) or (any(b) and a != b) for a, b in zip(want, got, strict=True))
    if differing / len(want) > DIFFERING:
        raise SystemExit(f"{who} generates other tokens: {differing} of {len(want)} prompts")
    return differing / len(want)


def vllm_side(
    python: Path,
    location: str,
    adapters: dict[str, Path],
    given: dict[int, list[list[Prompt]]],
    new_tokens: int,
) -> dict[int, list[tuple[float, Made]]]:
    """Seconds of each round and what was generated in it, by the number of clients."""
    from qwen_ray import models

    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "rounds.json"
        order = [(clients, one) for clients, rounds in given.items() for one in rounds]
        task = {
            "model": location,
            "adapters": {name: str(folder) for name, folder in adapters.items()},
            "rank": RANK,
            "context_length": models.context_length(models.resolve(location)),
            "max_tokens": new_tokens,
            "rounds": [[list(part) for part in groups(one, clients)] for clients, one in order],
            "out": str(out),
        }
        script = Path(__file__).with_name("_serve_vllm.py")
        environment = os.environ | {"OMP_NUM_THREADS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        subprocess.run(
            [str(python), str(script)], input=json.dumps(task), text=True, env=environment, check=True
        )
        answers = json.loads(out.read_text())
    runs: dict[int, list[tuple[float, Made]]] = {clients: [] for clients in given}
    for (clients, _), answer in zip(order, answers, strict=True):
        runs[clients].append((answer["seconds"], answer["made"]))
    return runs


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and short; its figures mean little")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    parser.add_argument("--vllm-python", type=Path, metavar="PYTHON", help="also measure vLLM, with this")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    facts = _common.machine()
    import torch

    from qwen_ray import cluster, models
    from qwen_ray.serving import launch
    from qwen_ray.serving.engines.base import GenerateRequest
    from qwen_ray.serving.engines.torch import TorchEngine

    torch.set_num_threads(1)
    ref = models.resolve(MODEL)
    repeats, new_tokens = (1, 8) if args.quick else (5, NEW_TOKENS)
    sizes = (1, 8) if args.quick else CLIENTS
    # Four requests a client, so that they come and go; a single client's are ten, two for each adapter.
    vocabulary = len(models.load_tokenizer(ref))
    counts = {clients: max(10, (1 if args.quick else 4) * clients) for clients in sizes}
    given = {
        clients: [prompts(count, vocabulary, seed) for seed in range(repeats)]
        for clients, count in counts.items()
    }
    with tempfile.TemporaryDirectory() as name:
        adapters = make_adapters(ref.location, Path(name))
        theirs = Transformers(ref.location, adapters, new_tokens)
        engine = TorchEngine.load(ref, threads=1, prefix_bytes=0)
        for adapter, folder in adapters.items():
            engine.add_adapter(adapter, folder)

        def direct(asked: Sequence[Prompt], clients: int) -> Made:
            made: Made = []
            for part in groups(asked, clients):
                requests = [GenerateRequest(adapter, ids, new_tokens) for adapter, ids in part]
                made += [result.ids for result in engine.generate(requests)]
            return made

        cluster.connect("local", num_cpus=2)
        try:
            url = launch.start(MODEL, port=0, threads=1, adapters=adapters)
            http = Http(url, ref.id, new_tokens)
            sides: dict[str, Callable[[Sequence[Prompt], int], Made]] = {
                "http": http.whole,
                "http streamed": http.streamed,
                "engine": direct,
                "transformers mixed": theirs.mixed,
                "transformers sorted": theirs.sorted,
            }
            runs: dict[int, dict[str, list[tuple[float, Made]]]] = {}
            for clients in sizes:
                runs[clients] = {side: [] for side in sides}
                for run in sides.values():
                    run(prompts(counts[clients], vocabulary, -1), clients)
                for one in given[clients]:
                    for side, run in sides.items():
                        # The server has just seen the prompts of "http": the same length, other tokens.
                        asked = turned(one) if side == "http streamed" else one
                        start = time.perf_counter()
                        made = run(asked, clients)
                        runs[clients][side].append((time.perf_counter() - start, made))
        finally:
            launch.stop()
            cluster.disconnect()
        if args.vllm_python is not None:
            for clients, found in vllm_side(
                args.vllm_python, ref.location, adapters, given, new_tokens
            ).items():
                runs[clients]["vllm"] = found

    rows = []
    for clients in sizes:
        want = [ids for _, made in runs[clients]["transformers mixed"] for ids in made]
        differing = {
            side: check(want, [ids for _, made in found for ids in made], side)
            for side, found in runs[clients].items()
            if side != "http streamed"
        }
        rates = {
            side: statistics.median(sum(map(len, made)) / seconds for seconds, made in found)
            for side, found in runs[clients].items()
        }
        best = max(rates["transformers mixed"], rates["transformers sorted"])
        rows.append(
            {
                "clients": clients,
                "prompts": counts[clients],
                "tokens_per_second": rates,
                "over_transformers": {
                    side: rate / best for side, rate in rates.items() if "transformers" not in side
                },
                "prompts_differing": differing,
                "seconds": {side: [s for s, _ in found] for side, found in runs[clients].items()},
            }
        )
    last: Any = rows[-1]
    _common.write(
        args.out,
        {
            "name": "serve_generate",
            "quick": args.quick,
            "headline": {
                "ratio": last["over_transformers"]["http"],
                "what": f"tokens/s for {last['clients']} clients with mixed adapters over HTTP over "
                "transformers generate + PEFT (its faster way, no HTTP), wall time",
            },
            "rows": rows,
            "workload": {
                "model": MODEL,
                "adapters": "base and 4 x LoRA rank 8 on all linear layers, random",
                "prompt_tokens": [20, 60],
                "new_tokens": new_tokens,
                "server": "Ray Serve, 1 replica, 1 torch thread",
            },
            "machine": facts,
            "versions": _common.versions("qwen-ray", "torch", "ray", "transformers", "peft"),
            "commit": _common.commit(),
        },
    )


if __name__ == "__main__":
    main()
