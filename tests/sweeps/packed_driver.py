"""The example sweep in Ray Tune, as a process to kill: ``python -m tests.sweeps.packed_driver OUT``.

Leaves ``OUT/grid.json``: what Tune's ResultGrid says of each trial.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

from qwen_ray import cluster
from qwen_ray.errors import EXIT_INTERRUPTED
from qwen_ray.fsio import write_json
from qwen_ray.sweeps.ledger import Ledger
from tests.sweeps.packed_example import VALUES, example


class Recorded:
    """Proposes what is in the ledger."""

    total = len(VALUES)

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def propose(self, index: int) -> tuple[dict[str, Any], str]:
        trial = self.ledger.trial(index)
        return trial.values, trial.origin


def main(out: Path) -> None:
    from qwen_ray.sweeps.searcher import TuneSearcher
    from qwen_ray.sweeps.trial import tune_packed

    spec, ledger = example(out), Ledger(out)
    grid = tune_packed(spec, out, searcher=TuneSearcher(Recorded(ledger)), ledger=ledger, group="example")
    rows = [
        {
            "trial": result.config["trial"],
            "iterations": result.metrics["training_iteration"],
            "reported": len(result.metrics_dataframe),
            "score": result.metrics["score"],
            "step": result.metrics["step"],
            "error": result.error and str(result.error),
            "checkpoint": result.checkpoint and result.checkpoint.path,
            "path": result.path,
        }
        for result in grid
    ]
    write_json(out / "grid.json", {"trials": rows, "best": grid.get_best_result().config["trial"]})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    cluster.connect("local", num_cpus=2)
    try:
        main(Path(sys.argv[1]))
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    finally:
        cluster.disconnect()
