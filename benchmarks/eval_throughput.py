"""How fast lm-eval runs through our endpoint, against lm-eval's own in-process ``hf`` model.

Same model, same 400 four-choice questions (1,600 log-likelihoods), one torch thread for the model on either
side, both in one run: ``hf`` with the best of several batch sizes, ours over HTTP against a Ray Serve
application that the script starts. What is timed is ``loglikelihood`` over the requests as lm-eval builds
them, tokenising and HTTP included, loading the model excluded. Repeats alternate; medians are compared.
The per-request log-probabilities of both sides must agree to 1e-3.

``python benchmarks/eval_throughput.py [--quick] --out FILE`` from the repository's root.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import _common

MODEL = "tiny"
BATCH_SIZES = (1, 8, 32, 64)
TOLERANCE = 1e-3
_WORDS = [
    "river", "mountain", "city", "north", "south", "old", "new", "large", "small",
    "king", "queen", "book", "ship", "train", "bridge", "island", "forest", "star",
    "market", "garden", "window", "letter", "music", "stone", "bread", "water", "light",
    "winter", "summer", "morning", "evening",
]  # fmt: skip
_TASK = """task: four_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def write_task(folder: Path, count: int, tokens: Callable[[str], int]) -> dict[str, float]:
    """The questions and their lm-eval task; returns their mean lengths in tokens."""
    rng = random.Random(20)
    rows, context_tokens, choice_tokens = [], [], []
    for _ in range(count):
        goal, words = rng.randint(30, 90), [rng.choice(_WORDS)]
        while tokens(f"Question: {' '.join(words)}?\nAnswer:") < goal:
            words.append(rng.choice(_WORDS))
        choices: list[str] = []
        while len(choices) < 4:
            choice = " " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 3)))
            if choice not in choices:
                choices.append(choice)
        rows.append({"question": " ".join(words) + "?", "choices": choices, "answer": rng.randrange(4)})
        context_tokens.append(tokens(f"Question: {rows[-1]['question']}\nAnswer:"))
        choice_tokens += [tokens(choice) for choice in choices]
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "four_choices.yaml").write_text(_TASK.format(file=folder / "questions.jsonl"))
    return {"context": statistics.mean(context_tokens), "choice": statistics.mean(choice_tokens)}


class Timed:
    """Runs lm-eval on a model and keeps what its ``loglikelihood`` took and returned."""

    def __init__(self, model: Any, folder: Path, cpu_seconds: Callable[[], float]) -> None:
        from lm_eval.tasks import TaskManager

        self.seconds = self.cpu = 0.0
        self.answers: list[tuple[float, bool]] = []
        self._model, self._cpu_seconds, self._call = model, cpu_seconds, model.loglikelihood
        self._tasks = TaskManager(include_path=str(folder), include_defaults=False)
        model.loglikelihood = self._timed

    def _timed(self, requests: list[Any]) -> list[tuple[float, bool]]:
        cpu, start = self._cpu_seconds(), time.perf_counter()
        self.answers = self._call(requests, disable_tqdm=True)
        self.seconds, self.cpu = time.perf_counter() - start, self._cpu_seconds() - cpu
        return self.answers

    def run(self, limit: int | None = None) -> dict[str, float]:
        """One evaluation; wall seconds, and CPU seconds of every process of this side."""
        from lm_eval import simple_evaluate

        simple_evaluate(
            self._model, tasks=["four_choices"], task_manager=self._tasks, limit=limit, bootstrap_iters=0,
            log_samples=False, verbosity="ERROR",
        )  # fmt: skip
        return {"seconds": self.seconds, "cpu_seconds": self.cpu}


def own_cpu() -> float:
    return time.process_time()


