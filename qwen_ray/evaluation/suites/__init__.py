"""Suites: folders of lm-eval tasks, each with a suite.yaml that says which category a task counts for.

The tasks are ordinary lm-eval YAML, so stock lm-eval runs them too:
``lm_eval --include_path $(python -c 'import qwen_ray.evaluation.suites as s; print(s.folder("tiny"))')``.

A suite is named, where it comes with the package, or is any folder::

    my-suite/
      suite.yaml      name, version, description, categories (those of suites/tiny show the form)
      *.yaml, *.py    the tasks, and the Python files they name
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.fsio import whole_path

Role = Literal["target", "strength", "control"]

_TASK = re.compile(r"^task:\s*[\"']?([^\s\"'#]+)", re.M)


@dataclass(frozen=True)
class Category:
    """One line of a result: the items of its tasks, pooled. ``filter``: lm-eval's, for generated answers."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    role: Role
    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    metric: str
    filter: str | None = None
    explanation: str = ""


@dataclass(frozen=True)
class Suite:
    """A named, versioned set of categories."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    version: str
    description: str
    categories: Annotated[tuple[Category, ...], Field(min_length=1)]
    folder: Path


def names() -> list[str]:
    """The suites that come with the package."""
    return sorted(p.parent.name for p in Path(__file__).parent.glob("*/suite.yaml"))


def lasting(name: str) -> str:
    """A suite's name, or its folder's whole path: the same suite wherever it is used next."""
    if name in names() or ("/" not in name and not Path(name).is_dir()):
        return name
    return whole_path(name)


def folder(name: str) -> Path:
    """The folder with a suite's tasks, for lm-eval's ``--include_path``."""
    return load(name).folder


def load(name: str) -> Suite:
    """Read a suite's definition: one that comes with the package, or a folder that holds a ``suite.yaml``.

    A name of :func:`names` is always that suite; a folder of the same name is meant by ``./name``.
    :class:`UserError` when there is none, or its definition is at fault.
    """
    if name in names():
        return _read(Path(__file__).parent / name, name)
    root = Path(name)
    if "/" not in name and not root.is_dir():
        fix = f"{did_you_mean(name, names())}; or give a folder that holds a suite.yaml"
        raise UserError(f"unknown suite '{name}'", where="--suite", fix=fix)
    if not (root / "suite.yaml").is_file():
        raise UserError(
            "no suite.yaml here",
            where=name,
            fix="give the folder of a suite, or one of: " + ", ".join(names()),
        )
    suite = _read(root.resolve(), root.resolve().name)
    if suite.name in names():
        # Results are compared by the suite's name: they would pass for those of the other one.
        raise UserError(
            f"the suite calls itself '{suite.name}', which is a suite of qwen-ray",
            where=f"{root / 'suite.yaml'}: name",
            fix="give it another name",
        )
    return suite


def _read(root: Path, name: str) -> Suite:
    """``name`` is the suite's where its definition gives none."""
    file = root / "suite.yaml"
    try:
        spec = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"not valid YAML: {' '.join(str(e).split())[:200]}", where=str(file)) from None
    try:
        suite = TypeAdapter(Suite).validate_python(_tree(spec, root, name))
    except ValidationError as e:
        first = e.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        fix = "as in " + str(Path(__file__).parent / "tiny" / "suite.yaml")
        raise UserError(f"'{key}': {first['msg']}", where=str(file), fix=fix) from None
    _check_tasks(suite)
    return suite


def _tree(spec: Any, root: Path, name: str) -> Any:
    """The definition in the shape of :class:`Suite`; what is of another shape stays, for its error."""
    if not isinstance(spec, dict):
        return spec
    tree = {"name": name, **spec, "folder": root}
    if isinstance(spec.get("version"), (int, float)):
        tree["version"] = str(spec["version"])
    if isinstance(spec.get("description"), str):
        tree["description"] = spec["description"].strip()
    if isinstance(categories := spec.get("categories"), dict):
        tree["categories"] = [
            {"name": key, **value} if isinstance(value, dict) else value for key, value in categories.items()
        ]
    return tree


def _check_tasks(suite: Suite) -> None:
    """Every task has its file: lm-eval's own message names neither the suite nor the nearest name."""
    files = sorted(suite.folder.rglob("*.yaml"))
    known = [
        task for file in files for task in _TASK.findall(file.read_text(encoding="utf-8", errors="replace"))
    ]
    for category in suite.categories:
        for task in category.tasks:
            if task not in known:
                where = f"{suite.folder / 'suite.yaml'}: categories.{category.name}.tasks"
                raise UserError(
                    f"no file here has 'task: {task}'", where=where, fix=did_you_mean(task, known)
                )
