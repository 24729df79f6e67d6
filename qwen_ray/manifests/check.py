"""All checks of manifests, Serve configs and cluster-launcher files, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from qwen_ray.errors import did_you_mean
from qwen_ray.manifests import (
    builtin,
    entry_points,
    gates,
    hardening,
    launcher,
    mounted,
    names,
    pod_rules,
    production,
    queues,
    ray_cluster,
    ray_job,
    ray_options,
    references,
    schema,
)
from qwen_ray.manifests.faults import Fault, Rules
from qwen_ray.manifests.load import Loaded, load
from qwen_ray.manifests.objects import Manifest, Part, cluster, job, pods

Profile = Literal["api", "production"]


def rule_names(*modules: ModuleType) -> set[str]:
    """Names of the rules in these modules; without any, of all the rules that are checked here."""
    asked = modules or [found for found in globals().values() if isinstance(found, ModuleType)]
    values = [value for module in asked for value in vars(module).values()]
    return {name for rules in values if isinstance(rules, Rules) for name in rules.names()}


@dataclass
class Report:
    """What was checked and what is wrong with it."""

    profile: Profile
    checked: list[str] = field(default_factory=list)
    """``FILE: Kind/name`` of every object, Serve config and cluster."""
    faults: list[Fault] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """Objects of kinds without a schema here, and documents of other kinds."""
    secrets: list[str] = field(default_factory=list)
    """``NAMESPACE/NAME`` of Secrets that must be there before."""

    def to_dict(self) -> dict[str, Any]:
        return {
            "profile": self.profile,
            "checked": self.checked,
            "faults": [fault.to_dict() for fault in self.faults],
            "not_checked": self.not_checked,
            "secrets": self.secrets,
        }


def check(
    paths: Iterable[str], *, profile: Profile = "production", operator_values: Path | None = None
) -> Report:
    """Check files, folders, kustomizations, and standard input (``-``).

    ``api``: what the API server, the operator, Ray and our programs refuse. ``production``: also what they
    accept and a cluster that other people use should not have. ``operator_values``: the values file of the
    KubeRay operator's Helm chart, for its feature gates; with ``api`` and no file, every gate counts as on.
    Raises :class:`~qwen_ray.errors.UserError` for what cannot be read.
    """
    return check_loaded(load(paths), profile=profile, operator_values=operator_values)


def check_loaded(loaded: Loaded, *, profile: Profile, operator_values: Path | None = None) -> Report:
    """As :func:`check`, of what was read before."""
    report = Report(profile, faults=loaded.faults, not_checked=loaded.not_checked)
    on = gates.from_values(operator_values) if operator_values else gates.DEFAULTS
    strict = profile == "production"
    for manifests in loaded.sets:
        sound = []
        for manifest in manifests:
            report.checked.append(f"{manifest.file}: {manifest.title}")
            found, whole = _of_schema(report, manifest)
            if whole is not None:
                found += _of_object(whole, strict=strict)
                if strict or operator_values:
                    found += gates.faults(whole, on)
                sound.append(whole)
            report.faults += found
        report.faults += _twice(manifests) if strict else []
        report.faults += [*mounted.faults(sound), *queues.faults(sound)]
        report.secrets += [name for name in references.secrets(sound) if name not in report.secrets]
        if strict and len(sound) == len(manifests):
            report.faults += [*references.faults(sound), *references.production(sound)]
        elif strict:
            report.not_checked.append(f"{manifests[0].file}: references, until its objects can be read")
    for file, tree in loaded.serve:
        report.checked.append(f"{file}: Serve config")
        fix = "keys as in Ray Serve's config file, args as in docs/serving.md"
        report.faults += [
            Fault(file, "Serve config", where, "serve-config", what, fix)
            for where, what in entry_points.serve_faults(tree)
        ]
    for file, tree in loaded.launchers:
        report.checked.append(f"{file}: Cluster/{tree['cluster_name']}")
        report.faults += launcher.faults(file, tree, production=strict)
    return report


def _of_schema(report: Report, manifest: Manifest) -> tuple[list[Fault], Manifest | None]:
    """Faults of the schema, and the object with its defaults if its shape can be relied on."""
    found = _of_identity(manifest)
    if found:
        return found, None
    if (manifest.api_version, manifest.kind) in schema.kinds():
        found, whole = builtin.metadata_faults(manifest), schema.complete(manifest)
        found += schema.faults(whole)
    elif builtin.knows(manifest):
        whole = builtin.complete(manifest)
        found = builtin.faults(whole)
    elif builtin.knows_group(manifest.api_version) or manifest.api_version.partition("/")[0] in _groups():
        kinds = {kind for version, kind in schema.kinds() if version == manifest.api_version}
        fix = did_you_mean(manifest.kind, kinds) if kinds else "check kind and apiVersion"
        what = f"{manifest.api_version} has no kind {manifest.kind}"
        return [Fault(manifest.file, manifest.title, "kind", "unknown-kind", what, fix)], None
    else:
        what = f"{manifest.file}: {manifest.title}: no schema here for {manifest.api_version}"
        report.not_checked.append(what)
        return [], manifest
    return found, None if schema.breaks_types(found) else whole


def _groups() -> set[str]:
    return {version.partition("/")[0] for version, _ in schema.kinds()}


def _of_identity(manifest: Manifest) -> list[Fault]:
    """What every object needs before anything else is known of it."""
    wrong = [
        (key, "missing-field", "it is not a text", f"give the object's {key}")
        for key in ("apiVersion", "kind")
        if not isinstance(manifest.tree.get(key), str)
    ]
    if not manifest.name:
        wrong.append(("metadata.name", "missing-field", "the object has no name", "name it"))
    elif names.dns_subdomain(manifest.name) and "rbac" not in manifest.api_version:  # system:... is a role
        fix = "lower-case letters, digits, dots and dashes"
        wrong.append(("metadata.name", "object-name", f"'{manifest.name}' is no name of an object", fix))
    return [Fault(manifest.file, manifest.title, *found) for found in wrong]


def _of_object(manifest: Manifest, *, strict: bool) -> list[Fault]:
    whole, spec, of_job = Part(manifest, manifest.tree), cluster(manifest), job(manifest)
    found = [*ray_job.OBJECT.faults(whole), *queues.RULES.faults(whole)]
    if spec is not None:
        found += [*ray_cluster.RULES.faults(spec), *ray_options.RULES.faults(spec)]
    if of_job is not None:
        found += ray_job.JOB.faults(of_job)
    readable = all(fault.rule != "runtime-env-yaml" for fault in found)
    for pod in pods(manifest):
        found += pod_rules.RULES.faults(pod)
        found += hardening.RULES.faults(pod) if strict else []
    if readable:
        found += entry_points.OBJECT.faults(whole)
    broken = {fault.rule for fault in found}
    if strict:
        found += production.OBJECT.faults(whole)
        found += production.SERVICE.faults(whole) if "serve-config" not in broken else []
        if spec is not None:
            found += production.CLUSTER.faults(spec)
        if of_job is not None and not broken & {"runtime-env-yaml", "runtime-env", "group-without-container"}:
            found += [*production.JOB.faults(of_job), *hardening.JOB.faults(of_job)]
    return found


def _twice(manifests: list[Manifest]) -> Iterator[Fault]:
    seen: dict[tuple[str, str, str, str], str] = {}
    for m in manifests:
        key = (m.api_version.partition("/")[0], m.kind, m.namespace, m.name)
        if key in seen and "generateName" not in m.metadata:
            fix = "give one of them another name: the later one would replace the other"
            yield Fault(m.file, m.title, "metadata.name", "object-twice", f"also in {seen[key]}", fix)
        seen.setdefault(key, m.file)
