"""A sweep's folder: what is checked before it is used, and which sweep it is."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from qwen_ray import __version__, models
from qwen_ray.config import get, put, read_settings, validate
from qwen_ray.errors import UserError
from qwen_ray.evaluation import suites
from qwen_ray.fsio import read_json, sha256_file, sha256_json, whole_path, write_json, write_text
from qwen_ray.registry import NAME
from qwen_ray.sweeps.checks import check_benchmarks, check_domains, confirming_suite
from qwen_ray.sweeps.spec import SweepConfig, trial_config
from qwen_ray.training.driver import PATHS, absolute

SPEC, STATE, DATA = "sweep.yaml", "sweep.json", "data"
_STOPPING = {"packed": ("halving", "none"), "plain": ("asha", "none")}
"""Packed trials come to a rung together, plain ones one by one."""
# What may differ between two starts of one sweep: it decides nothing about the result.
_FREE: Any = {"out": True, "trials": {"cpus", "gpus", "max_concurrent", "max_failures"}}
_FREE_OF_RUN = ("cluster", "tracking", "checkpoint", "compute", "out")
_FREE_TILL_BENCHMARKED = {"suite", "data_dir", "limit"}
"""Of objective.confirm: free as long as no benchmark's result is recorded."""
SOURCES = "sources"
"""In sweep.json: hash by name of what the sweep reads."""


def prepared(spec: SweepConfig) -> SweepConfig:
    """The sweep with whole paths, for trials run in folders of their own; refuses what cannot be run."""
    if not NAME.fullmatch(spec.name):
        raise UserError(
            f"'{spec.name}' is not an adapter name, and the winner is registered under it",
            where="name",
            fix="at most 64 lower-case letters, digits, '.', '_', '-', the first a letter or digit",
        )
    if "://" in spec.out:
        raise UserError("a sweep's folder is local or mounted", where="out", fix="give a path, not a URI")
    spec = spec.model_copy(deep=True)
    spec.out = whole_path(spec.out)
    kind, stopping = spec.trials.kind, spec.stopping.name
    if stopping not in _STOPPING[kind]:
        raise UserError(
            f"{stopping} does not stop {kind} trials",
            where="stopping.name",
            fix=f"stopping.name={' or '.join(_STOPPING[kind])}",
        )
    base = absolute(trial_config(spec, {}, out=spec.out))
    if base.cluster.labels and (kind == "packed" or not base.cluster.workers):
        raise UserError(
            "labels choose the nodes of workers, and these trials have none",
            where="run.cluster.labels",
            fix="trials.kind=plain with run.cluster.workers=1 or more, or leave the labels out",
        )
    settings = base.model_dump(mode="json")
    for key in PATHS:
        value = get(settings, key, None)
        if value and not (spec.embedded_data and key.startswith("data.")):
            put(spec.run, key, value, where="run")
    confirm = spec.objective.confirm
    if confirm is not None:
        if confirm.data_dir is not None:
            confirm.data_dir = whole_path(confirm.data_dir)
        confirm.suite = suites.lasting(confirm.suite)
        confirming_suite(confirm)
    return spec


