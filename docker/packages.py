"""What the images hold: the lock from an environment in which the tests passed, and a list of what is inside.

    python docker/packages.py lock --extra rag --extra gpu --out docker/requirements.lock
    python docker/packages.py sbom --out sbom.cdx.json

``lock`` writes the exact version of every package that qwen-ray with these extras needs here, without what
only tests need. ``sbom`` writes a CycloneDX 1.6 document of every package that is installed. Neither asks the
network.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator, Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

ROOT = "qwen-ray"
PROJECT = Path(__file__).parent.parent / "pyproject.toml"
# The build that fits the machine is chosen when an image is built (docker/Dockerfile); torch itself pins what
# comes with its CUDA build.
CHOSEN_LATER = ("torch", "triton")
HEADER = """\
# Written by `python docker/packages.py lock {options}`, from the environment in which the tests passed
# (Python {python}, {platform}). Not here: torch {torch} and triton, whose builds docker/Dockerfile
# chooses.
"""


def canonical(name: str) -> str:
    """A package's name as indexes compare it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def needed(name: str, extras: Sequence[str] = ()) -> Iterator[str]:
    """Names of what ``name`` with ``extras`` needs directly, on this Python and platform."""
    yield from _names(distribution(name).requires or (), extras)


def project(extras: Sequence[str]) -> Iterator[str]:
    """The same of qwen-ray, by pyproject.toml: what is installed may be older than the file."""
    table = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    for text in (*table["dependencies"], *(row for extra in extras for row in _extra(table, extra))):
        requirement = Requirement(text)
        if canonical(requirement.name) == ROOT:  # qwen-ray[deepspeed] within another extra
            yield from project(sorted(requirement.extras))
        else:
            yield from _names([text], ())


def _extra(table: dict[str, Any], extra: str) -> list[str]:
    try:
        return list(table["optional-dependencies"][extra])
    except KeyError:
        raise SystemExit(f"error: qwen-ray has no extra '{extra}'") from None


def _names(texts: Sequence[str], extras: Sequence[str]) -> Iterator[str]:
    for text in texts:
        requirement = Requirement(text)
        if requirement.marker and not any(requirement.marker.evaluate({"extra": e}) for e in ("", *extras)):
            continue
        yield requirement.name
        if requirement.extras:  # also ray[default] within ray[serve]
            yield from needed(requirement.name, sorted(requirement.extras))


def closure(extras: Sequence[str]) -> dict[str, Distribution]:
    """Every package that qwen-ray with ``extras`` needs, by canonical name, itself left out.

    Raises :class:`SystemExit` naming a package that is not installed.
    """
    found: dict[str, Distribution] = {}
    waiting = list(project(extras))
    while waiting:
        name = canonical(waiting.pop())
        if name in found or name == ROOT:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"error: '{name}' is needed and not installed here") from None
        waiting += needed(name)
    return dict(sorted(found.items()))


def lock(extras: Sequence[str]) -> str:
    """The lock file's text."""
    found = closure(extras)
    options = " ".join(f"--extra {extra}" for extra in extras)
    python = ".".join(map(str, sys.version_info[:2]))
    torch = public(found["torch"].version)
    header = HEADER.format(options=options, python=python, platform=sys.platform, torch=torch)
    rows = [
        f"{name}=={public(package.version)}" for name, package in found.items() if name not in CHOSEN_LATER
    ]
    return header + "\n".join(rows) + "\n"


def public(version: str) -> str:
    """Without the local part: 2.13.0+cpu is the release 2.13.0, built for CPUs."""
    return version.partition("+")[0]


def sbom() -> dict[str, Any]:
    """CycloneDX 1.6 (ECMA-424): every installed package with version, licence, package URL and needs."""
    packages = {canonical(package.metadata["Name"]): package for package in distributions()}
    packages = dict(sorted(packages.items()))
    references = {name: f"pkg:pypi/{name}@{package.version}" for name, package in packages.items()}
    contents = json.dumps(references)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        # Of the same packages the same document: no time, and a number that follows from the contents.
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, contents)}",
        "version": 1,
        "metadata": {"component": _component(ROOT, packages[ROOT], references[ROOT], kind="application")},
        "components": [
            _component(name, package, references[name]) for name, package in packages.items() if name != ROOT
        ],
        "dependencies": [
            {
                "ref": references[name],
                "dependsOn": sorted(
                    {references[canonical(other)] for other in needed(name) if canonical(other) in packages}
                ),
            }
            for name in packages
        ],
    }


def _component(name: str, package: Distribution, reference: str, kind: str = "library") -> dict[str, Any]:
    entry: dict[str, Any] = {
        "type": kind,
        "bom-ref": reference,
        "name": name,
        "version": package.version,
        "purl": reference,
    }

    def field(key: str) -> str:
        return (package.metadata.get_all(key) or [""])[0].strip()

    # License-Expression is SPDX (PEP 639); the older field is free text, sometimes the whole licence.
    if expression := field("License-Expression"):
        entry["licenses"] = [{"expression": expression}]
    elif (text := field("License")) and text != "UNKNOWN":
        entry["licenses"] = [{"license": {"name": text.splitlines()[0][:200]}}]
    elif found := [
        row for row in package.metadata.get_all("Classifier") or () if row.startswith("License ::")
    ]:
        entry["licenses"] = [{"license": {"name": found[0].rpartition(" :: ")[2]}}]
    return entry


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("lock", "sbom"):
        p = verbs.add_parser(verb)
        p.add_argument("--out", type=Path, required=True, help="file to write")
        if verb == "lock":
            p.add_argument("--extra", action="append", default=[], help="extra of qwen-ray; may be repeated")
    args = parser.parse_args(argv)
    text = lock(args.extra) if args.verb == "lock" else json.dumps(sbom(), indent=1) + "\n"
    args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
