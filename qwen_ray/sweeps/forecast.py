"""What a sweep will try and about what it will cost, before anything is started."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qwen_ray.config import RunConfig
from qwen_ray.errors import UserError
from qwen_ray.planner import memory, programs, speed
from qwen_ray.planner.hardware import Hardware, nearest
from qwen_ray.planner.shapes import Shape, shape_of
from qwen_ray.sweeps.halving import DRAWS, passes
from qwen_ray.sweeps.ledger import Ledger
from qwen_ray.sweeps.mixsearch import EXPERT, MIX, MixSearch
from qwen_ray.sweeps.proposals import Proposals
from qwen_ray.sweeps.spec import REFERENCE, SweepConfig, points, trial_config
from qwen_ray.sweeps.summary import values

LAUNCH = 1.25e-3
"""Seconds a layer and pass that starting its kernels takes, forward and backward, however few the tokens: 45
ms for the 36 layers of a 3B model. An estimate; it decides up to where more trials in a pack cost nothing."""
_SHOWN = 8
_NOTHING = "nothing"
"""A folder that no sweep has: as yet nothing is recorded."""

Stretches = list[tuple[float, int]]
"""(share of a trial's length, trials at once), one after another."""


@dataclass(frozen=True)
class Forecast:
    """Bytes, seconds; None where it cannot be told. ``memory`` is of an engine at its peak, by part."""

    name: str
    kind: str
    trials: list[dict[str, Any]]
    """``index``, ``origin`` and ``values``, None for those that are proposed on the way."""
    slots: int
    engines: int
    pack: Stretches
    """Of the first engine: an example."""
    rungs: list[float]
    trial_steps: float
    """In trials of full length, as the mean over random orders of which trial is better."""
    memory: dict[str, float] | None = None
    memory_of_one: float | None = None
    """The total of a run that trains one of the trials."""
    seconds: float | None = None
    sequential_seconds: float | None = None
    """Of the same trials one after another, all to their end."""
    hardware: str = ""
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        n = len(self.trials)
        size = f", up to {self.slots} in a pack" if self.kind == "packed" else ""
        engines = f", {self.engines} packs at a time" if self.engines > 1 else ""
        lines = [f"{self.name}: {n} {self.kind} trials{size}{engines}", ""]
        for trial in self.trials:
            shown = values(trial["values"]) if trial["values"] is not None else "proposed on the way"
            lines.append(f"  {trial['index']:>6}  {trial['origin']:<18}  {shown}")
        cost = f"{n} trials of full length; none is stopped"
        if self.rungs:
            compared = ", ".join(f"{share:.0%}" for share in self.rungs)
            cost = f"about {self.trial_steps:.1f} trials of full length, not {n} (compared at {compared})"
        lines += ["", f"cost    {cost}"]
        if self.kind == "packed":
            pack = [f"{active} for {share:.0%}" for share, active in self.pack[:_SHOWN]]
            more = ["..."] if len(self.pack) > _SHOWN else []
            lines.append(f"packs   trials at once, for a share of a trial's length: {', '.join(pack + more)}")
        if self.memory is not None and self.memory_of_one is not None:
            largest = sorted(self.memory.items(), key=lambda part: -part[1])[:3]
            parts = ", ".join(f"{name} {_size(bytes_)}" for name, bytes_ in largest)
            total, alone = _size(sum(self.memory.values())), _size(self.memory_of_one)
            lines.append(f"memory  {total} an engine ({parts}); one trial alone {alone}")
        if self.seconds is not None and self.sequential_seconds is not None:
            packed, single = (f"{s / 60:.0f} min" for s in (self.seconds, self.sequential_seconds))
            lines.append(f"time    {packed} on {self.hardware}; one by one and to the end {single}")
        return "\n".join([*lines, "", "Estimates, from formulas and not from a trial.", *self.notes])


def forecast(spec: SweepConfig, hardware: Hardware | None = None) -> Forecast:
    """``hardware``: of one engine; by default this machine's first GPU, if it has one. Raises
    :class:`UserError` as trials' configurations do."""
    hardware = hardware or _here()
    stages, packed = _stages(spec), spec.trials.kind == "packed"
    trials = [{"index": i, **trial} for i, trial in enumerate(trial for stage in stages for trial in stage)]
    slots, engines = (spec.trials.slots, spec.trials.engines) if packed else (1, 1)
    rungs = points(spec)[:-1] if spec.stopping.name in {"halving", "asha"} else []

    def trained(engine: int, draw: int) -> Stretches:
        first, *others = (len(stage[engine::engines]) for stage in stages)
        protected = () if engine else (REFERENCE,)
        made = passes(first, rungs, spec.stopping.eta, slots, protected=protected, draw=draw)
        return made + [stretch for n in others for stretch in passes(n, (), spec.stopping.eta, slots)]

    stretches = [[trained(engine, draw) for draw in range(DRAWS)] for engine in range(engines)]
    made = Forecast(
        name=spec.name,
        kind=spec.trials.kind,
        trials=trials,
        slots=max(active for engine in stretches for _, active in engine[0]),
        engines=engines,
        pack=stretches[0][0],
        rungs=rungs,
        trial_steps=sum(_mean(engine, float) for engine in stretches),
        notes=_open_questions(spec),
    )
    if not packed:
        return replace(made, notes=[*made.notes, "Memory and time of a plain trial: qwen-ray plan."])
    config = _largest(spec)
    try:
        shape = shape_of(config.model.name)
    except UserError as e:
        return replace(made, notes=[*made.notes, f"Memory and time are not predicted: {e.what}."])
    if hardware is None and config.precision == "auto":
        config.precision = "fp32"
    made = replace(
        made,
        memory=_memory(config, shape, made.slots, gpu=hardware is not None).parts,
        memory_of_one=_memory(config, shape, 1, gpu=hardware is not None).total,
    )
    steps = config.optim.max_steps
    if hardware is None:
        why = "Time is not predicted without a GPU. Memory is without Python's and PyTorch's own."
        return replace(made, notes=[*made.notes, why])
    if steps is None:
        return replace(
            made, notes=[*made.notes, "Time is not predicted for epochs: set run.optim.max_steps."]
        )
    pace = speed.predict(config, shape, hardware)
    floor = LAUNCH * shape.layers * config.optim.gradient_accumulation
    work = pace.compute + pace.update
    return replace(
        made,
        seconds=steps * max(_mean(engine, lambda active: max(floor, active * work)) for engine in stretches),
        sequential_seconds=steps * len(trials) * max(floor, work),
        hardware=str(hardware),
        notes=[*made.notes, "Time is for full rows, without evaluation, start-up and benchmarks."],
    )


def _mean(draws: list[Stretches], cost: Callable[[int], float]) -> float:
    """The cost of an engine's passes, the mean over random orders. ``cost``: of a step of so many trials."""
    return sum(length * cost(active) for one in draws for length, active in one) / len(draws)


def _stages(spec: SweepConfig) -> list[list[dict[str, Any]]]:
    """The trials that follow one another: of a mix search the search's own, the domains' experts, and the
    mixes that are verified; of other sweeps all in one."""
    known = spec.mixture is None or spec.mixture.domains is not None  # else the data have to be read
    simplex = spec.simplex if known else None
    if spec.mix_search is not None and simplex is not None:
        first = MixSearch(spec, Ledger(Path(spec.out) / _NOTHING)).next_stage()
        searched = [{"origin": origin, "values": tried} for tried, origin in first]
        experts = [{"origin": f"{EXPERT}:{domain}", "values": None} for domain in simplex.domains]
        verified = spec.mix_search.verify * len(spec.mix_search.learning_rates)
        return [searched, experts, [{"origin": MIX, "values": None}] * verified]
    proposals = Proposals(spec, Ledger(Path(spec.out))) if known else None
    made: list[dict[str, Any]] = []
    for index in range(spec.search.trials):
        tried, origin = proposals.in_advance(index) if proposals else (None, spec.search.name)
        if spec.search.name == "optuna" and origin == "random":
            tried, origin = None, "optuna"
        made.append({"origin": origin, "values": tried})
    return [made]


def _open_questions(spec: SweepConfig) -> list[str]:
    notes, confirm = [], spec.objective.confirm
    if confirm is not None and confirm.data_dir is not None and not Path(confirm.data_dir).is_dir():
        notes.append(f"The sweep needs {confirm.data_dir} (objective.confirm.data_dir), and it is not there.")
    if spec.mixture is not None and spec.mixture.domains is None:
        notes.append(
            "Mixtures are made when the data, and so their domains, are read: mixture.domains names them."
        )
    elif spec.mix_search is not None and spec.mix_search.fallback != "none":
        more = spec.mix_search.fallback_trials
        notes.append(f"Up to {more} more trials of full length, should the merged experts not be believed.")
    return notes


def _largest(spec: SweepConfig) -> RunConfig:
    """The base run with the largest rank and batch that the space has."""
    sizes = ("method.r", "optim.batch_size", "optim.gradient_accumulation")
    tops = {key: max(spec.space[key].extremes) for key in sizes if key in spec.space}
    config = trial_config(spec, tops, out=spec.out)
    config.strategy.name = "ddp"
    return config


def _memory(config: RunConfig, shape: Shape, trials: int, *, gpu: bool) -> memory.Memory:
    """Peak of a pack: the base once, of each trial an adapter with its state, and all trials' tokens."""
    program = programs.ours(config, shape, 1)
    tokens = trials * config.optim.batch_size * config.data.max_length
    budget = programs.LOGITS_BYTES
    chunk = min(budget["cuda" if gpu else "cpu"], 4 * shape.vocabulary * tokens)
    program = replace(
        program,
        trained=trials * shape.adapter(config.method),
        gradients_stay=True,
        logits_fixed=program.logits_fixed / budget["cuda"] * chunk,
        context=program.context if gpu else 0.0,
    )
    return memory.predict(shape, program, tokens)


def _here() -> Hardware | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return Hardware(nearest(torch.cuda.get_device_properties(0).total_memory))


def _size(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"
