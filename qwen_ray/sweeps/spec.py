"""SweepConfig: the typed tree that says what a sweep tries, looks for and spends. Unknown keys are refused.

Everything that can be known from the file is checked when it is read, each value of the space on its own in
a trial's configuration included, so that no sweep stops half-way over a misspelt key.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field, field_validator

from qwen_ray.config import RunConfig, Section, complete, get, put, read_settings, validate
from qwen_ray.errors import UserError
from qwen_ray.sweeps.mixsearch_config import MixSearchConfig
from qwen_ray.sweeps.simplex import Mix, Simplex
from qwen_ray.sweeps.space import WEIGHTS, Distribution

REFERENCE = 0
"""The index of the trial with the base run's own values and as much of each domain."""
PAGE = "docs/sweeps.md"


class MixtureConfig(Section):
    page: ClassVar[str] = PAGE
    domains: list[str] | None = None
    """The domains that are mixed. Default: those of the data files."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Least share of each domain."""
    ranges: dict[str, tuple[float, float]] = Field(default={})
    """Least and greatest share of a domain: [low, high]."""
    include: list[Literal["uniform", "current", "vertices"]] = Field(
        default=["uniform", "current", "vertices"]
    )
    """Mixtures to try before what the search proposes, with the base run's other values. uniform: as much of
    each, which is trial 0 in any case. current: the run's own data.weights. vertices: of each domain in turn
    as much as possible."""
    lattice: Annotated[int, Field(ge=1)] | None = None
    """grid: what is above the floors is dealt out in so many equal parts, in every way."""


class ConfirmConfig(Section):
    page: ClassVar[str] = PAGE
    suite: str = "tiny"
    """Suite of benchmarks (see `qwen-ray eval`)."""
    top: Annotated[int, Field(ge=1)] = 2
    """How many of the best trials are benchmarked."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] = 0.04
    """How far a strength's score may fall, as a share of 1."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Items of each task (all)."""
    data_dir: str | None = None
    """The suite's original files, where there is no hub."""


class ObjectiveConfig(Section):
    page: ClassVar[str] = PAGE
    targets: list[str] = Field(default=[])
    """Domains whose held-out loss is to fall; the gain is the mean over them. Default: all but strengths."""
    strengths: list[str] = Field(default=[])
    """Domains whose held-out loss must not rise."""
    tolerance: Annotated[float, Field(ge=0)] = 0.05
    """By how much a strength's loss may rise all the same, in nats a token."""
    confirm: ConfirmConfig | None = None
    """Benchmark the best trials before one of them wins. Default: held-out loss decides."""


class SearchConfig(Section):
    page: ClassVar[str] = PAGE
    name: Literal["random", "latin", "grid", "optuna"] = "random"
    """random: independent draws. latin: each key's range is covered evenly (a Latin hypercube), mixtures at
    random. grid: every combination. optuna: a model of what was reported, which knows
    the constraint: a Gaussian process where every trial runs to its end, else TPE (arXiv 2304.11127)."""
    trials: Annotated[int, Field(ge=1)] = 8
    """Trials in all: trial 0, the mixtures that are always tried, and what is searched."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides what is drawn; the trials' own seed is the run's."""


class StoppingConfig(Section):
    page: ClassVar[str] = PAGE
    name: Literal["halving", "asha", "none"] = "halving"
    """halving: the best of a rung go on, decided together. asha: the same one by one, as Ray Tune does it.
    none: every trial runs to its end."""
    eta: Annotated[float, Field(gt=1)] = 3
    """halving, asha: one of so many goes on."""
    rungs: list[float] | None = None
    """Where trials are evaluated, and perhaps stopped, as shares of a trial's own length. Default: 1/eta^2
    and 1/eta; for none only the end."""

    @field_validator("rungs")
    @classmethod
    def _ascend(cls, rungs: list[float] | None) -> list[float] | None:
        ends = [0.0, *(rungs or []), 1.0]
        if any(a >= b for a, b in pairwise(ends)):
            raise ValueError("rungs ascend, and lie between 0 and 1")
        return rungs


class TrialsConfig(Section):
    page: ClassVar[str] = PAGE
    kind: Literal["packed", "plain"] = "packed"
    """packed: LoRA trials share one base and one pass (docs/sweeps.md). plain: each is a run of its own."""
    slots: Annotated[int, Field(ge=1)] = 8
    """packed: trials in a pack. Also how many proposals are made together."""
    engines: Annotated[int, Field(ge=1)] = 1
    """packed: packs at a time, each with a base of its own."""
    cpus: Annotated[float, Field(gt=0)] = 2
    """packed: CPUs of an engine."""
    gpus: Annotated[float, Field(ge=0)] | None = None
    """packed: GPUs of an engine. Default: 1 if the cluster has one for each, else 0."""
    max_concurrent: Annotated[int, Field(ge=1)] | None = None
    """plain: trials at a time. Default: as many as the cluster has room for."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often what died is started again."""


