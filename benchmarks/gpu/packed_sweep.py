"""Packed LoRA trials on one GPU: steps, peak memory and equality of packs on random-weight Qwen2.5 shapes.

    python benchmarks/gpu/packed_sweep.py --minutes 20 --out benchmarks/gpu/packed_sweep.json

Needs no Ray, no network and no data. Packs of K = 1, 4, 8 and 16 trials of rank 16 are stepped with 256 to
2048 tokens a trial and step, in bfloat16, against one warm trial in our loop, eager and compiled: K trials
one after another take K of its steps. First it is checked that a pack trains what its trials would alone: in
float32 on four layers, loss by loss; in bfloat16 on all, within twice what another split into micro-batches
does to a trial. A setting that does not fit is a row too. ``--shape toy`` runs on the CPU and shows only that
the script works.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import _common
from _packed_sides import Solo
from packed_sweep import write_data

from qwen_ray.config import RunConfig
from qwen_ray.planner.shapes import QWEN25, Shape, from_config

if TYPE_CHECKING:
    import torch

    from qwen_ray.training.packed import Pack

TOY = {
    "model_type": "qwen2", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip
RECORDS = 2000
WARM_UP, STEPS = 3, 10
EXACT_LAYERS, EXACT_STEPS, EXACT = 4, 50, 1e-4
"""Layers and steps of the check in float32, and how far losses may be apart, in nats."""
ROUNDED_STEPS = 20
GOALS = {"at_256": 3.0, "at_512": 2.0, "peak_gib": 40.0}
LARGEST = 16


def write_model(shape: Shape, folder: Path, device: torch.device, dtype: torch.dtype) -> str:
    """Random weights of a shape, made on the device, with the embedded tokenizer; returns the folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from qwen_ray import models

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            torch.manual_seed(0)
            Qwen2ForCausalLM(Qwen2Config(**shape.qwen2)).save_pretrained(folder)
    finally:
        torch.set_default_dtype(before)
    models.load_tokenizer(models.resolve("tiny")).save_pretrained(folder)
    return str(folder)


def run_config(model: str, data: Path, tokens: int, *, precision: str, trial: int = 0) -> RunConfig:
    """A trial: one row a step. Each has a seed and a learning rate of its own."""
    return RunConfig.model_validate(
        {
            "model": {"name": model},
            "method": {"r": 16, "dropout": 0.0},
            "data": {"train": [str(data)], "max_length": tokens},
            "optim": {
                "max_steps": 10_000,
                "batch_size": 1,
                "gradient_accumulation": 1,
                "warmup_steps": 10,
                "learning_rate": 1e-4 * (1 + trial),
            },
            "cluster": {"workers": 0},
            "precision": precision,
            "seed": trial,
        }
    )


# ---------------------------------------------------------------- time and memory


