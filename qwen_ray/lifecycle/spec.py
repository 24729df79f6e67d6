"""PipelineSpec: the typed tree that says what a pipeline collects, trains, measures and promotes.

Everything that can be known from the file is checked when it is read, so that no run stops half-way over a
misspelt key. Unknown keys are refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from qwen_ray import models
from qwen_ray.config import RunConfig, Section, complete, get, put, read_settings, validate
from qwen_ray.data.preparation.prepare import PrepareConfig
from qwen_ray.data.sources import get_source
from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.evaluation import suites
from qwen_ray.evaluation.gate import Gate
from qwen_ray.fsio import whole_path
from qwen_ray.registry import NAME
from qwen_ray.storage import is_uri
from qwen_ray.sweeps.spec import SweepConfig, load_sweep

PAGE = "docs/pipeline.md"
Count = Annotated[int, Field(ge=1)]
REMOTE = ("prepare", "train", "sweep")
"""Stages that can be Ray jobs."""


class EndpointConfig(Section):
    page: ClassVar[str] = PAGE
    url: str | None = None
    """A running server with the same registry, asked for the scores. Default: the pipeline starts one for the
    time of the benchmark. Its key: $QWEN_RAY_API_KEY."""
    serve: dict[str, Any] = Field(default={})
    """Settings of the server that is started, as for `qwen-ray serve --config`; not model and registry."""
    address: str | None = None
    """Ray cluster that it is started on. Default: $RAY_ADDRESS, else one on this machine."""


class BenchmarkConfig(Section):
    page: ClassVar[str] = PAGE
    suites: Annotated[list[str], Field(min_length=1)]
    """Suites of benchmarks (see `qwen-ray eval`). Production and the candidate answer the same items."""
    limit: Count | None = None
    """Items of each task (all)."""
    num_fewshot: Annotated[int, Field(ge=0)] | None = None
    """Solved examples in the prompt (the suite's own)."""
    data_dir: str | None = None
    """The suites' original files, where there is no hub."""
    concurrency: Count = 4
    """Requests to the endpoint at a time."""
    targets: list[str] | None = None
    """Categories that must gain; the others must not lose. Default: as each suite says."""
    latency_requests: Count = 40
    """With gate.max_latency_ratio: requests of each model that are timed."""


class KnowledgeConfig(Section):
    page: ClassVar[str] = PAGE
    root: str = "knowledge"
    """Folder or URI of the knowledge bases."""
    bases: Annotated[dict[str, dict[str, str | list[str]]], Field(min_length=1)]
    """Sources of each base: KIND: PATH, as `qwen-ray kb update --source KIND=PATH` takes them."""
    license: str = "unknown"
    """Of text sources."""
    embedder: str | None = None
    """Embedding model of a base that is made anew (all-MiniLM-L6-v2)."""


class RunOnConfig(Section):
    page: ClassVar[str] = PAGE
    address: str
    """The cluster's job server, http://HEAD:8265. Its token is found as Ray finds it."""
    stages: Annotated[list[Literal["prepare", "train", "sweep"]], Field(min_length=1)]
    """Stages that run there, each as a job of its own. The work folder must be mounted there too."""
    python: str = "python"
    """The nodes' interpreter that has qwen-ray."""


class PipelineSpec(Section):
    """Everything that decides a pipeline."""

    page: ClassVar[str] = PAGE
    name: str
    """The adapter's name in the registry; what it answers to on the API."""
    registry: str = "registry"
    """Folder or URI of the registry."""
    work: str = "runs/pipeline"
    """Folder of collected and prepared data, training runs and results."""
    state: str | None = None
    """Folder or URI where it is written down what is done (WORK/state)."""
    data: dict[str, dict[str, Any]] = Field(default={})
    """Data of each domain: keys as for `qwen-ray data prepare --config`, but domain and out. Paths may hold
    wildcards, and name folders of object stores."""
    embedded_data: bool = False
    """Train on the embedded model's facts and replay records."""
    train: dict[str, Any] | None = None
    """The training run, as for `qwen-ray train --config`, without data.train and out. Instead of sweep."""
    sweep: str | None = None
    """Sweep (YAML) whose winner is the candidate; it is given the data and a folder. Instead of train."""
    endpoint: EndpointConfig = EndpointConfig()
    benchmark: BenchmarkConfig
    gate: Gate = Gate()
    promote: Literal["at once", "by hand"] = "at once"
    """After the verdict promote. by hand: the version stays the candidate, for a canary or a person."""
    keep: Annotated[int, Field(ge=0)] = 0
    """How many versions that were in production before are not archived."""
    knowledge: KnowledgeConfig | None = None
    """Knowledge bases that are brought up to date first."""
    run_on: RunOnConfig | None = None
    """Stages that run as Ray jobs."""
    lease_seconds: Annotated[float, Field(ge=1)] = 60
    """How long a run that died on another machine keeps the next one out."""

    @classmethod
    def read(cls, file: Path | str, *, sets: list[str] | None = None) -> PipelineSpec:
        """From a YAML file, with whole paths; ``sets``: ``key=value`` over it.

        Raises :class:`UserError` naming the file, the key and the nearest valid name.
        """
        tree, origin = read_settings(Path(file), sets=sets)
        spec = validate(cls, tree, where=str(file), origin=origin)
        try:
            spec = spec._absolute()
            spec._check()
        except UserError as e:
            raise UserError(e.what, where=f"{file}: {e.where}" if e.where else str(file), fix=e.fix) from None
        return spec

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages of a run, in order."""
        knowledge = ("knowledge",) if self.knowledge else ()
        making = "sweep" if self.sweep else "train"
        measuring = ("register", "deploy", "benchmark", "compare", "promote", "archive")
        return ("collect", *knowledge, "prepare", making, *measuring)

    @property
    def model(self) -> models.ModelRef:
        """The base model."""
        run = self.sweep_spec().run if self.sweep else self.train or {}
        return models.resolve(str(run.get("model", {}).get("name", "tiny")))

    def folder(self, *parts: str) -> Path:
        """A path below the work folder."""
        return Path(self.work, *parts)

    def prepare_config(self, domain: str, sources: dict[str, list[str]], out: Path) -> PrepareConfig:
        """What prepares a domain's data from ``sources``, the paths of each source by its name."""
        tree = {**self.data[domain], "sources": sources, "domain": domain, "out": str(out)}
        return validate(PrepareConfig, tree, where=f"data.{domain}", origin={})

    def train_config(self, data: list[str], out: Path) -> RunConfig:
        """The training run on ``data``."""
        tree = deepcopy(self.train or {})
        put(tree, "data.train", data, where="train")
        put(tree, "out", str(out), where="train")
        return complete(tree, where="train")

    def sweep_spec(self, data: Sequence[str] = ("data",)) -> SweepConfig:
        """The sweep of the file, on ``data``; on its own if it is of the embedded model's."""
        assert self.sweep is not None
        given = [] if self.embedded_data else [f"run.data.train={json.dumps(list(data))}"]
        return load_sweep(Path(self.sweep), sets=given)

    @field_validator("name")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("not an adapter name: lower-case letters, digits, dot, dash, underscore")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> PipelineSpec:
        if (self.train is None) == (self.sweep is None):
            raise ValueError("give either train or sweep")
        if not self.data and not self.embedded_data:
            raise ValueError("no data: give data, or embedded_data: true")
        if self.run_on and (unused := [stage for stage in self.run_on.stages if stage not in self.stages]):
            raise ValueError(f"run_on.stages: this pipeline has no stage {unused[0]}")
        return self

    def _absolute(self) -> PipelineSpec:
        """With whole paths: a stage may run elsewhere, and what it leaves is found again by them."""
        spec = self.model_copy(deep=True)
        spec.work = _whole(spec.work)
        spec.state = str(Path(spec.work) / "state") if spec.state is None else _whole(spec.state)
        spec.registry = _whole(spec.registry)
        if spec.sweep:
            spec.sweep = _whole(spec.sweep)
        name = str(get(spec.train or {}, "model.name", ""))
        if "/" in name and Path(name).is_dir():
            put(spec.train or {}, "model.name", _whole(name), where="train")
        bench = spec.benchmark
        bench.suites = [suites.lasting(suite) for suite in bench.suites]
        bench.data_dir = bench.data_dir and _whole(bench.data_dir)
        for settings in spec.data.values():
            if isinstance(settings.get("benchmarks"), str):
                settings["benchmarks"] = _whole(settings["benchmarks"])
            if isinstance(settings.get("heldout"), list):
                settings["heldout"] = [_whole(str(path)) for path in settings["heldout"]]
        if spec.knowledge:
            spec.knowledge.root = _whole(spec.knowledge.root)
        return spec

    def _check(self) -> None:
        """Every part in its own terms."""
        from qwen_ray.serving.settings import ServeSettings

        if is_uri(self.work):
            raise UserError("the work folder is local or mounted", where="work", fix="give a path, not a URI")
        for domain, settings in self.data.items():
            for taken in ("domain", "out"):
                if taken in settings:
                    raise _decided(f"data.{domain}.{taken}")
            prepared = self.prepare_config(domain, settings.get("sources", {}), self.folder())
            for source in prepared.sources:
                get_source(source)
        if self.sweep:
            self._check_sweep(self.sweep_spec())
        else:
            config = self.train_config(["data"], self.folder("train"))
            if config.method.name == "full":
                raise UserError(
                    "the registry holds adapters, and this trains every weight",
                    where="train.method.name",
                    fix="lora or qlora",
                )
            for key in ("data.train", "out"):
                if get(self.train or {}, key, None) is not None:
                    raise _decided(f"train.{key}")
        self._check_targets()
        for taken in ("model", "registry"):
            if taken in self.endpoint.serve:
                raise _decided(f"endpoint.serve.{taken}")
        ServeSettings.of({"model": self.model.location, **self.endpoint.serve})

    def _check_sweep(self, sweep: SweepConfig) -> None:
        if sweep.name != self.name:
            raise UserError(
                f"the sweep '{sweep.name}' is not named as the pipeline, '{self.name}'",
                where=str(self.sweep),
                fix="give both the same name",
            )
        method = sweep.run.get("method", {}).get("name", "lora")
        if method == "full" or "method.name" in sweep.space:
            raise UserError(
                "the registry holds adapters, and this sweep trains every weight, or may",
                where=str(self.sweep),
                fix="run.method.name: lora",
            )
        if sweep.embedded_data != self.embedded_data:
            raise UserError(
                "pipeline and sweep disagree about embedded_data",
                where=str(self.sweep),
                fix="the same in both",
            )

    def _check_targets(self) -> None:
        known = {
            category.name
            for suite in self.benchmark.suites
            for category in suites.load(suite).categories
            if category.role != "control"
        }
        for target in self.benchmark.targets or ():
            if target not in known:
                fix = did_you_mean(target, known)
                raise UserError(f"unknown category '{target}'", where="benchmark.targets", fix=fix)


def _decided(key: str) -> UserError:
    return UserError("the pipeline decides this", where=key, fix="remove it")


def _whole(location: str) -> str:
    return location if is_uri(location) else whole_path(location)
