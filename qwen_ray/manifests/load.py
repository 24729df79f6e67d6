"""Reads what is to be checked: files, folders, kustomizations, standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

try:
    from yaml import CSafeLoader as SafeLoader
except ImportError:  # PyYAML without libyaml: slower
    from yaml import SafeLoader  # type: ignore[assignment]

from qwen_ray.errors import UserError
from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.objects import Manifest, Tree, items
from qwen_ray.manifests.tools import kustomize

_KUSTOMIZATIONS = ("kustomization.yaml", "kustomization.yml", "Kustomization")
_ENDINGS = (".yaml", ".yml")
_NOT_TEXT = ("tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:value")
"""What YAML 1.1 reads as something else, and the API server as text."""


@dataclass
class Loaded:
    """What was read. References are looked for inside a set: one rendered kustomization, or all the files."""

    sets: list[list[Manifest]] = field(default_factory=list)
    serve: list[tuple[str, Tree]] = field(default_factory=list)
    """Serve config files."""
    launchers: list[tuple[str, Tree]] = field(default_factory=list)
    """Cluster-launcher files."""
    faults: list[Fault] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    """Documents of a folder that are of no kind known here."""


def load(paths: Iterable[str]) -> Loaded:
    """Read them all. :class:`UserError`: no such file, not YAML, a kustomization that cannot be rendered,
    and nothing in one of them that can be checked.

    ``-`` is standard input. In a folder every kustomization is rendered that no other one there includes;
    files beside and below a kustomization belong to it and are not read by themselves.
    """
    loaded = Loaded()
    plain: list[Manifest] = []
    for given in paths:
        path, before = Path(given), _found(loaded, plain)
        if given == "-":
            _sort(loaded, plain, "stdin", sys.stdin.read(), named=True)
        elif path.is_file() and path.name not in _KUSTOMIZATIONS:
            _sort(loaded, plain, given, _text(path), named=True)
        elif path.is_dir() or path.is_file():
            _folder(loaded, plain, path if path.is_dir() else path.parent)
        else:
            raise UserError("no such file or folder", where=given, fix="check the path")
        if _found(loaded, plain) == before:
            fix = "give Kubernetes objects, Serve configs or cluster-launcher files"
            raise UserError("nothing to check", where="stdin" if given == "-" else given, fix=fix)
    if plain:
        loaded.sets.append(plain)
    return loaded


def _found(loaded: Loaded, plain: list[Manifest]) -> int:
    """How much there is to check, or to say, so far."""
    read = sum(len(manifests) for manifests in (*loaded.sets, plain))
    return read + len(loaded.serve) + len(loaded.launchers) + len(loaded.faults)


def _folder(loaded: Loaded, plain: list[Manifest], root: Path) -> None:
    kustomizations = sorted(path.parent for name in _KUSTOMIZATIONS for path in root.rglob(name))
    included: set[Path] = set()
    for folder in kustomizations:
        tree = _kustomization(folder)
        included |= {
            (folder / str(entry)).resolve()
            for key in ("resources", "bases", "components")
            for entry in items(tree, key)
        }
        if tree.get("kind") == "Component":
            included.add(folder.resolve())
    for folder in kustomizations:
        if folder.resolve() not in included:
            text, warnings = kustomize(folder)
            if warnings:
                fix = "`kubectl kustomize` says what to write instead"
                loaded.faults.append(Fault(str(folder), "", "", "kustomize-warning", warnings, fix))
            rendered: list[Manifest] = []
            _sort(loaded, rendered, str(folder), text, named=True)
            loaded.sets.append(rendered)
    files = sorted(path for path in root.rglob("*") if path.suffix in _ENDINGS)
    for file in files:
        if not any(folder == file.parent or folder in file.parents for folder in kustomizations):
            _sort(loaded, plain, str(file), _text(file), named=False)


def _kustomization(folder: Path) -> Tree:
    for name in _KUSTOMIZATIONS:
        if (folder / name).is_file():
            trees, _ = documents(str(folder / name), _text(folder / name))
            if not trees:
                raise UserError("an empty kustomization", where=str(folder / name), fix="list its resources")
            return trees[0] if isinstance(trees[0], dict) else {}
    raise UserError("no kustomization", where=str(folder))


def _sort(loaded: Loaded, manifests: list[Manifest], file: str, text: str, *, named: bool) -> None:
    trees, faults = documents(file, text)
    loaded.faults += faults
    for tree in trees:
        if not isinstance(tree, dict):
            raise UserError(
                "a document is not a mapping", where=file, fix="each object starts with apiVersion"
            )
        if tree.get("kind") == "List" and tree.get("apiVersion") == "v1":
            manifests += [Manifest(file, item) for item in items(tree, "items") if isinstance(item, dict)]
        elif {"apiVersion", "kind"} & tree.keys():
            manifests.append(Manifest(file, tree))
        elif "cluster_name" in tree and "provider" in tree:
            loaded.launchers.append((file, tree))
        elif "applications" in tree:
            loaded.serve.append((file, tree))
        elif named:
            what = "neither a Kubernetes object nor a Serve config nor a cluster-launcher file"
            fix = "an object has apiVersion and kind, a Serve config applications, the last cluster_name"
            loaded.faults.append(Fault(file, "", "", "unknown-document", what, fix))
        else:
            loaded.not_checked.append(f"{file}: no Kubernetes object, Serve config or cluster-launcher file")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"cannot be read ({e})", where=str(path), fix="give a text file") from None


def documents(file: str, text: str) -> tuple[list[Any], list[Fault]]:
    """The YAML documents of a text, empty ones left out, and the keys that a mapping holds twice."""
    loader = _Loader(text)
    try:
        found = []
        while loader.check_data():
            found.append(loader.get_data())
    except yaml.YAMLError as e:
        raise UserError(f"not valid YAML ({e})", where=file, fix="check the indentation there") from None
    finally:
        loader.dispose()
    fix = "keep one of them; the API server refuses both"
    faults = [Fault(file, "", key, "duplicate-key", what, fix) for key, what in loader.twice]
    return [tree for tree in found if tree is not None], faults


class _Loader(SafeLoader):
    """As the API server reads YAML: a date is text, and a key given twice is noticed."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.twice: list[tuple[str, str]] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key.value, str):
                if key.value in seen:
                    self.twice.append(
                        (key.value, f"given on line {seen[key.value]} and again on line {line}")
                    )
                seen[key.value] = line
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NOT_TEXT]
    for first, resolvers in SafeLoader.yaml_implicit_resolvers.items()
}
