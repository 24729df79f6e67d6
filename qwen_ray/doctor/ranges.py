"""The versions that qwen-ray was built for, as its package says, and those that are installed."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires, version


def required() -> dict[str, str]:
    """The version range of each package that qwen-ray needs, by name; those of its extras are left out.
    Empty where qwen-ray itself is not installed but only there as files."""
    from packaging.requirements import Requirement

    try:
        lines = requires("qwen-ray") or []
    except PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in lines]
    return {w.name: str(w.specifier) for w in wanted if w.marker is None or w.marker.evaluate({"extra": ""})}


def installed(names: Mapping[str, object]) -> dict[str, str | None]:
    """The version of each package in this environment; None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def misfits(
    ranges: Mapping[str, str] | None = None, have: Mapping[str, str | None] | None = None
) -> list[str]:
    """What is missing or outside its range, in words. Defaults: what qwen-ray needs, what is here."""
    from packaging.specifiers import SpecifierSet

    ranges = required() if ranges is None else ranges
    have = installed(ranges) if have is None else have
    wrong = []
    for name, wanted in sorted(ranges.items()):
        found = have.get(name)
        if found is None:
            wrong.append(f"{name}{wanted} is missing")
        elif not SpecifierSet(wanted).contains(found, prereleases=True):
            wrong.append(f"{name} is {found}, not {wanted}")
    return wrong