class SweepConfig(Section):
    """Everything that decides a sweep."""

    page: ClassVar[str] = PAGE
    name: str = "sweep"
    """The name under which the winner is registered."""
    out: str = "runs/sweep"
    """The sweep's folder."""
    embedded_data: bool = False
    """Train on the embedded model's facts and replay records, written to OUT/data."""
    run: dict[str, Any] = Field(default={})
    """The run that every trial starts from: a configuration as for `qwen-ray train --config`."""
    space: dict[str, Distribution] = Field(default={})
    """What is searched: keys of the run's configuration and how their values are drawn."""
    mixture: MixtureConfig | None = None
    objective: ObjectiveConfig = ObjectiveConfig()
    search: SearchConfig = SearchConfig()
    stopping: StoppingConfig = StoppingConfig()
    trials: TrialsConfig = TrialsConfig()
    mix_search: MixSearchConfig | None = None

    def to_yaml(self) -> str:
        """The sweep as YAML, headed by the command that runs it."""
        body = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        return f"# qwen-ray sweep THIS_FILE\n{body}"

    @property
    def simplex(self) -> Simplex | None:
        """The mixtures to try, or None. Needs the domains (:func:`qwen_ray.sweeps.checks.check_domains`)."""
        if self.mixture is None:
            return None
        if self.mixture.domains is None:
            raise ValueError("the domains are not known yet: check_domains comes first")
        return Simplex(self.mixture.domains, self.mixture.floor, self.mixture.ranges)


def load_sweep(file: Path, *, sets: list[str] | None = None, out: Path | str | None = None) -> SweepConfig:
    """Read and check a sweep. ``sets``: ``key=value`` strings; ``out`` replaces the file's.

    Raises :class:`UserError` naming file, key and the nearest valid name.
    """
    from qwen_ray.sweeps.checks import check_domains, check_size, check_spec

    tree, origin = read_settings(file, flags={} if out is None else {"out": str(out)}, sets=sets)
    if isinstance(tree.get("space"), dict):
        tree["space"] = dict(_dotted(tree["space"]))
    spec = validate(SweepConfig, tree, where=str(file), origin=origin)
    try:
        check_spec(spec)
        domains = _embedded() if spec.embedded_data else spec.mixture and spec.mixture.domains
        if domains:
            return check_domains(spec, domains)
        # Else the data have to be read; they decide the size only where a mixture is searched.
        return check_size(spec) if spec.mixture is None or spec.mix_search is not None else spec
    except UserError as e:
        raise UserError(e.what, where=f"{file}: {e.where}", fix=e.fix) from None


def trial_config(spec: SweepConfig, values: Mapping[str, Any], *, out: Path | str) -> RunConfig:
    """The complete configuration of a trial: the base run with ``values``, by dotted key, into ``out``."""
    tree = deepcopy(spec.run)
    if spec.embedded_data:
        files = [str(Path(spec.out) / "data" / f"{domain}.jsonl") for domain in _embedded()]
        put(tree, "data.train", files, where="run.data")
    for key, value in {**values, "out": str(out)}.items():
        put(tree, key, value, where="run")
    return complete(tree, where="trial")


def points(spec: SweepConfig) -> list[float]:
    """The shares of its length at which a trial reports: the rungs, and 1."""
    stopping = spec.stopping
    if stopping.rungs is not None:
        return [*stopping.rungs, 1.0]
    return [1.0] if stopping.name == "none" else [stopping.eta**-2, 1 / stopping.eta, 1.0]


def reference(spec: SweepConfig) -> dict[str, Any]:
    """The values of trial 0: the base run's own for each key of the space, and the uniform mixture."""
    base = trial_config(spec, {}, out=spec.out).model_dump(mode="json")
    own = {key: get(base, key, None) for key in spec.space}
    values = {key: value for key, value in own.items() if value is not None}
    if spec.simplex is not None:
        values[WEIGHTS] = spec.simplex.uniform()
    return values


def included(spec: SweepConfig) -> list[tuple[dict[str, Any], str]]:
    """``(values, origin)`` of the trials that come before any search: the reference first."""
    base = reference(spec)
    found = [(base, "reference")]
    simplex, mixture = spec.simplex, spec.mixture
    if simplex is None or mixture is None:
        return found
    weights: Mix = trial_config(spec, {}, out=spec.out).data.weights
    if "current" in mixture.include and weights:
        total = sum(weights.values())
        found.append(
            ({**base, WEIGHTS: {d: weights.get(d, 0.0) / total for d in simplex.domains}}, "current")
        )
    if "vertices" in mixture.include:
        found += [({**base, WEIGHTS: mix}, f"vertex:{d}") for d, mix in simplex.vertices().items()]
    return found


def _embedded() -> tuple[str, ...]:
    from qwen_ray.tiny.facts import DOMAINS

    return (*DOMAINS, "replay")


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Sections within ``space`` as dotted keys; what is said of a key in two places is put together."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        section = isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values())
        for inner, settings in (_dotted(value, f"{key}.") if section else {key: value}).items():
            known = flat.get(inner)
            if isinstance(known, dict) and isinstance(settings, dict):
                settings = {**known, **settings}  # noqa: PLW2901
            flat[inner] = settings
    return flat
