"""lm-eval through our endpoint against lm-eval's in-process ``hf``: one model, four adapters, stock client.

The same 400 four-choice questions (1,600 log-likelihoods) everywhere, one torch thread for the model on
either side, all in one run on one machine, over HTTP against a Ray Serve application that the script starts:

- ``our client``: the ``qwen-ray`` lm-eval model on the base model, against ``hf`` at its best batch size;
- ``four adapters``: ``qwen-ray eval --models`` asks for four adapters in each request, against ``hf`` with
  each adapter by PEFT, one after the other;
- ``stock client``: lm-eval's own ``local-completions`` at its best settings, against ``hf``.

Timed is ``loglikelihood`` over the requests as lm-eval builds them, tokenising and HTTP included, loading
the model excluded. Sides alternate; medians are compared. Every turn has prompts of its own, as the server
would find those of the turn before in its prefix cache. Per-request log-probabilities must agree to 1e-3.

``python benchmarks/serve_eval.py [--quick] --out FILE`` from the repository's root.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _common
from _serve_sides import (
    ADAPTERS,
    Answers,
    agreement,
    best_of,
    in_turns,
    make_adapters,
    own_cpu,
    served_cpu,
)
from _serve_task import write_task

MODEL = "tiny"
BATCH_SIZES = (8, 32, 64)
STOCK_SETTINGS = ((1, 32), (16, 8), (64, 4), (128, 4))  # prompts a request, requests at a time
GOALS = {"our client": 2.0, "four adapters": 3.0, "stock client": 1.0}


class Requests:
    """The log-likelihood requests of the task as lm-eval builds them, with turns that repeat no prompt."""

    def __init__(self, folder: Path) -> None:
        from lm_eval.tasks import TaskManager

        (task,) = (
            TaskManager(include_path=str(folder), include_defaults=False)
            .load(["four_choices"])["tasks"]
            .values()
        )
        task.build_all_requests(rank=0, world_size=1)
        self._made, self._turn = task.instances, 0

    def __len__(self) -> int:
        return len(self._made)

    def next_turn(self) -> None:
        """All prompts change from their beginning on."""
        self._turn += 1

    def now(self) -> list[Any]:
        from lm_eval.api.instance import Instance

        return [
            Instance(
                request_type="loglikelihood",
                doc={},
                arguments=(f"{self._turn}. {request.args[0]}", request.args[1]),
                idx=request.idx,
            )
            for request in self._made
        ]


class Side:
    """Runs a way of scoring on the requests of the turn, and keeps what it answered."""

    def __init__(
        self,
        score: Callable[[list[Any]], list[Answers]],
        requests: Requests,
        cpu_seconds: Callable[[], float],
    ) -> None:
        self._score, self._requests, self._cpu = score, requests, cpu_seconds
        self.answers: Answers = []

    def run(self) -> dict[str, float]:
        requests = self._requests.now()
        cpu, start = self._cpu(), time.perf_counter()
        answers = self._score(requests)
        seconds, cpu = time.perf_counter() - start, self._cpu() - cpu
        self.answers = [answer for model in answers for answer in model]
        return {"seconds": seconds, "cpu_seconds": cpu}


def each(*models: Any) -> Callable[[list[Any]], list[Answers]]:
    """Scores of lm-eval models one after the other."""
    return lambda requests: [model.loglikelihood(requests, disable_tqdm=True) for model in models]


def together(url: str, models: list[str], folder: Path) -> Callable[[list[Any]], list[Answers]]:
    """Scores of several served models, as ``qwen-ray eval --models`` gets them: with a journal on disk."""
    from qwen_ray.evaluation.journal import Journal
    from qwen_ray.evaluation.many import ManyLM
    from qwen_ray.evaluation.many_backend import ManyBackend, probe
    from qwen_ray.serving.backends import EndpointBackend

    endpoint = EndpointBackend(url, models[0])
    seen = probe(endpoint, models)

    def score(requests: list[Any]) -> list[Answers]:
        name = tempfile.mkdtemp(dir=folder)
        with Journal(Path(name) / "journal.jsonl", {}) as journal:
            backend = ManyBackend(endpoint, models, journal, seen)
            lm, out = ManyLM(backend), []
            for model in models:
                backend.switch(model)
                out.append(lm.loglikelihood(requests, disable_tqdm=True))
        return out

    return score


@dataclass
class Comparison:
    """Two sides on the same prompts, which differ from turn to turn."""

    ours: Side
    theirs: Side
    what: str
    against: str
    models: int = 1

    def run(self, requests: Requests, repeats: int) -> dict[str, Any]:
        agreed: list[dict[str, float]] = []

        def our_turn() -> dict[str, float]:
            requests.next_turn()
            return self.ours.run()

        def their_turn() -> dict[str, float]:
            run = self.theirs.run()
            agreed.append(agreement(self.ours.answers, self.theirs.answers))
            return run

        result = in_turns(our_turn, their_turn, repeats, self.models * len(requests))
        worst = max(agreed, key=lambda found: found["largest_difference_nats"])
        return {"what": self.what, "against": self.against, **result, "agreement": worst}


def main() -> None:
    args = _common.arguments(__doc__ or "")
    facts = _common.machine()
    import torch
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from qwen_ray import cluster, models
    from qwen_ray.evaluation.lm import QwenRayLM
    from qwen_ray.serving import launch

    torch.set_num_threads(1)
    ref = models.resolve(MODEL)
    tokenizer = models.load_tokenizer(ref)
    questions, repeats = (40, 1) if args.quick else (400, 5)
    sizes = (32,) if args.quick else BATCH_SIZES
    stock_settings = ((16, 8),) if args.quick else STOCK_SETTINGS

    def hf(size: int, **adapter: str) -> Any:
        # dtype: both sides in float32, the precision of the served model on a CPU.
        return HFLM(pretrained=ref.location, dtype="float32", device="cpu", batch_size=size, **adapter)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = write_task(folder, questions, lambda text: len(tokenizer.encode(text)))
        adapters = make_adapters(ref.location, folder)
        requests = Requests(folder)
        served = [f"{ref.id}:{adapter}" for adapter in ADAPTERS]
        cluster.connect("local", num_cpus=2)
        try:
            url = launch.start(MODEL, port=0, threads=1, adapters=adapters)

            def stock(prompts: int, at_once: int) -> Any:
                return LocalCompletionsAPI(
                    base_url=f"{url}/v1/completions",
                    model=ref.id,
                    batch_size=prompts,
                    num_concurrent=at_once,
                    max_length=models.context_length(ref),
                    # Its remote tokenizer would ask the server once for each text.
                    tokenizer_backend="huggingface",
                    tokenizer=ref.location,
                )

            ours = Side(each(QwenRayLM(base_url=url, model=ref.id)), requests, served_cpu)
            many = Side(together(url, served, folder), requests, served_cpu)
            plain = {size: Side(each(hf(size)), requests, own_cpu) for size in sizes}
            stocks = {s: Side(each(stock(*s)), requests, served_cpu) for s in stock_settings}
            for side in (ours, many):  # first requests compile and load
                side.run()
            for side in stocks.values():
                requests.next_turn()
                side.run()

            best, tried = best_of({size: side.run for size, side in plain.items()})
            tuned = Side(
                each(*(hf(best, peft=str(folder)) for folder in adapters.values())), requests, own_cpu
            )
            tuned.run()

            def turn_of(side: Side) -> Callable[[], dict[str, float]]:
                def run() -> dict[str, float]:
                    requests.next_turn()
                    return side.run()

                return run

            chosen, stock_tried = best_of({s: turn_of(side) for s, side in stocks.items()})
            against = f"lm-eval hf in process, batch {best}"
            prompts, at_once = chosen
            comparisons = {
                "our client": Comparison(
                    ours, plain[best], "QwenRayLM over HTTP, base model", against
                ),
                "four adapters": Comparison(
                    many, tuned, "four adapters in each request over HTTP",
                    f"{against}, with PEFT, four times", len(served),
                ),
                "stock client": Comparison(
                    stocks[chosen], plain[best],
                    f"local-completions over HTTP, {prompts} prompts a request, {at_once} at a time",
                    against,
                ),
            }  # fmt: skip
            found = {name: comparison.run(requests, repeats) for name, comparison in comparisons.items()}
        finally:
            launch.stop()
            cluster.disconnect()

    worst = min(GOALS, key=lambda name: found[name]["ratio"] / GOALS[name])
    _common.write(
        args.out,
        {
            "name": "serve_eval",
            "quick": args.quick,
            "headline": {
                "ratio": found["our client"]["ratio"],
                "what": f"lm-eval requests/s through the endpoint over lm-eval hf (batch {best}), wall time",
            },
            "goals": {name: found[name]["ratio"] >= goal for name, goal in GOALS.items()},
            "nearest_to_its_goal": worst,
            "comparisons": found,
            "tried_seconds": {"hf batch": tried, "stock (prompts, at once)": stock_tried},
            "workload": {
                "model": MODEL,
                "adapters": "4 x LoRA rank 8 on all linear layers, random",
                "questions": questions,
                "requests": len(requests),
                "mean_tokens": lengths,
                "server": "Ray Serve, 1 replica, 1 torch thread",
            },
            "machine": facts,
            "versions": _common.versions("qwen-ray", "torch", "ray", "transformers", "peft", "lm-eval"),
            "commit": _common.commit(),
        },
    )


if __name__ == "__main__":
    main()
