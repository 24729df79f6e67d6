"""Custom resources against their definitions: KubeRay, Kueue, Volcano, prometheus-operator.

In the order of the API server: nulls are dropped, defaults filled in, then the schema, fields that it does
not have, and its CEL rules (``x-kubernetes-validations``). Rules about a change (``oldSelf``) do not apply
to a new object. See
https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.objects import Manifest

if TYPE_CHECKING:
    from jsonschema.exceptions import ValidationError

FOLDER = Path(__file__).parent / "schemas"
_NOT_OF_VALUES = {"unknown-field", "duplicate-item", "crd-rule"}
Found = tuple[str, str, str, str]
"""Field, rule, what is wrong, how to mend it."""


@lru_cache(maxsize=1)
def kinds() -> dict[tuple[str, str], str]:
    """The file of every (apiVersion, kind) that has a schema here."""
    index = json.loads((FOLDER / "index.json").read_text(encoding="utf-8"))
    return {(entry["apiVersion"], entry["kind"]): entry["file"] for entry in index}


@lru_cache(maxsize=32)
def schema_of(api_version: str, kind: str) -> dict[str, Any]:
    """The ``openAPIV3Schema`` of a kind in :func:`kinds`, without descriptions."""
    packed = (FOLDER / kinds()[api_version, kind]).read_bytes()
    versions: dict[str, dict[str, Any]] = json.loads(gzip.decompress(packed))
    return versions[api_version]


def complete(manifest: Manifest) -> Manifest:
    """The object with nulls dropped and the defaults of its definition filled in."""
    tree = _completed(manifest.tree, schema_of(manifest.api_version, manifest.kind))
    return Manifest(manifest.file, tree)


def faults(manifest: Manifest) -> list[Fault]:
    """What its definition has against a :func:`complete` object."""
    schema = schema_of(manifest.api_version, manifest.kind)
    errors = _validator(manifest.api_version, manifest.kind).iter_errors(manifest.tree)
    found = [fault for error in errors for fault in value_faults(error)]
    found += _walk(manifest.tree, schema, "")
    return [Fault(manifest.file, manifest.title, field, rule, what, fix) for field, rule, what, fix in found]


def breaks_types(found: list[Fault]) -> bool:
    """Whether other rules cannot rely on the shape of the object."""
    return any(fault.rule not in _NOT_OF_VALUES for fault in found)


def path_of(keys: Any) -> str:
    """``spec.containers[0].name`` of its keys."""
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys)
    return text.removeprefix(".")


def value_faults(error: ValidationError) -> Iterator[Found]:
    """A finding of jsonschema in the words of this program."""
    field = path_of(error.absolute_path)
    if error.validator == "additionalProperties" and error.validator_value is False:
        known = error.schema.get("properties", {})
        for key in sorted(error.instance.keys() - known.keys()):
            at = f"{field}.{key}" if field else key
            yield at, "unknown-field", "there is no such field", did_you_mean(key, known)
    else:
        yield _value_fault(error, field)


def _value_fault(error: ValidationError, field: str) -> Found:
    if error.validator == "required":
        (missing,) = [key for key in error.validator_value if f"'{key}'" in error.message.split(" is ")[0]][
            :1
        ]
        field = f"{field}.{missing}" if field else missing
        return field, "missing-field", "it is required", "add it"
    kind = {"type": "wrong-type", "anyOf": "wrong-type"}.get(str(error.validator), "invalid-value")
    return field, kind, error.message, _wanted(error)


def _wanted(error: ValidationError) -> str:
    value = error.validator_value
    if error.validator == "enum":
        return f"one of {', '.join(str(choice) for choice in value)}"
    if error.validator == "type":
        return f"give {' or '.join(value) if isinstance(value, list) else value}"
    return f"see `kubectl explain`: {error.validator} {value if not isinstance(value, list) else ''}".rstrip()


@lru_cache(maxsize=32)
def _validator(api_version: str, kind: str) -> Any:
    from jsonschema import Draft202012Validator

    return Draft202012Validator(schema_of(api_version, kind))


def _completed(value: Any, schema: Mapping[str, Any]) -> Any:
    if isinstance(value, dict):
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        rest = rest if isinstance(rest, dict) else {}
        full = {key: inner for key, inner in value.items() if inner is not None}
        full |= {
            key: deepcopy(inner["default"])
            for key, inner in known.items()
            if key not in full and "default" in inner
        }
        return {key: _completed(inner, known.get(key, rest)) for key, inner in full.items()}
    if isinstance(value, list):
        return [_completed(item, schema.get("items", {})) for item in value]
    return value


def _walk(value: Any, schema: Mapping[str, Any], path: str) -> Iterator[Found]:
    """Unknown fields, items given twice and broken CEL rules, here and below."""
    if isinstance(value, dict):
        known = schema.get("properties", {})
        rest = schema.get("additionalProperties")
        for key, inner in value.items():
            at = f"{path}.{key}" if path else str(key)
            if key in known:
                yield from _walk(inner, known[key], at)
            elif isinstance(rest, dict):
                yield from _walk(inner, rest, at)
            elif known and rest is not True:
                yield at, "unknown-field", "there is no such field", did_you_mean(str(key), known)
    elif isinstance(value, list):
        yield from _twice(value, schema, path)
        for i, item in enumerate(value):
            yield from _walk(item, schema.get("items", {}), f"{path}[{i}]")
    for rule in schema.get("x-kubernetes-validations", ()):
        if not _holds(rule["rule"], value):
            what = rule.get("message", "the definition's rule does not hold")
            yield path, "crd-rule", what, f"the rule is: {' '.join(rule['rule'].split())}"


def _twice(value: list[Any], schema: Mapping[str, Any], path: str) -> Iterator[Found]:
    kind = schema.get("x-kubernetes-list-type")
    if kind not in ("map", "set"):
        return
    keys = schema.get("x-kubernetes-list-map-keys", ())
    seen: dict[str, int] = {}
    for i, item in enumerate(value):
        mark = {key: item.get(key) for key in keys} if kind == "map" and isinstance(item, dict) else item
        text = json.dumps(mark, sort_keys=True, default=str)
        if text in seen:
            yield (
                f"{path}[{i}]",
                "duplicate-item",
                f"the same {text} as item {seen[text]}",
                "keep one of them",
            )
        seen.setdefault(text, i)


def _holds(rule: str, value: Any) -> bool:
    program = _compiled(rule)
    if "oldSelf" in program.variables():
        return True
    try:
        return program.execute({"self": value}) is True
    except (KeyError, TypeError, ValueError, RuntimeError):  # an absent field: the API server refuses it too
        return False


@lru_cache(maxsize=256)
def _compiled(rule: str) -> Any:
    try:
        import cel
    except ImportError:
        raise UserError(
            "the rules of custom resources need the package common-expression-language",
            fix="pip install 'qwen-ray[manifests]'",
        ) from None
    return cel.compile(rule)