def with_data(spec: SweepConfig) -> tuple[SweepConfig, dict[str, str]]:
    """The sweep with its data: the embedded records written, domains and benchmarks checked against what
    there is; and the SHA-256 of each data file, and the fingerprint of each base that is a folder."""
    from qwen_ray.data.dataset import load_splits
    from qwen_ray.data.stream import RecordFiles

    if spec.embedded_data:
        from qwen_ray.demo import write_data

        write_data(Path(spec.out) / DATA)
    base = trial_config(spec, {}, out=spec.out)
    train, validation = load_splits(base.data, seed=base.seed)
    domains = train.domains if isinstance(train, RecordFiles) else {record.domain for record in train}
    spec = check_domains(spec, sorted(domains))
    held = {record.domain for record in validation}
    judged = [*spec.objective.targets, *spec.objective.strengths]
    if missing := [domain for domain in judged if domain not in held]:
        raise UserError(
            f"no record of the domain '{missing[0]}' is held out, so its loss is not known",
            where="run.data",
            fix="a larger data.validation_fraction, or data.validation files that have it",
        )
    if not held - {*spec.objective.strengths}:
        raise UserError(
            "no record of a target is held out, so no gain can be told",
            where="run.data",
            fix="a larger data.validation_fraction, or data.validation files that have one",
        )
    if spec.objective.confirm is not None:
        check_benchmarks(spec.objective.confirm)
    digests = (
        train.digests if isinstance(train, RecordFiles) else map(sha256_file, map(Path, base.data.train))
    )
    sources = dict(zip(base.data.train, digests, strict=True))
    sources |= {path: sha256_file(Path(path)) for path in base.data.validation}
    return spec, sources | _bases(spec, base.model.name)


def _bases(spec: SweepConfig, name: str) -> dict[str, str]:
    """Of models on the hub none is taken: that might download them to a node that does not train."""
    tried = spec.space["model.name"].values if "model.name" in spec.space else []
    refs = {base: models.resolve(base) for base in [name, *tried]}
    return {base: models.fingerprint(ref) for base, ref in refs.items() if ref.is_local}


def check_state(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a sweep, unless it is to be resumed, or anything else."""
    there = (out / STATE).is_file()
    if there and not resume:
        raise UserError(
            "this folder holds a sweep",
            where=str(out),
            fix="--resume goes on with it; or choose another --out",
        )
    # A start that was killed may have left the temporary file of the state.
    names = {p.name for p in out.iterdir() if not p.name.startswith(f".{STATE}.")} if out.is_dir() else set()
    if not there and names - {".lock", DATA}:
        raise UserError(
            "this folder holds something else than a sweep", where=str(out), fix="choose another --out"
        )


def open_sweep(out: Path, spec: SweepConfig, sources: dict[str, str]) -> dict[str, Any]:
    """sweep.json, after making it or checking that the folder's sweep is this one, of the same data and
    base. ``sources``: as :func:`with_data` returns them."""
    sweep: dict[str, Any] = dict(read_json(out / STATE)) if (out / STATE).is_file() else {"state": "new"}
    if sweep["state"] != "new" or (out / SPEC).is_file():
        from qwen_ray.sweeps.outcome import EVAL

        tree, _ = read_settings(out / SPEC)
        before = validate(SweepConfig, tree, where=str(out / SPEC), origin={})
        benchmarked = any((out / EVAL).glob("*.json"))
        if _decides(before, benchmarked=benchmarked) != _decides(spec, benchmarked=benchmarked):
            raise UserError(
                "this folder holds another sweep",
                where=str(out / SPEC),
                fix="resume with the file it was started with, or choose another --out",
            )
        known = sweep.setdefault(SOURCES, sources)  # a sweep of an earlier version did not record them
        if changed := [name for name, found in sources.items() if known.get(name, found) != found]:
            raise UserError(
                "it has changed since the sweep began, so its trials could not be compared",
                where=changed[0],
                fix="put back what was there, or choose another --out",
            )
        write_text(out / SPEC, spec.to_yaml())  # what decides nothing may have changed
        return sweep
    # The state first: a folder with the file alone would pass for one that is no sweep's.
    sweep = {"id": uuid.uuid4().hex[:12], "state": "new", "version": __version__, SOURCES: sources}
    write_json(out / STATE, sweep)
    write_text(out / SPEC, spec.to_yaml())
    return sweep


def _decides(spec: SweepConfig, *, benchmarked: bool) -> str:
    free = _FREE if benchmarked else {**_FREE, "objective": {"confirm": _FREE_TILL_BENCHMARKED}}
    tree = spec.model_dump(mode="json", exclude=free)
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in _FREE_OF_RUN}
    return sha256_json(tree)
