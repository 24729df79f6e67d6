"""What serve_eval.py and serve_generate.py share: random adapters, turns, CPU time of processes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ADAPTERS = ("one", "two", "three", "four")
RANK = 8
_TOLERANCE = 1e-3  # nats, between two sides' log-probabilities of one request

Answers = list[tuple[float, bool]]
"""(log-probability in nats, is it the likeliest) of each request."""


def make_adapters(location: str, folder: Path) -> dict[str, Path]:
    """LoRA of rank 8 on all linear layers, with random weights that change the answers; saved by PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    folders = {}
    for seed, name in enumerate(ADAPTERS, start=1):
        torch.manual_seed(seed)
        for key, weights in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(weights, std=0.05)
        model.save_pretrained(folder / name)
        folders[name] = folder / name
    return folders


def agreement(ours: Answers, theirs: Answers) -> dict[str, float]:
    """How far two sides' answers are apart; ends the program where it is too far for a comparison."""
    difference = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs, strict=True))
    greedy = sum(a != b for (_, a), (_, b) in zip(ours, theirs, strict=True))
    if difference > _TOLERANCE or greedy:
        raise SystemExit(
            f"the sides disagree: log-probabilities by {difference:.2e}, greedy flags on {greedy}"
        )
    return {"largest_difference_nats": difference, "allowed": _TOLERANCE, "greedy_flags_differing": greedy}


def best_of(settings: Mapping[Any, Callable[[], dict[str, float]]]) -> tuple[Any, dict[str, float]]:
    """Run each setting once; the fastest, and the seconds of all."""
    tried = {setting: run()["seconds"] for setting, run in settings.items()}
    return min(tried, key=lambda setting: tried[setting]), {str(k): v for k, v in tried.items()}


def in_turns(
    ours: Callable[[], dict[str, float]], theirs: Callable[[], dict[str, float]], repeats: int, work: int
) -> dict[str, Any]:
    """Both sides alternately: their runs, ``work`` over the median seconds, and the ratios of medians."""
    runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
    for _ in range(repeats):
        runs["ours"].append(ours())
        runs["theirs"].append(theirs())
    median = {
        side: {key: statistics.median(run[key] for run in entries) for key in entries[0]}
        for side, entries in runs.items()
    }
    each = [t["seconds"] / o["seconds"] for o, t in zip(runs["ours"], runs["theirs"], strict=True)]
    return {
        "ratio": median["theirs"]["seconds"] / median["ours"]["seconds"],
        "ratio_cpu": median["theirs"]["cpu_seconds"] / median["ours"]["cpu_seconds"],
        "lowest_pair": min(each),
        "highest_pair": max(each),
        "per_second": {side: work / median[side]["seconds"] for side in runs},
        "runs": runs,
    }


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
