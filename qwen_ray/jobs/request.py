"""What the arguments of a verb mean for a job: where it writes, what it reads, what room it asks for."""

from __future__ import annotations

import argparse
import io
import json
import posixpath
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError
from qwen_ray.jobs.package import Package

if TYPE_CHECKING:
    from qwen_ray.config import ClusterConfig
    from qwen_ray.sweeps.spec import SweepConfig

VERBS = ("train", "sweep", "eval", "pipeline")
JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}")


@dataclass(frozen=True)
class Room:
    """``count`` processes with so many CPUs and GPUs each, at one time."""

    count: int
    cpus: float
    gpus: float
    what: str
    """The setting that asks for them."""


@dataclass(frozen=True)
class Request:
    """A verb with its arguments, read and checked."""

    verb: str
    argv: tuple[str, ...]
    """The verb's own arguments."""
    out: str | None
    """Where it writes, on storage that the nodes mount."""
    inputs: tuple[str, ...] = ()
    """Paths that it reads."""
    room: tuple[Room, ...] = ()
    computes: bool = False
    """Whether the entry point itself runs a model, not processes that it starts on the cluster."""
    where: str = "--out"
    """The setting that says ``out``."""
    again: bool = False
    """Whether the same command has something new to do after it has ended well."""

    @property
    def default_name(self) -> str:
        ending = Path(self.out).name if self.out else ""
        return re.sub(r"[^A-Za-z0-9_]+", "-", f"{self.verb}-{ending.removesuffix('.json')}").strip("-")[:80]


def read(verb: str, argv: Sequence[str], parser: argparse.ArgumentParser) -> Request:
    """Read a verb's arguments as the verb itself does. What its parser does not take ends the process with
    exit code 2, as there; :class:`UserError` for what the verb or a job of it could not do."""
    args = parser.parse_args(list(argv))
    given = tuple(argument for argument in argv if argument != "--json")
    if getattr(args, "dry_run", False):
        raise UserError("a dry run needs no cluster", where="--dry-run", fix=f"qwen-ray {verb} ... --dry-run")
    return {"train": _train, "sweep": _sweep, "eval": _eval, "pipeline": _pipeline}[verb](given, args)


def _train(argv: tuple[str, ...], args: argparse.Namespace) -> Request:
    from qwen_ray.config import RunConfig
    from qwen_ray.verbs import Output

    printed = io.StringIO()
    args.dry_run = True
    args.verb(args, Output(printed, as_json=True))
    config = RunConfig.model_validate(json.loads(printed.getvalue()))
    asked = config.cluster
    if asked.workers == 0:
        raise UserError(
            "without workers the entry point would train, on whatever node it is",
            where="cluster.workers",
            fix="--workers 1 or more",
        )
    if asked.address is not None:
        raise UserError(
            "a job joins the cluster that it is on", where="cluster.address", fix="leave the key out"
        )
    inputs = [args.config] if args.config else []
    return Request(
        "train", argv, config.out, (*inputs, *_run_inputs(config.model_dump())), (_workers(asked),)
    )


def _workers(asked: ClusterConfig) -> Room:
    """The fewest workers that a run begins with."""
    fewest = asked.min_workers or asked.workers or 1
    return Room(fewest, asked.cpus_per_worker, asked.gpus_per_worker or 0, "cluster.workers")


def _run_inputs(config: dict[str, Any]) -> list[str]:
    """The paths that the configuration of a run names."""
    evaluate, data = config["evaluate"], config["data"]
    suites = [suite for suite in evaluate["suites"] if "/" in suite]
    local = [evaluate["suites_data_dir"]] if evaluate["suites_data_dir"] else []
    return [*data["train"], *data["validation"], *suites, *local, *_model_folder(config["model"]["name"])]


def _model_folder(name: str | None) -> list[str]:
    """The model if it is a folder, or looks like the path of one."""
    looks = name is not None and (name.startswith((".", "/", "~")) or Path(name).is_dir())
    return [str(name)] if looks else []


def _sweep(argv: tuple[str, ...], args: argparse.Namespace) -> Request:
    from qwen_ray.sweeps.spec import load_sweep, trial_config

    spec = load_sweep(Path(args.file), sets=args.set, out=args.out)
    if args.registry:
        _keep(args.registry, "--registry")
    run = trial_config(spec, {}, out=spec.out)
    inputs = [args.file, *_model_folder(run.model.name)]
    if not spec.embedded_data:
        inputs = [args.file, *_run_inputs(run.model_dump())]
    if (confirm := spec.objective.confirm) is not None:
        inputs += [p for p in (confirm.data_dir, confirm.suite if "/" in confirm.suite else None) if p]
    return Request("sweep", argv, spec.out, tuple(inputs), _sweep_room(spec))


def _sweep_room(spec: SweepConfig) -> tuple[Room]:
    from qwen_ray.sweeps.spec import trial_config

    trials = spec.trials
    if trials.kind == "packed":
        return (Room(trials.engines, trials.cpus, trials.gpus or 0, "trials.engines"),)
    return (_workers(trial_config(spec, {}, out=spec.out).cluster),)


