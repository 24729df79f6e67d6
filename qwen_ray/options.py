"""What the parsers of the verbs have in common."""

from __future__ import annotations

import argparse
from typing import Any

from qwen_ray.errors import UserError
from qwen_ray.verbs import Verb


def example(parser: argparse.ArgumentParser, *commands: str) -> None:
    parser.epilog = "\n".join(["example:", *(f"  {command}" for command in commands)])


def verb(parent: Any, name: str, run: Verb, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = parent.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, alone on stdout")
    parser.set_defaults(verb=run)
    return parser


def group(parent: Any, name: str, help_text: str) -> Any:
    parser = parent.add_parser(name, help=help_text, description=help_text[0].upper() + help_text[1:] + ".")
    return parser.add_subparsers(metavar="VERB", required=True)


def set_option(parser: argparse.ArgumentParser, such_as: str = "method.r=32") -> None:
    parser.add_argument(
        "--set",
        action="append",
        metavar="KEY=VALUE",
        help=f"any other key of the configuration, such as {such_as}; may be repeated",
    )


def targets_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--targets", help="comma-separated categories that must gain; the others must not lose (the suite's)"
    )


def registry_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--registry", default="registry", metavar="PLACE", help="the registry's folder or URI (%(default)s)"
    )


def reason_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--reason", required=True, help="kept in the registry's log")


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def pair(item: str, option: str, form: str = "NAME=PATH") -> tuple[str, str]:
    """The two sides of an option's ``A=B``."""
    name, equals, value = item.partition("=")
    if not equals or not name or not value:
        raise UserError(f"'{item}' is not {form}", where=option)
    return name, value


def pairs(items: list[str], option: str, form: str = "NAME=PATH") -> dict[str, str]:
    """A repeated option ``A=B`` as a dict; each A once."""
    found: dict[str, str] = {}
    for item in items:
        name, value = pair(item, option, form)
        if name in found:
            raise UserError(f"'{name}' is named twice", where=option)
        found[name] = value
    return found
