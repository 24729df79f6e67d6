"""The Bayesian search over mixes against random draws, on RegMix's published runs (arXiv 2407.01492).

Each row of its tables is a mix of 17 domains of the Pile, and the losses of a small model trained on it. A
search may look at few rows. The goal: the lowest loss on Pile-CC, RegMix's own target, where the loss on
Wikipedia is at most the tolerance above that of the mix nearest to uniform, which stands for the base.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qwen_ray.sweeps.mixstudy import Study, Trained
from qwen_ray.sweeps.mixsurrogate import key
from qwen_ray.sweeps.simplex import Mix
from qwen_ray.sweeps.spec import ObjectiveConfig

TARGET, STRENGTH, TOLERANCE = "pile_cc", "wikipedia_en", 0.05
POOLS = {"1M": ("train_{}_1m", "test_{}_1m"), "60M": ("test_{}_60m",), "1B": ("test_{}_1B",)}
FIRST, COHORT, RUNS, SEEDS = 4, 4, (8, 16, 24), 20

Pool = list[tuple[Mix, dict[str, float]]]


def regmix(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Median regret of both searches for each pool and number of runs: the share of the gain lacking between
    the base and the pool's best feasible row."""
    pools = {name: pool(folder, parts) for name, parts in POOLS.items()}
    if quick:
        pools = {"1B": pools["1B"]}
    return {
        "target": TARGET,
        "strength": STRENGTH,
        "tolerance": TOLERANCE,
        "seeds": 2 if quick else SEEDS,
        "pools": {name: compared(rows, 2 if quick else SEEDS) for name, rows in pools.items()},
    }


def pool(folder: Path, parts: Sequence[str]) -> Pool:
    """Mixes, and the rises of the two losses over the base's."""
    rows = []
    for part in parts:
        mixes, losses = (
            {row.pop("index"): row for row in csv.DictReader(f.open(encoding="utf-8"))}
            for f in (folder / f"{part.format(kind)}.csv" for kind in ("mixture", "pile_loss"))
        )
        for index in mixes:
            shares = {d.removeprefix("train_the_pile_"): float(x) for d, x in mixes[index].items()}
            total = sum(shares.values())
            measured = {d: float(losses[index][f"metric/the_pile_{d}_val_loss"]) for d in (TARGET, STRENGTH)}
            rows.append(({d: x / total for d, x in shares.items()}, measured))
    _, base = min(rows, key=lambda row: sum((x - 1 / len(row[0])) ** 2 for x in row[0].values()))
    return [(mix, {d: loss - base[d] for d, loss in losses.items()}) for mix, losses in rows]


def compared(rows: Pool, seeds: int) -> dict[str, Any]:
    gains = [float(_study(rows, [i]).value(rows[i][1])) for i in range(len(rows))]
    best = max(gains)
    found: dict[str, dict[str, list[float]]] = {}
    for seed in range(seeds):
        order = random.Random(seed).sample(range(len(rows)), max(RUNS))
        searches = {"random": order, "bayes": _bayes(rows, order[:FIRST])}
        for name, tried in searches.items():
            for runs in RUNS:
                reached = max(0.0, *(gains[i] for i in tried[:runs]))
                found.setdefault(name, {}).setdefault(str(runs), []).append(1 - reached / best)
    return {
        "rows": len(rows),
        "achievable_gain": best,
        "median_regret": {
            name: {runs: statistics.median(values) for runs, values in of_runs.items()}
            for name, of_runs in found.items()
        },
    }


def _study(rows: Pool, known: Sequence[int]) -> Study:
    objective = ObjectiveConfig(targets=[TARGET], strengths=[STRENGTH], tolerance=TOLERANCE)
    return Study(objective, [Trained(*rows[i], "bayes") for i in known], None)


def _bayes(rows: Pool, first: Sequence[int]) -> list[int]:
    """The rows that the search looks at, a cohort at a time."""
    known = list(first)
    places = {key(mix): i for i, (mix, _) in enumerate(rows)}
    while len(known) < max(RUNS):
        chosen = _study(rows, known).choose([mix for mix, _ in rows], COHORT, believed=False)
        known += [places[key(mix)] for mix in chosen]
    return known
