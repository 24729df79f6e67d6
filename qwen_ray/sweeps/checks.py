"""What is refused of a sweep before anything starts, and why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_ray import combinations
from qwen_ray.config import RunConfig, fields, get
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation import suites
from qwen_ray.sweeps.space import WEIGHTS, Distribution, grid_size
from qwen_ray.sweeps.spec import ConfirmConfig, SweepConfig, included, trial_config
from qwen_ray.training import packed_checks


def check_spec(spec: SweepConfig) -> None:
    """Raise the first :class:`UserError` of what the file alone shows: keys and values that a run refuses,
    trials that could not be compared, a search or a pack that cannot be."""
    for refusals in (_run, _space, _search):
        for refusal in refusals(spec):
            raise refusal
    if spec.mix_search is not None:
        from qwen_ray.sweeps import mixsearch

        mixsearch.check(spec)


def check_domains(spec: SweepConfig, domains: Sequence[str]) -> SweepConfig:
    """The sweep with the domains that its data have, and ``search.trials`` no larger than a grid needs.

    Raises :class:`UserError` for mixtures, targets or strengths of other domains, bounds that no mixture
    keeps, and more trials always tried than there are to be.
    """
    mixture, objective = spec.mixture, spec.objective
    named = [
        *((f"objective.targets.{i}", d) for i, d in enumerate(objective.targets)),
        *((f"objective.strengths.{i}", d) for i, d in enumerate(objective.strengths)),
        *(("mixture.domains", d) for d in (mixture and mixture.domains) or ()),
        *(("run.data.weights", d) for d in get(spec.run, WEIGHTS, {})),
    ]
    for where, domain in named:
        if domain not in domains:
            raise UserError(
                f"no data has the domain '{domain}'", where=where, fix=did_you_mean(domain, domains)
            )
    if both := sorted({*objective.targets} & {*objective.strengths}):
        raise UserError(
            f"'{both[0]}' is a target and a strength", where="objective", fix="name it in one of them"
        )
    if not objective.targets and not set(domains) - {*objective.strengths}:
        raise UserError("every domain is a strength, so nothing can gain", where="objective.strengths")
    if mixture is not None:
        if missing := [d for d in domains if mixture.domains is not None and d not in mixture.domains]:
            raise UserError(
                f"the domain '{missing[0]}' has data and no place in the mixture",
                where="mixture.domains",
                fix="name it too, or leave its file out",
            )
        names = mixture.domains or sorted(domains)
        spec = spec.model_copy(update={"mixture": mixture.model_copy(update={"domains": names})})
    return check_size(spec)


def check_size(spec: SweepConfig) -> SweepConfig:
    """The sweep with ``search.trials`` no larger than a grid needs; :class:`UserError` where they are too
    few. Domains must be known where there is a mixture without a mix search."""
    # A mix search has mixtures of its own; it tries the space at the uniform one.
    searched = spec if spec.mix_search is None else spec.model_copy(update={"mixture": None})
    always = len(included(searched))
    size = always + _grid_size(searched) if spec.search.name == "grid" else spec.search.trials
    if always > spec.search.trials or size > spec.search.trials:
        what = f"{always} trials are always tried"
        what += f", and the grid has {size - always} points" if size > always else ""
        raise UserError(
            f"{what}: more than search.trials, {spec.search.trials}",
            where="search.trials",
            fix=f"search.trials={max(size, always)}, or a smaller grid or mixture.include",
        )
    return spec.model_copy(update={"search": spec.search.model_copy(update={"trials": size})})


def confirming_suite(confirm: ConfirmConfig) -> suites.Suite:
    """The suite that confirms. Raises :class:`UserError` where there is none, or none of it is a target."""
    key = "objective.confirm.suite"
    try:
        suite = suites.load(confirm.suite)
    except UserError as e:
        raise UserError(e.what, where=e.where.replace("--suite", key), fix=e.fix) from None
    if all(category.role != "target" for category in suite.categories):
        raise UserError(
            f"no category of the suite '{suite.name}' is a target, so no gain can be told",
            where=key,
            fix="a suite in which one has `role: target`, or no objective.confirm",
        )
    return suite


def check_benchmarks(confirm: ConfirmConfig) -> None:
    """Raise :class:`UserError` where ``data_dir`` is not there, or lacks a file that the suite reads."""
    if confirm.data_dir is None:
        return
    from qwen_ray.evaluation.questions import questions

    key, folder = "objective.confirm.data_dir", Path(confirm.data_dir)
    if not folder.is_dir():
        raise UserError(
            "no such folder",
            where=f"{key}: {folder}",
            fix="put the suite's original files there (docs/evaluation.md), or leave it out to use the hub",
        )
    try:
        questions(confirming_suite(confirm), folder, of=[])
    except UserError as e:
        raise UserError(e.what, where=f"{key}: {e.where}", fix=e.fix) from None


def _grid_size(spec: SweepConfig) -> int:
    size = grid_size(spec.space)
    if spec.simplex is not None and spec.mixture is not None and spec.mixture.lattice is not None:
        size *= sum(1 for _ in spec.simplex.lattice(spec.mixture.lattice))
    return size


def _run(spec: SweepConfig) -> Iterator[UserError]:
    base = _tried(spec, {})
    if isinstance(base, UserError):
        yield UserError(base.what, where=f"run: {base.where}" if base.where else "run", fix=base.fix)
        return
    if spec.embedded_data and get(spec.run, "data.train", None):
        yield UserError(
            "embedded_data and run.data.train both say what to train on",
            where="run.data.train",
            fix="give the one or the other",
        )
    if not base.data.train:
        yield UserError(
            "no training data", where="run.data.train", fix="name files, or set embedded_data: true"
        )
    if spec.mixture is not None and (base.data.stages or base.data.temperature is not None):
        name = "stages" if base.data.stages else "temperature"
        yield UserError(
            f"mixture and data.{name} both decide the shares",
            where=f"run.data.{name}",
            fix="leave one of them out",
        )
    if not base.data.validation and base.data.validation_fraction == 0:
        yield UserError(
            "trials are compared by held-out loss, and nothing is held out",
            where="run.data",
            fix="name data.validation files, or a data.validation_fraction above 0",
        )


# Keys that a space may not have, by how they begin, and why.
_SAME = "it decides which records are held out, and trials are compared on the same"
_REFUSED = {
    "out": "each trial has a folder of its own",
    "cluster.": "it decides where a trial runs, not what it learns",
    "tracking.": "it decides what is written down, not what is learned",
    "checkpoint.": "it decides what is kept, not what is learned",
    "evaluate.": "it decides what is measured, not what is learned",
    "data.train": _SAME,
    "data.validation": _SAME,
    "data.max_length": _SAME,
    "data.streaming": "it decides how records are read, not what is learned",
}
_SHARED = ("model.", "precision", "strategy.", "compute.")


def _space(spec: SweepConfig) -> Iterator[UserError]:
    known = dict(fields(RunConfig))
    base = trial_config(spec, {}, out=spec.out)
    refused = (
        _REFUSED if base.data.validation else {**_REFUSED, "seed": f"{_SAME} (data.validation files would)"}
    )
    for key, distribution in spec.space.items():
        where = f"space.{key}"
        whole = ".".join(key.split(".")[:2])  # the field; below it are the keys of a mapping
        if whole not in known or (whole != key and not str(known[whole].annotation).startswith("dict[")):
            yield UserError(f"unknown key '{key}'", where=where, fix=did_you_mean(key, known))
            continue
        for start, why in refused.items():
            if key.startswith(start):
                yield UserError(f"'{key}' cannot be searched: {why}", where=where, fix="set it in run")
        if spec.trials.kind == "packed" and key.startswith(_SHARED):
            yield UserError(f"the trials of a pack share one {key}", where=where, fix="trials.kind: plain")
        if spec.mixture is not None and whole == WEIGHTS:
            yield UserError(
                "space and mixture both decide the shares", where=where, fix="leave one of them out"
            )
        for value in _values(distribution):
            tried = _tried(spec, {key: value})
            if isinstance(tried, UserError):
                yield UserError(f"{key} = {value!r} is refused: {tried.what}", where=where, fix=tried.fix)


def _values(distribution: Distribution) -> list[Any]:
    """Values to try: every choice, or both ends and one between, which need not be a whole number."""
    return [*distribution.extremes, distribution.at(0.37)]


def _tried(spec: SweepConfig, values: Mapping[str, Any]) -> RunConfig | UserError:
    try:
        config = trial_config(spec, values, out=spec.out)
        (packed_checks if spec.trials.kind == "packed" else combinations).check(config)
    except UserError as e:
        return e
    return config


def _search(spec: SweepConfig) -> Iterator[UserError]:
    search, mixture = spec.search, spec.mixture
    if not spec.space and mixture is None and spec.mix_search is None:
        yield UserError("there is nothing to search", where="space", fix="give space, mixture or both")
    if search.name == "grid":
        for key, distribution in spec.space.items():
            if distribution.distribution != "choice" and distribution.points is None:
                yield UserError(
                    f"a grid needs to know how many values of {key} to try",
                    where=f"space.{key}.points",
                    fix="for example points: 3",
                )
        if mixture is not None and mixture.lattice is None and spec.mix_search is None:
            yield UserError(
                "a grid needs to know which mixtures to try",
                where="mixture.lattice",
                fix="for example lattice: 4, or search.name=random",
            )
    elif mixture is not None and mixture.lattice is not None:
        yield UserError("only a grid has a lattice", where="mixture.lattice", fix="search.name=grid")