def measure(step: Callable[[], list[dict[str, Any]]], device: torch.device) -> dict[str, Any]:
    """Median seconds of a step, which waits for the device itself, and the peak of memory over all."""
    import torch

    seconds, tokens = [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + STEPS):
        began = time.perf_counter()
        rows = step()
        seconds.append(time.perf_counter() - began)
        tokens.append(sum(row["tokens"] for row in rows))
    found = {
        "seconds_per_step": statistics.median(seconds[WARM_UP:]),
        "first_step_seconds": seconds[0],
        "tokens_per_step": statistics.mean(tokens[WARM_UP:]),
    }
    if device.type == "cuda":
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def attempt(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or why it failed."""
    import torch

    from qwen_ray.errors import UserError

    try:
        return work()
    except (torch.OutOfMemoryError, UserError, FloatingPointError, RuntimeError) as e:
        return {"failed": f"{type(e).__name__}: {str(e).splitlines()[0][:300]}"}
    finally:
        release()


def release() -> None:
    import torch

    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def alone(config: RunConfig, device: torch.device, *, compiled: bool) -> dict[str, Any]:
    """One warm trial in our loop."""
    compute = config.compute.model_copy(update={"compile": compiled})
    solo = Solo(config.model_copy(update={"compute": compute}), device)
    return measure(lambda: [solo.step()], device)


def packed(pack: Pack, configs: list[RunConfig], device: torch.device) -> dict[str, Any]:
    """A pack of these trials; it is empty again afterwards."""
    try:
        for i, config in enumerate(configs):
            pack.add(str(i), config)
        return measure(lambda: list(pack.step().values()), device)
    finally:
        for key in list(pack.slots):
            pack.remove(key)


def packs(
    model: str,
    data: Path,
    device: torch.device,
    *,
    precision: str,
    lengths: Sequence[int],
    counts: Sequence[int],
    due: Callable[[], bool],
) -> Iterator[dict[str, Any]]:
    """A row for each size of pack and number of tokens, on one base, while ``due``."""
    from qwen_ray.training.packed import Pack

    pack = Pack(run_config(model, data, lengths[0], precision=precision), device=device)
    for tokens, count in itertools.product(lengths, reversed(counts)):
        if due():
            configs = [run_config(model, data, tokens, precision=precision, trial=i) for i in range(count)]
            row = attempt(partial(packed, pack, configs, device))
            yield {"tokens": tokens, "trials": count, "mode": "packed", **row}


# ---------------------------------------------------------------- equality


def apart(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def exact(model: str, data: Path, device: torch.device, steps: int) -> dict[str, float]:
    """In float32: how far the losses of two trials in a pack of four are from those of the trials alone."""
    from qwen_ray.training.packed import Pack

    configs = [run_config(model, data, 256, precision="fp32", trial=i) for i in range(4)]
    pack = Pack(configs[0], device=device)
    for i, config in enumerate(configs):
        pack.add(str(i), config)
    rows = [pack.step() for _ in range(steps)]
    found = {}
    for i in (0, 3):
        solo = Solo(configs[i], device)
        found[f"trial {i}"] = apart(
            [row[str(i)]["loss"] for row in rows], [solo.step()["loss"] for _ in range(steps)]
        )
    return found


def rounded(model: str, data: Path, device: torch.device, steps: int, precision: str) -> dict[str, float]:
    """In the precision of the sweep: how far a pack's trial is from the trial alone, and how far that is
    from itself with two rows a pass rather than two passes of a row."""
    from qwen_ray.training.packed import Pack

    def config(rows: int, trial: int) -> RunConfig:
        base = run_config(model, data, 512, precision=precision, trial=trial)
        update = {"batch_size": rows, "gradient_accumulation": 2 // rows}
        return base.model_copy(update={"optim": base.optim.model_copy(update=update)})

    one, two = (Solo(config(rows, 0), device) for rows in (1, 2))
    alone = [[solo.step()["loss"] for _ in range(steps)] for solo in (one, two)]
    del one, two
    release()
    pack = Pack(config(1, 0), device=device)
    for i in range(4):
        pack.add(str(i), config(1, i))
    losses = [pack.step()["0"]["loss"] for _ in range(steps)]
    return {"packed_and_alone": apart(losses, alone[0]), "other_micro_batches": apart(*alone)}


# ---------------------------------------------------------------- all of it


def result(rows: list[dict[str, Any]], checks: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """Ratios of each pack: the time of as many steps of a trial alone over its own."""
    solo = {
        (row["tokens"], row["mode"]): row for row in rows if row["trials"] == 1 and row["mode"] != "packed"
    }
    ratios: dict[str, float] = {}
    for row in rows:
        for mode in ("eager", "compiled"):
            other = solo.get((row["tokens"], mode), {})
            if row["mode"] == "packed" and "seconds_per_step" in row and "seconds_per_step" in other:
                name = f"{row['trials']} trials, {row['tokens']} tokens, over {mode}"
                ratios[name] = row["trials"] * other["seconds_per_step"] / row["seconds_per_step"]
    peaks = [row.get("peak_allocated_gib") for row in rows if row["trials"] == LARGEST]
    known = [peak for peak in peaks if peak is not None]
    best = {n: ratios.get(f"{LARGEST} trials, {n} tokens, over eager") for n in (256, 512)}
    first = next(
        (name for name in ratios if name.startswith(f"{LARGEST} trials, 256")), next(iter(ratios), None)
    )
    return {
        "name": "gpu_packed_sweep",
        "headline": {
            "ratio": ratios[first] if first else 0.0,
            "what": f"one after another over one pack ({first})",
        },
        "goals": GOALS,
        "met": {
            **{f"at_{n}": None if r is None else r >= GOALS[f"at_{n}"] for n, r in best.items()},
            "peak_gib": max(known) <= GOALS["peak_gib"] if known else None,
        },
        "ratios": ratios,
        "equality": checks,
        "rows": rows,
        "machine": facts,
        "versions": _common.versions("qwen-ray", "torch", "transformers", "peft"),
        "commit": _common.commit(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", default="3b", choices=["toy", *QWEN25], help="toy: on the CPU")
    parser.add_argument("--minutes", type=float, default=20, help="no new setting is begun after these")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="where the JSON result goes")
    args = parser.parse_args()
    import torch

    toy = args.shape == "toy"
    if not toy and not torch.cuda.is_available():
        raise SystemExit("no GPU was found; --shape toy runs on the CPU")
    facts, started = _common.machine(), time.perf_counter()
    device = torch.device("cpu" if toy else "cuda")
    shape, precision = (from_config(TOY), "fp32") if toy else (QWEN25[args.shape], "bf16")
    counts, lengths = ((1, 4), (64,)) if toy else ((1, 4, 8, LARGEST), (256, 512, 1024, 2048))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = write_data(folder, 200 if toy else RECORDS)
        small = replace(shape, layers=min(EXACT_LAYERS, shape.layers))
        small_model = write_model(small, folder / "small", device, torch.float32)
        dtype = torch.float32 if toy else torch.bfloat16
        model = write_model(shape, folder / "model", device, dtype)
        checks: dict[str, Any] = {"exact": exact(small_model, data, device, 5 if toy else EXACT_STEPS)}
        release()
        checks["rounded"] = rounded(model, data, device, 3 if toy else ROUNDED_STEPS, precision)
        release()
        print(checks, flush=True)
        gap, own = checks["rounded"].values()
        if max(checks["exact"].values()) > EXACT or gap > max(2 * own, EXACT):
            raise SystemExit(f"a pack does not train what its trials would alone: {checks}")

        def note(row: dict[str, Any]) -> None:
            rows.append(row)
            print(row, flush=True)
            found = result(rows, checks, facts)
            _common.write(args.out, found | {"shape": args.shape})  # a run that is cut off leaves what it has

        def due() -> bool:
            return time.perf_counter() - started < 60 * args.minutes

        for row in packs(model, data, device, precision=precision, lengths=lengths, counts=counts, due=due):
            note(row)
        release()
        modes = ("eager",) if toy else ("eager", "compiled")
        for tokens, mode in itertools.product(lengths, modes):
            if due():
                config = run_config(model, data, tokens, precision=precision)
                work = partial(alone, config, device, compiled=mode == "compiled")
                note({"tokens": tokens, "trials": 1, "mode": mode, **attempt(work)})


if __name__ == "__main__":
    main()
