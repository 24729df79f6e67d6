"""How near a mix search comes to the best mix, in worlds where every mix has really been trained.

    python benchmarks/mix_search.py --out benchmarks/mix_search.json

In each of 10 small worlds (_mix_worlds.py) all 56 mixes of the step-0.2 lattice of three new domains and a
replay source are trained in packs, and the uniform mix. The goal: the lowest loss on the new domains while
the replay source's rises by at most eps nats a token. Then each search is replayed from the table, at the
cost of at most 8 runs: ours (4 experts, which are lattice points, the uniform mix, 3 chosen together),
random ones, the uniform mix, and parts of ours alone. Regret is the share of the achievable gain over the
base that the best feasible run of a search lacks; a search succeeds in a world if that is at most 5%.

The eps that counts was fixed before any of these worlds was made: 0.05, the product's default. ``--regmix``
names the folder of RegMix's published table (mixes and losses of 1M-parameter models), on which the Bayesian
search, which is what a mix search falls back to, is compared with random draws.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _common
from _mix_regmix import regmix
from _mix_worlds import DOMAINS, NEW, REPLAY, World

from qwen_ray.fsio import read_json, write_json
from qwen_ray.sweeps.mixproxy import rank_correlation, score
from qwen_ray.sweeps.mixsearch import EXPERT, MIX
from qwen_ray.sweeps.mixsearch_config import MixSearchConfig
from qwen_ray.sweeps.mixstudy import Study, Trained
from qwen_ray.sweeps.mixsurrogate import key
from qwen_ray.sweeps.objective import PREFIX
from qwen_ray.sweeps.simplex import Mix, Simplex
from qwen_ray.sweeps.spec import ObjectiveConfig

COMMON = (0.0, 0.0, 0.1, 0.1, 0.25, 0.25, 0.5, 0.5, 0.75, 1.0)
"""Share of words that the domains of each world have in common, and use differently."""
EPS, PRIMARY = (0.01, 0.02, 0.05), 0.05
RUNS, VERIFIED, SLOTS, PARTS = 8, 3, 8, 5
DRAWS = 1000
WITHIN = 0.05


class Table(NamedTuple):
    """A world in which every mix was trained: rises of each domain's loss over the base's."""

    mixes: list[Mix]
    real: list[dict[str, float]]
    scores: list[dict[str, float]]
    seconds: float


def main() -> None:
    args = arguments()
    before = _common.machine()
    worlds = [World(i, common) for i, common in enumerate(COMMON)]
    parts = 2 if args.quick else PARTS
    kept = read_json(args.tables) if args.tables and args.tables.is_file() else {}
    tables = {int(seed): Table(**table) for seed, table in kept.items()}
    found = []
    for world in worlds[-1:] if args.quick else worlds:
        if world.seed not in tables:
            with tempfile.TemporaryDirectory() as folder:
                tables[world.seed] = trained(world, Path(folder), parts)
            if args.tables:
                write_json(args.tables, {seed: table._asdict() for seed, table in tables.items()})
        table = tables[world.seed]
        found.append(judged(world, table))
        print(f"world {world.seed}: {table.seconds:.0f} s, {summary(found[-1])}", file=sys.stderr)
    within = {
        str(eps): {name: sum(world["eps"][str(eps)][name]["within"] for world in found) for name in SEARCHES}
        for eps in EPS
    }
    ours, by_chance = within[str(PRIMARY)]["ours"], within[str(PRIMARY)]["random"]
    result: dict[str, Any] = {
        "name": "mix_search",
        "headline": {
            "ratio": ours / max(by_chance, 1e-9),
            "what": f"worlds in which {RUNS} runs come within 5% of the best mix's gain, against random "
            f"mixes ({ours:g} and {by_chance:.1f} of {len(found)}; eps {PRIMARY})",
        },
        "goal": {"eps": PRIMARY, "worlds": 8, "reached": ours >= 8},
        "within_5_percent": within,
        "worlds": found,
        "regmix": regmix(args.regmix, quick=args.quick) if args.regmix else None,
        "settings": {"runs": RUNS, "verified": VERIFIED, "mixes": len(table.mixes), "steps": 60},
        "quick": args.quick,
        "machine": before,
        "versions": _common.versions("torch", "transformers", "peft", "qwen-ray"),
        "commit": _common.commit(),
    }
    _common.write(args.out, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--regmix", type=Path, metavar="FOLDER", help="sail-sg/regmix's CSV files")
    parser.add_argument(
        "--tables",
        type=Path,
        metavar="FILE",
        help="keep what is trained there, and train no more than it lacks",
    )
    parser.add_argument("--quick", action="store_true", help="small and short; its figures mean little")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    return parser.parse_args()


def trained(world: World, folder: Path, parts: int) -> Table:
    """Train every mix in packs, and score every mix from the experts, which are the lattice's vertices."""
    from qwen_ray.training.packed import Adapter, Pack

    began = time.process_time()
    config = world.build(folder)
    simplex = Simplex(DOMAINS)
    mixes = [*simplex.lattice(parts), simplex.uniform()]
    pack = Pack(config)
    losses: list[dict[str, float]] = []
    experts: dict[str, Adapter] = {}
    pack.add("base", config)
    base, rows = pack.base_losses("base"), pack.slots["base"].data.validation
    pack.remove("base")
    for start in range(0, len(mixes), SLOTS):
        for i, mix in enumerate(mixes[start : start + SLOTS]):
            data = config.data.model_copy(update={"weights": mix})
            pack.add(str(start + i), config.model_copy(update={"data": data}))
        while not all(slot.done for slot in pack.slots.values()):
            pack.step()
        losses += pack.validation().values()
        for name in list(pack.slots):
            mix = mixes[int(name)]
            if max(mix.values()) == 1:
                experts[max(mix, key=lambda d: mix[d])] = pack.weights(name)
            pack.remove(name)
    real = [{d: row[PREFIX + d] - base[PREFIX + d] for d in DOMAINS} for row in losses]
    return Table(mixes, real, score(pack, experts, mixes, rows), time.process_time() - began)