def _eval(argv: tuple[str, ...], args: argparse.Namespace) -> Request:
    if args.api_key:
        raise UserError(
            "a key in a job's command could be read by everybody who may list the cluster's jobs",
            where="--api-key",
            fix="--env QWEN_RAY_API_KEY, with the key on the nodes",
        )
    inputs = [p for p in (args.adapter, args.data_dir, args.suite if "/" in args.suite else None) if p]
    if not args.endpoint:
        inputs += _model_folder(args.model)
    return Request("eval", argv, args.out, tuple(inputs), computes=not args.endpoint)


def _pipeline(argv: tuple[str, ...], args: argparse.Namespace) -> Request:
    from qwen_ray.config import get, read_settings
    from qwen_ray.lifecycle.spec import KnowledgeConfig, PipelineSpec
    from qwen_ray.sweeps.spec import trial_config

    if argv[0] != "run":
        raise UserError(
            "only `pipeline run` is work for a cluster",
            where=f"pipeline {argv[0]}",
            fix=f"qwen-ray {shlex.join(['pipeline', *argv])}, where the pipeline's storage is mounted",
        )
    spec = PipelineSpec.read(args.file, sets=args.set)
    given, _ = read_settings(Path(args.file), sets=args.set)  # the paths as written, not as they are here
    fields = PipelineSpec.model_fields
    kept = {"registry": given.get("registry", fields["registry"].default), "state": given.get("state")}
    if spec.knowledge is not None:
        root = KnowledgeConfig.model_fields["root"].default
        kept["knowledge.root"] = get(given, "knowledge.root", root)
    for key, path in kept.items():
        if path is not None:
            _keep(str(path), f"{args.file}: {key}")
    work = str(given.get("work", fields["work"].default))
    if spec.sweep is None:
        model = get(given, "train.model.name", None)
        asked = spec.train_config(["data"], spec.folder("train")).cluster
        room: tuple[Room, ...] = (_workers(asked),)
    else:
        made = spec.sweep_spec()
        model, room = trial_config(made, {}, out=made.out).model.name, _sweep_room(made)
    inputs = (args.file, *_pipeline_inputs(given), *_model_folder(model))
    return Request("pipeline", argv, work, inputs, room, where=f"{args.file}: work", again=True)


def _pipeline_inputs(given: dict[str, Any]) -> list[str]:
    """The paths that a pipeline's settings name, but the model."""
    from qwen_ray.config import get
    from qwen_ray.retrieval.documents import EMBEDDED

    bench = given["benchmark"]
    named = [given.get("sweep"), bench.get("data_dir"), *(suite for suite in bench["suites"] if "/" in suite)]
    for domain in given.get("data", {}).values():
        named += [domain.get("benchmarks"), *domain.get("heldout", ())]
        named += _paths(domain.get("sources", {}).values())
    for sources in get(given, "knowledge.bases", {}).values():
        named += _paths(paths for kind, paths in sources.items() if kind != EMBEDDED)
    return [str(path) for path in named if path]


def _paths(sources: Iterable[str | Sequence[str]]) -> list[str]:
    """Of sources, each with one path or several; of a path with wildcards the part before them."""
    return [
        _before_wildcards(path)
        for paths in sources
        for path in ([paths] if isinstance(paths, str) else paths)
    ]


def _before_wildcards(path: str) -> str:
    parts = path.split("/")
    first = next((n for n, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    return "/".join(parts[:first]) or "."


def check_out(request: Request) -> None:
    """Refuse what would be written into the job's own folder, which is on one node and is not kept."""
    if request.out is not None:
        _keep(request.out, request.where)


def _keep(path: str, where: str) -> None:
    if "://" in path or Path(path).is_absolute():
        return
    raise UserError(
        f"'{path}' would be in the job's own folder, which is on one node and is not kept",
        where=where,
        fix=f"an absolute path on storage that every node mounts, such as /mnt/shared/{path}",
    )


def sent_inputs(request: Request) -> list[str]:
    """The inputs that go with the job, normalised: those with a relative path."""
    return [posixpath.normpath(p) for p in request.inputs if "://" not in p and not p.startswith(("/", "~"))]


def check_inputs(request: Request, package: Package) -> list[str]:
    """Refuse inputs that the job will not find; returns what must be said about others."""
    notes = []
    for path in dict.fromkeys(request.inputs):
        if "://" in path:
            continue
        if path.startswith(("/", "~")):
            if Path(path).expanduser().exists():
                notes.append(f"{path} is not sent: it is there only if every node mounts it")
            continue
        inside = posixpath.normpath(path)
        if package.holds(inside):
            continue
        if not Path(path).exists():
            raise UserError("no such file or folder", where=path, fix="check the path")
        why = "outside the current folder" if inside.startswith("..") else "ignored by git, or left out"
        raise UserError(
            f"it will not be there: it is {why}, so it does not go with the job",
            where=path,
            fix="put it on storage that every node mounts and give that path; small files: let git keep them",
        )
    return notes
