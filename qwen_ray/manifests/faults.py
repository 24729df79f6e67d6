"""What is wrong with a manifest, and how a rule is written down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from qwen_ray.manifests.objects import Part

Finding = tuple[str, str]
"""A field, from the part that the rule was given, and what is wrong with it."""


@dataclass(frozen=True)
class Fault:
    """``what`` is wrong in ``field`` of ``object`` (Kind/name) by which ``rule``, and how to ``fix`` it."""

    file: str
    object: str
    field: str
    rule: str
    what: str
    fix: str

    def __str__(self) -> str:
        where = ": ".join(part for part in (self.file, self.object, self.field) if part)
        return f"{where}: {self.what} [{self.rule}]\n  fix: {self.fix}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


Rule = Callable[[Part], Iterator[Finding]]


class Rules:
    """Named rules about one kind of part; each is a generator of findings."""

    def __init__(self) -> None:
        self._rules: dict[str, tuple[Rule, str]] = {}

    def rule(self, name: str, fix: str) -> Callable[[Rule], Rule]:
        """Registers the function below it. ``fix``: how to mend what it finds."""

        def register(function: Rule) -> Rule:
            if name in self._rules:
                raise ValueError(f"two rules are called {name}")
            self._rules[name] = (function, fix)
            return function

        return register

    def names(self) -> list[str]:
        return sorted(self._rules)

    def faults(self, part: Part) -> Iterator[Fault]:
        """What every rule finds in a part."""
        of = part.manifest
        for name, (function, fix) in self._rules.items():
            for field, what in function(part):
                yield Fault(of.file, of.title, part.at(field), name, what, fix)