# ---------------------------------------------------------------- searches on a table: the mixes they train


def study(table: Table, eps: float, runs: Sequence[int] = (), *, scored: bool = True) -> Study:
    """The experts, the uniform mix and ``runs``, as a mix search knows them."""
    known = [*experts_of(table), len(table.mixes) - 1, *runs]
    return Study(
        ObjectiveConfig(targets=list(NEW), strengths=[REPLAY], tolerance=eps),
        [
            Trained(m, table.real[i], EXPERT if max(m.values()) == 1 else MIX)
            for i in known
            if (m := table.mixes[i])
        ],
        {key(m): rises for m, rises in zip(table.mixes, table.scores, strict=True)} if scored else None,
    )


def experts_of(table: Table) -> list[int]:
    return [i for i, mix in enumerate(table.mixes) if max(mix.values()) == 1]


def ours(table: Table, eps: float, *, scored: bool = True) -> list[int]:
    """Experts, the uniform mix, and what a mix search verifies."""
    chosen = study(table, eps, scored=scored).choose(table.mixes, VERIFIED)
    places = {key(mix): i for i, mix in enumerate(table.mixes)}
    return [*experts_of(table), len(table.mixes) - 1, *(places[key(mix)] for mix in chosen)]


def scores_alone(table: Table, eps: float) -> list[int]:
    """Experts, the uniform mix, and the best by the experts' scores as they are."""
    judge = study(table, eps)
    known = [*experts_of(table), len(table.mixes) - 1]

    def order(i: int) -> tuple[bool, float]:
        rises = table.scores[i]
        feasible = rises[REPLAY] <= eps
        return (not feasible, -judge.gain(rises) if feasible else rises[REPLAY])

    rest = sorted((i for i in range(len(table.mixes)) if i not in known), key=order)
    return [*known, *rest[:VERIFIED]]


SEARCHES: dict[str, Callable[[Table, float], list[list[int]]]] = {
    "ours": lambda table, eps: [ours(table, eps)],
    "random": lambda table, eps: [
        random.Random(draw).sample(range(len(table.mixes) - 1), min(RUNS, len(table.mixes) - 1))
        for draw in range(DRAWS)
    ],
    "uniform": lambda table, eps: [[len(table.mixes) - 1]],
    "without scores": lambda table, eps: [ours(table, eps, scored=False)],
    "scores as they are": lambda table, eps: [scores_alone(table, eps)],
}
"""From a table to the runs of a search; of random draws many, whose chance of success counts."""


def judged(world: World, table: Table) -> dict[str, Any]:
    """What each search reaches in a world, and how well the scores rank its mixes."""
    of_eps: dict[str, Any] = {}
    for eps in EPS:
        judge = study(table, eps)
        gains = [float(judge.value(rises)) for rises in table.real]
        best = max(0.0, *gains)
        row: dict[str, Any] = {
            "achievable_gain": best,
            "feasible": sum(gain >= 0 for gain in gains),
            "best_mix": table.mixes[gains.index(best)] if best > 0 else None,
        }
        for name, search in SEARCHES.items():
            draws = search(table, eps)
            regrets = [1 - max(0.0, *(gains[i] for i in runs)) / best if best > 0 else 0.0 for runs in draws]
            row[name] = {
                "runs": len(draws[0]),
                "regret": statistics.median(regrets),
                "within": statistics.fmean(regret <= WITHIN for regret in regrets),
            }
        chosen = ours(table, eps)[-VERIFIED:]
        agreement = study(table, eps, chosen).agreement()
        row["agreement"] = agreement
        row["believed"] = agreement is not None and agreement >= MixSearchConfig().proxy_threshold
        of_eps[str(eps)] = row
    mixed = [i for i, mix in enumerate(table.mixes) if max(mix.values()) < 1]
    return {
        "seed": world.seed,
        "common": world.common,
        "eps": of_eps,
        "rank_correlation": {
            domain: rank_correlation(
                *([rows[i][domain] for i in mixed] for rows in (table.scores, table.real))
            )
            for domain in DOMAINS
        },
        "cpu_seconds": table.seconds,
    }


def summary(world: Mapping[str, Any]) -> str:
    return ", ".join(
        f"eps {eps}: " + ", ".join(f"{name} {100 * row[name]['regret']:.0f}%" for name in SEARCHES)
        for eps, row in world["eps"].items()
    )


if __name__ == "__main__":
    main()
