"""A sweep's folder: what is checked before it is used, and which sweep it is."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

from qwen_ray import __version__
from qwen_ray.config import put, read_settings, validate
from qwen_ray.errors import UserError
from qwen_ray.fsio import read_json, sha256_json, write_json, write_text
from qwen_ray.registry import NAME
from qwen_ray.sweeps.checks import check_domains
from qwen_ray.sweeps.spec import SweepConfig, trial_config
from qwen_ray.training.driver import absolute

SPEC, STATE, DATA = "sweep.yaml", "sweep.json", "data"
_STOPPING = {"packed": ("halving", "none"), "plain": ("asha", "none")}
"""Packed trials come to a rung together, plain ones one by one."""
# What may differ between two starts of one sweep: it decides nothing about the result.
_FREE: Any = {"out": True, "trials": {"cpus", "gpus", "max_concurrent", "max_failures"}}
_FREE_OF_RUN = ("cluster", "tracking", "checkpoint", "compute", "out")


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
    spec.out = str(Path(spec.out).expanduser().resolve())
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
    if not spec.embedded_data:
        put(spec.run, "data.train", base.data.train, where="run")
        put(spec.run, "data.validation", base.data.validation, where="run")
    put(spec.run, "model.name", base.model.name, where="run")
    confirm = spec.objective.confirm
    if confirm is not None:
        if confirm.data_dir is not None:
            confirm.data_dir = str(Path(confirm.data_dir).expanduser().resolve())
        if "/" in confirm.suite:
            confirm.suite = str(Path(confirm.suite).expanduser().resolve())
    return spec


def with_data(spec: SweepConfig) -> SweepConfig:
    """The sweep with its data: the embedded records written, the domains checked against what there is."""
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
    return spec


def check_state(out: Path, resume: bool) -> None:
    """Refuse a folder that holds a sweep, unless it is to be resumed, or anything else."""
    there = (out / STATE).is_file()
    if there and not resume:
        raise UserError(
            "this folder holds a sweep",
            where=str(out),
            fix="--resume goes on with it; or choose another --out",
        )
    if not there and out.is_dir() and {p.name for p in out.iterdir()} - {".lock", DATA}:
        raise UserError(
            "this folder holds something else than a sweep", where=str(out), fix="choose another --out"
        )


def open_sweep(out: Path, spec: SweepConfig) -> dict[str, Any]:
    """sweep.json, after making it or checking that the folder's sweep is this one."""
    if (out / STATE).is_file():
        tree, _ = read_settings(out / SPEC)
        if _decides(validate(SweepConfig, tree, where=str(out / SPEC), origin={})) != _decides(spec):
            raise UserError(
                "this folder holds another sweep",
                where=str(out / SPEC),
                fix="resume with the file it was started with, or choose another --out",
            )
        write_text(out / SPEC, spec.to_yaml())  # what decides nothing may have changed
        return dict(read_json(out / STATE))
    write_text(out / SPEC, spec.to_yaml())
    sweep = {"id": uuid.uuid4().hex[:12], "state": "new", "version": __version__}
    write_json(out / STATE, sweep)
    return sweep


def _decides(spec: SweepConfig) -> str:
    tree = spec.model_dump(mode="json", exclude=_FREE)
    tree["run"] = {key: value for key, value in tree["run"].items() if key not in _FREE_OF_RUN}
    return sha256_json(tree)
