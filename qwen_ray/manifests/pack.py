"""Packs CustomResourceDefinitions for :mod:`qwen_ray.manifests.schema`; schemas/README.md has the command."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from qwen_ray.manifests.schema import FOLDER


def packed(definitions: list[Path]) -> dict[str, bytes]:
    """Files to write, by name: one a definition, and the index. The same input gives the same bytes."""
    files: dict[str, bytes] = {}
    index: list[dict[str, str]] = []
    for path in sorted(definitions):
        with open(path, encoding="utf-8") as f:
            spec = yaml.load(f, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))["spec"]
        name, kind = f"{path.stem}.json.gz", spec["names"]["kind"]
        versions = {
            f"{spec['group']}/{version['name']}": _bare(version["schema"]["openAPIV3Schema"])
            for version in spec["versions"]
            if version["served"]
        }
        text = json.dumps(versions, sort_keys=True, separators=(",", ":"))
        files[name] = gzip.compress(text.encode(), mtime=0)
        index += [{"apiVersion": version, "kind": kind, "file": name} for version in sorted(versions)]
    files["index.json"] = (json.dumps(index, indent=1) + "\n").encode()
    return files


def _bare(schema: Any) -> Any:
    """Without the descriptions of fields; a field may itself be called description."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {
        key: {name: _bare(inner) for name, inner in value.items()} if key == "properties" else _bare(value)
        for key, value in schema.items()
        if key != "description"
    }


if __name__ == "__main__":
    for file, data in packed([Path(argument) for argument in sys.argv[1:]]).items():
        (FOLDER / file).write_bytes(data)
