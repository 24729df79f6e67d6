"""What a stage of a pipeline is, and those that are about data: collect, knowledge, prepare.

A stage is a function of its inputs, which are small and JSON: settings, versions and hashes of what the
stages before it left. With inputs that were worked on before, and what was made of them still there, nothing
is done again. Killed in the middle of its work, a stage is started again and goes on from what it finds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray import __version__
from qwen_ray.data.preparation import prepare as preparation
from qwen_ray.fsio import beside, sha256_json
from qwen_ray.lifecycle import collect as sources
from qwen_ray.lifecycle.spec import PipelineSpec
from qwen_ray.lifecycle.state import State, digest, hashes
from qwen_ray.registry import AdapterVersion, Registry

if TYPE_CHECKING:
    from qwen_ray.lifecycle.lease import Lease
    from qwen_ray.lifecycle.served import Served
    from qwen_ray.lifecycle.state import Run

Json = dict[str, Any]


@dataclass
class Context:
    """What a stage works with. ``outputs``: of the stages before it, by name."""

    spec: PipelineSpec
    state: State
    registry: Registry
    run: Run
    note: Callable[[str], None]
    reached: Callable[[str], None]
    """Told where the work is: for tests that end the process there."""
    lease: Lease
    served: Served
    outputs: dict[str, Json] = field(default_factory=dict)

    @property
    def version(self) -> AdapterVersion:
        """The registered candidate."""
        return self.registry.get(self.spec.name, int(self.outputs["register"]["version"]))

    @property
    def baseline(self) -> int | None:
        """The version in production when the run began; None: the base model answers."""
        at = self.run.baseline.rpartition("@")[2]
        return int(at) if "@" in self.run.baseline else None

    @property
    def by(self) -> str:
        """Who moves aliases, as the registry's events name it."""
        return f"pipeline run {self.run.id}"


@dataclass(frozen=True)
class Made:
    """What a stage made: what the next ones need, and the SHA-256 of each file."""

    outputs: Json
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """``inputs`` decide what ``work`` makes. ``shared``: what another run made of the same inputs will do;
    else the stage does something to the registry, once a run."""

    name: str
    inputs: Callable[[Context], Json]
    work: Callable[[Context, Json], Made]
    shared: bool = True


# -- collect


def collect_inputs(context: Context) -> Json:
    items = [_told(item) for item in sources.look(context.spec)]
    return {"items": items, "embedded": __version__ if context.spec.embedded_data else None}


def _told(item: sources.Item) -> list[str]:
    return [item.domain, item.source, item.sha256 or item.path, Path(item.path).name]


def collect(context: Context, inputs: Json) -> Made:
    domains: dict[str, dict[str, list[str]]] = {}
    copies = []
    items = list(sources.look(context.spec))
    if [_told(item) for item in items] != inputs["items"]:
        raise RuntimeError("the sources changed while they were read")
    for item in items:
        path = item.path
        if item.sha256 is not None:
            copies.append(sources.copy(context.spec, item))
            path = str(copies[-1])
            context.reached("collect: copied")
        domains.setdefault(item.domain, {}).setdefault(item.source, []).append(path)
    embedded: list[str] = []
    if context.spec.embedded_data:
        from qwen_ray.demo import write_data

        written = write_data(context.spec.folder(sources.COLLECTED, f"embedded-{__version__}"))
        embedded = [str(path) for path in written]
    return Made({"domains": domains, "embedded": embedded}, hashes(*copies, *map(Path, embedded)))


# -- knowledge


def knowledge_inputs(context: Context) -> Json:
    """Of the run alone: the sources are looked at by the update, which does nothing where nothing changed."""
    assert context.spec.knowledge is not None
    return {"run": context.run.id, "settings": context.spec.knowledge.model_dump(mode="json")}


def knowledge(context: Context, inputs: Json) -> Made:
    from qwen_ray.embedder import Embedder
    from qwen_ray.retrieval.build import build, update
    from qwen_ray.retrieval.documents import EMBEDDED, TEXT, Origin
    from qwen_ray.retrieval.store import Store

    settings = context.spec.knowledge
    assert settings is not None
    store, versions = Store(settings.root), {}
    known = store.names() if store.there else []
    for name, kinds in sorted(settings.bases.items()):
        origins = []
        for kind, paths in sorted(kinds.items()):
            license = {"license": settings.license} if kind == TEXT else {}
            for path in [paths] if isinstance(paths, str) else paths:
                where = path if kind == EMBEDDED else str(Path(path).resolve())
                origins.append(Origin(kind, where, **license))
        if name in known:
            embedder = Embedder.load(store.open(name).manifest.embedder_name)
            manifest = update(store, name, embedder, origins=origins)
        else:
            manifest = build(store, name, origins, Embedder.load(settings.embedder))
        versions[name] = manifest.version
        context.note(f"knowledge base {name}: version {manifest.version}, {manifest.chunks} passages")
        context.reached("knowledge: updated")
    return Made({"versions": versions})


# -- prepare


def prepare_inputs(context: Context) -> Json:
    spec, collected = context.spec, context.outputs["collect"]
    domains = {}
    for domain, by_source in collected["domains"].items():
        config = spec.prepare_config(domain, by_source, spec.folder())
        kept_apart = [config.benchmarks, *config.heldout]
        domains[domain] = {
            "settings": config.decides(),
            "sources": {name: [_content(path) for path in paths] for name, paths in by_source.items()},
            "kept_apart": [digest(Path(path)) for path in kept_apart if path],
        }
    embedded = [digest(Path(path)) for path in collected["embedded"]]
    return {"version": preparation.VERSION, "domains": domains, "embedded": embedded}


def _content(path: str) -> str:
    return digest(Path(path)) if Path(path).exists() else path


def prepare(context: Context, inputs: Json) -> Made:
    """Each domain's file in a folder named by what decides it, so that one with the same data is found."""
    spec, collected = context.spec, context.outputs["collect"]
    data, manifests = [], {}
    for domain, by_source in sorted(collected["domains"].items()):
        key = sha256_json([inputs["version"], inputs["domains"][domain]])[:32]
        out = spec.folder("data", key, f"{domain}.jsonl")
        config = spec.prepare_config(domain, by_source, out)
        if spec.run_on and "prepare" in spec.run_on.stages:
            from qwen_ray.lifecycle.remote import run_job

            words = ["data", "prepare", "--config"]
            leaves = beside(out, "manifest.json")
            run_job(context, f"prepare-{domain}", config.model_dump(mode="json"), words, key, leaves=leaves)
        prepared = preparation.prepare(config)
        context.note(f"  {'as before: ' if prepared.unchanged else ''}{prepared.card['written']} of {domain}")
        data.append(out)
        manifests[domain] = {**prepared.manifest, "licenses": prepared.card["per_license"]}
        context.reached("prepare: prepared")
    kept = [*data, *(beside(path, "manifest.json") for path in data)]
    embedded = [Path(path) for path in collected["embedded"]]
    outputs = {"data": [str(path) for path in [*data, *embedded]], "manifests": manifests}
    return Made(outputs, hashes(*kept, *embedded))
