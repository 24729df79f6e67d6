"""Built-in kinds against the strict schemas of a Kubernetes version (package kubernetes-validate)."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.objects import Manifest
from qwen_ray.manifests.schema import value_faults

_OBJECT_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def knows_group(api_version: str) -> bool:
    """Whether an apiVersion is of Kubernetes itself, so that a kind that is not here does not exist."""
    group = api_version.rpartition("/")[0]
    if "." in group and not group.endswith(".k8s.io"):
        return False
    return "." not in group or any(name.endswith(f"-{_short(api_version)}.json") for name in _files())


def knows(manifest: Manifest) -> bool:
    """Whether it is a built-in kind."""
    group = manifest.api_version.rpartition("/")[0]
    foreign = "." in group and not group.endswith(".k8s.io")
    return not foreign and f"{manifest.kind.lower()}-{_short(manifest.api_version)}.json" in _files()


def faults(manifest: Manifest) -> list[Fault]:
    """What its schema has against an object of a built-in kind; unknown fields are refused."""
    name = f"{manifest.kind.lower()}-{_short(manifest.api_version)}.json"
    return _faults(manifest, manifest.tree, _validator(name), "")


def complete(manifest: Manifest) -> Manifest:
    """The object with nulls dropped, as the API server drops them."""
    return Manifest(manifest.file, without_nulls(manifest.tree))


def metadata_faults(manifest: Manifest) -> list[Fault]:
    """The same for the metadata of any object, which definitions of custom resources leave open."""
    return _faults(manifest, manifest.metadata, _metadata_validator(), "metadata")


def _faults(manifest: Manifest, tree: Any, validator: Any, prefix: str) -> list[Fault]:
    return [
        Fault(manifest.file, manifest.title, f"{prefix}.{field}" if prefix else field, rule, what, fix)
        for error in validator.iter_errors(without_nulls(tree))
        for field, rule, what, fix in value_faults(error)
    ]


def without_nulls(value: Any) -> Any:
    """A tree without the keys whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _short(api_version: str) -> str:
    """``rbac.authorization.k8s.io/v1`` as the files have it: ``rbac-v1``."""
    return re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", api_version)


def _package() -> ModuleType:
    try:
        from kubernetes_validate import utils
    except ImportError:
        raise UserError(
            "the schemas of built-in kinds need the package kubernetes-validate",
            fix="pip install 'qwen-ray[manifests]'",
        ) from None
    module: ModuleType = utils
    return module


@lru_cache(maxsize=1)
def _folder() -> Path:
    package = _package()
    root = Path(str(package.__file__)).parent / "kubernetes-json-schema"
    return root / f"v{package.latest_version()}-local-strict"


@lru_cache(maxsize=1)
def _files() -> frozenset[str]:
    return frozenset(path.name for path in _folder().iterdir())


def _read(name: str) -> Any:
    return _package().schema_contents(f"kubernetes-json-schema/{_folder().name}/{name}", "")


@lru_cache(maxsize=1)
def _registry() -> Any:
    from referencing import Registry, Resource

    return Resource.from_contents(_read("_definitions.json")) @ Registry()


@lru_cache(maxsize=64)
def _validator(name: str) -> Any:
    from jsonschema import Draft202012Validator
    from referencing import Resource

    schema = _read(name)
    return Draft202012Validator(schema, registry=Resource.from_contents(schema) @ _registry())


@lru_cache(maxsize=1)
def _metadata_validator() -> Any:
    from jsonschema import Draft202012Validator

    definitions = _read("_definitions.json")
    reference = {"$ref": f"{definitions['$id']}#/$defs/{_OBJECT_META}"}
    return Draft202012Validator(reference, registry=_registry())