def served_cpu() -> float:
    """This process (the client) and every Serve process its Ray started; from /proc, so Linux only."""
    total, tick = own_cpu(), os.sysconf("SC_CLK_TCK")
    stats: dict[int, tuple[int, float]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        stats[int(entry.parent.name)] = (int(fields[1]), (int(fields[11]) + int(fields[12])) / tick)
    for pid, (parent, seconds) in stats.items():
        ancestor = parent
        while ancestor != os.getpid() and ancestor in stats:
            ancestor = stats[ancestor][0]
        if ancestor == os.getpid() and _serves(pid):
            total += seconds
    return total


def _serves(pid: int) -> bool:
    try:
        title = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return title.startswith((b"ray::Serve", b"ray::Proxy"))


def main() -> None:
    args = _common.arguments(__doc__ or "")
    facts = _common.machine()
    import torch
    from lm_eval.models.huggingface import HFLM

    from qwen_ray import cluster, models
    from qwen_ray.evaluation.lm import QwenRayLM
    from qwen_ray.serving import launch

    torch.set_num_threads(1)
    ref = models.resolve(MODEL)
    tokenizer = models.load_tokenizer(ref)
    questions, repeats = (60, 1) if args.quick else (400, 5)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lengths = write_task(folder, questions, lambda text: len(tokenizer.encode(text)))
        cluster.connect("local", num_cpus=2)
        try:
            url = launch.start(MODEL, port=0, threads=1)
            ours = Timed(QwenRayLM(base_url=url, model=ref.id), folder, served_cpu)
            # dtype: both sides in float32, the precision of the served model on a CPU.
            hf = {
                size: Timed(
                    HFLM(pretrained=ref.location, dtype="float32", device="cpu", batch_size=size),
                    folder,
                    own_cpu,
                )
                for size in ((8, 32) if args.quick else BATCH_SIZES)
            }
            ours.run(limit=40)
            tried = {}
            for size, side in hf.items():
                side.run(limit=10)
                tried[size] = side.run()["seconds"]
            best = min(tried, key=lambda size: tried[size])
            runs: dict[str, list[dict[str, float]]] = {"ours": [], "hf": []}
            for _ in range(repeats):
                runs["ours"].append(ours.run())
                runs["hf"].append(hf[best].run())
            pairs = zip(ours.answers, hf[best].answers, strict=True)
            difference = max(abs(a - b) for (a, _), (b, _) in pairs)
            greedy = sum(a != b for (_, a), (_, b) in zip(ours.answers, hf[best].answers, strict=True))
        finally:
            launch.stop()
            cluster.disconnect()
    if difference > TOLERANCE or greedy:
        raise SystemExit(
            f"the sides disagree: log-probabilities by {difference:.2e}, greedy flags on {greedy}"
        )

    requests = 4 * questions
    median = {
        side: {key: statistics.median(run[key] for run in entries) for key in ("seconds", "cpu_seconds")}
        for side, entries in runs.items()
    }
    ratios = {key: median["hf"][key] / median["ours"][key] for key in ("seconds", "cpu_seconds")}
    each = [h["seconds"] / o["seconds"] for h, o in zip(runs["hf"], runs["ours"], strict=True)]
    _common.write(
        args.out,
        {
            "name": "eval_throughput",
            "quick": args.quick,
            "headline": {
                "ratio": ratios["seconds"],
                "what": f"lm-eval requests/s through the endpoint over lm-eval hf (batch {best}), wall time",
            },
            "ratios": {
                "wall": ratios["seconds"],
                "cpu": ratios["cpu_seconds"],
                "wall_lowest_pair": min(each),
                "wall_highest_pair": max(each),
            },
            "sides": {
                "ours": {
                    "what": "QwenRayLM over HTTP, Ray Serve, 1 replica, 1 torch thread",
                    "requests_per_second": requests / median["ours"]["seconds"],
                    "runs": runs["ours"],
                },
                "hf": {
                    "what": f"lm-eval hf in process, batch {best}, 1 torch thread",
                    "requests_per_second": requests / median["hf"]["seconds"],
                    "batch_sizes_tried_seconds": tried,
                    "runs": runs["hf"],
                },
            },
            "agreement": {
                "largest_difference_nats": difference,
                "allowed": TOLERANCE,
                "greedy_flags_differing": greedy,
            },
            "workload": {
                "model": MODEL,
                "questions": questions,
                "requests": requests,
                "mean_tokens": lengths,
            },
            "machine": facts,
            "versions": _common.versions("qwen-ray", "torch", "ray", "transformers", "lm-eval"),
            "commit": _common.commit(),
        },
    )


if __name__ == "__main__":
    main()
