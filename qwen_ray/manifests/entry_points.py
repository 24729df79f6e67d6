"""What runs inside: commands by our own parser, Serve configs by Ray's and our own, runtime environments.

Nothing is executed. A command of another program is not looked at.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import shlex
import typing
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import yaml

from qwen_ray.errors import UserError, did_you_mean
from qwen_ray.manifests.faults import Finding, Rules
from qwen_ray.manifests.objects import Part, containers, environment, job, pods

if TYPE_CHECKING:
    from qwen_ray.serving.settings import ServeSettings

OBJECT = Rules()
OURS = "qwen_ray.serving.launch:build"
OPERATORS = frozenset(";&|()")
"""Characters of which the operators between commands are made."""
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_ALL_OF = re.compile(r"\$@|\$\{\w+\[@\]\}")  # of an array: none, one or more words
_KEYWORDS = {"if", "then", "elif", "else", "while", "until", "do", "!", "{"}
_BEFORE = {
    "exec": {"-a"},
    "time": {"-f", "-o"},
    "nohup": set[str](),
    "env": {"-u", "-C"},
    "nice": {"-n"},
    "timeout": {"-k", "-s"},
}
"""Programs that run the command after them, with those of their options that take a value."""
_SHELLS = {"sh", "bash"}
_TEXT = r"""(?:'[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s;&|()'"\\])+"""
_LAYOUT = re.compile(
    rf"""(?P<kept>'[^']*'|"(?:\\.|[^"\\])*"|\\[^\n])"""
    r"|(?P<gone>\\\n|(?:^|(?<=[\s;&|()]))#[^\n]*"
    rf"|(?:(?<![^\s;&|()])\d+|&)?(?:>>?&?|<(?![<(])&?)[ \t]*{_TEXT})"
    r"|(?P<end>\n)",
    re.DOTALL,
)
"""Quoted text; line continuations, comments and redirections; the end of a line."""
_NOT_FOR_SHLEX = re.compile(r"<<|\$'")  # here-documents, and strings with escapes
_REQUIREMENTS = ("pip", "uv", "conda")


@OBJECT.rule("entry-point", "write it as `qwen-ray VERB --help` says")
def entry_point(whole: Part) -> Iterator[Finding]:
    of_job = job(whole.manifest)
    if of_job is not None:
        for wrong in command_faults(str(of_job.get("entrypoint", ""))):
            yield of_job.at("entrypoint"), wrong
    for pod in pods(whole.manifest):
        for container in containers(pod):
            for wrong in command_faults(command_of(container)):
                yield container.at("args" if container.get("args") else "command"), wrong


def command_faults(text: str) -> list[str]:
    """What our parser says about every `qwen-ray ...` of a shell command, and of an open quotation mark."""
    faults = []
    try:
        for words in simple_commands(text):
            ours = _arguments(words)
            if ours is not None and isinstance(wrong := parsed(ours), str):
                faults.append(wrong)
    except ValueError as e:
        if re.search("qwen.ray", text) and not _NOT_FOR_SHLEX.search(text):
            faults.append(f"no shell command ({str(e).lower()})")
    return faults


def parsed(words: list[str]) -> argparse.Namespace | str:
    """The arguments of `qwen-ray` as our parser reads them, or what it says about them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return _parser().parse_args(words)
    except SystemExit as e:
        if not e.code:  # --help, --version
            return argparse.Namespace()
        first = said.getvalue().split("\n")[0].removeprefix("error: ")
        return f"`{shlex.join(['qwen-ray', *words])}`: {first}"


@lru_cache(maxsize=1)
def _parser() -> argparse.ArgumentParser:
    from qwen_ray.cli import build_parser

    return build_parser()


def commands(text: str) -> Iterator[list[str]]:
    """The arguments of every `qwen-ray` in a shell command; none of what shlex cannot read."""
    with contextlib.suppress(ValueError):
        for words in simple_commands(text):
            ours = _arguments(words)
            if ours is not None:
                yield ours


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of every command in a shell command, without what goes before its name: assignments, ``if``,
    ``timeout 9``. Those of a script in ``bash -c`` come after it. ValueError: see :func:`tokens`.
    """
    words: list[str] = []
    for token in [*tokens(text), ";"]:
        if not is_operator(token):
            words += [] if _ALL_OF.fullmatch(token) else [token]
            continue
        if words := _named(words):
            yield words
            script = _script(words)
            if script is not None:
                yield from simple_commands(script)
        words = []


def tokens(text: str) -> list[str]:
    """The words and operators of a shell command, without redirections. ValueError: a quotation is open."""

    def laid_out(found: re.Match[str]) -> str:
        return found["kept"] or (" ; " if found["end"] else "")

    lexer = shlex.shlex(_LAYOUT.sub(laid_out, text), posix=True, punctuation_chars="".join(OPERATORS))
    lexer.whitespace_split, lexer.commenters = True, ""
    return list(lexer)


def is_operator(token: str) -> bool:
    return OPERATORS.issuperset(token) and token != ""


def _named(words: list[str]) -> list[str]:
    """A command from its name on."""
    while words:
        name = _base(words[0])
        if _ASSIGNMENT.match(words[0]) or name in _KEYWORDS:
            words = words[1:]
        elif name in _BEFORE:
            words = words[1:]
            while words and words[0].startswith("-"):
                words = words[2 if words[0] in _BEFORE[name] else 1 :]
            words = words[1:] if name == "timeout" else words
        else:
            break
    return words


def _base(program: str) -> str:
    return program.rpartition("/")[2]


def _arguments(words: list[str]) -> list[str] | None:
    """Those of `qwen-ray`; None where something else is run."""
    if _base(words[0]) == "qwen-ray":
        return words[1:]
    return words[3:] if words[1:3] == ["-m", "qwen_ray.cli"] else None


def _script(words: list[str]) -> str | None:
    """What a shell is given with ``-c``."""
    if _base(words[0]) not in _SHELLS:
        return None
    return next((words[i + 1] for i, w in enumerate(words[:-1]) if re.fullmatch(r"-\w*c", w)), None)


def command_of(container: Part) -> str:
    """What a container runs, as a shell command, with the variables that are known put in."""
    words = [*container.get("command", []), *container.get("args", [])]
    known = {
        name: str(entry.get("value", ""))
        for name, entry in environment(container).items()
        if "value" in entry
    }
    return shlex.join(re.sub(r"\$\((\w+)\)", lambda m: known.get(m[1], m[0]), str(word)) for word in words)


@OBJECT.rule("runtime-env", "keys as in Ray's runtime_env")
def runtime_env(whole: Part) -> Iterator[Finding]:
    of_job = job(whole.manifest)
    if of_job is None or not of_job.get("runtimeEnvYAML"):
        return
    tree = yaml.safe_load(of_job.get("runtimeEnvYAML"))
    for key, wrong in runtime_env_faults(tree if isinstance(tree, dict) else {}):
        yield of_job.at("runtimeEnvYAML"), f"{key}: {wrong}"


def runtime_env_faults(tree: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Unknown keys of a runtime environment, and what Ray says about the others."""
    from ray.runtime_env import RuntimeEnv

    unknown = sorted(tree.keys() - RuntimeEnv.known_fields, key=str)
    for key in unknown:
        yield key, f"there is no such key; {did_you_mean(str(key), RuntimeEnv.known_fields)}"
    # A path of requirements is one of the container, not of this machine.
    here = {key: v for key, v in tree.items() if not (key in _REQUIREMENTS and isinstance(v, str))}
    try:
        RuntimeEnv(**{key: value for key, value in here.items() if key not in unknown})
    except (TypeError, ValueError) as e:
        yield "runtime_env", " ".join(str(e).split())


@OBJECT.rule("serve-config", "keys as in Ray Serve's config file, args as in docs/serving.md")
def serve_config(whole: Part) -> Iterator[Finding]:
    text = whole.get("spec.serveConfigV2")
    if whole.manifest.kind != "RayService" or not text:
        return
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        yield "spec.serveConfigV2", f"not valid YAML ({' '.join(str(e).split())})"
        return
    for field, wrong in serve_faults(tree):
        yield "spec.serveConfigV2", f"{field}: {wrong}" if field else wrong


def serve_faults(tree: Any) -> Iterator[Finding]:
    """What is wrong with a Serve config: Ray's schema accepts unknown keys, so they are ours."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    if not isinstance(tree, dict):
        yield "", "it is no mapping"
        return
    yield from _unknown(tree, ServeDeploySchema, "")
    try:
        ServeDeploySchema.model_validate(tree)
    except ValidationError as e:
        for error in e.errors():
            yield ".".join(str(key) for key in error["loc"]), error["msg"]
        return
    except (AttributeError, TypeError) as e:  # Ray's validators expect mappings
        yield "", f"not in the form that Ray Serve reads ({e})"
        return
    for i, application in enumerate(tree["applications"]):
        for key, wrong in runtime_env_faults(application.get("runtime_env") or {}):
            yield f"applications[{i}].runtime_env.{key}", wrong
        if application.get("import_path") == OURS:
            from qwen_ray.serving.settings import ServeSettings

            try:
                ServeSettings.of(application.get("args") or {})
            except UserError as e:
                yield f"applications[{i}].args", f"{e.what} ({e.fix})" if e.fix else e.what


def our_settings(text: str) -> list[ServeSettings]:
    """The settings of our applications in a Serve config, those left out that are not valid."""
    from qwen_ray.serving.settings import ServeSettings

    tree = yaml.safe_load(text)
    found = []
    for application in tree["applications"]:
        if application.get("import_path") == OURS:
            with contextlib.suppress(UserError):
                found.append(ServeSettings.of(application.get("args") or {}))
    return found


def _unknown(tree: Any, model: Any, path: str) -> Iterator[Finding]:
    """Keys that a pydantic model does not have, here and below."""
    if isinstance(tree, list):
        for i, item in enumerate(tree):
            yield from _unknown(item, model, f"{path}[{i}]")
    if not isinstance(tree, dict):
        return
    fields = model.model_fields
    known = set(fields) | {field.alias for field in fields.values() if field.alias}
    for key, value in tree.items():
        at = f"{path}.{key}" if path else str(key)
        if key not in known:
            yield at, f"there is no such key; {did_you_mean(str(key), known)}"
        elif key in fields:
            for inner in _models(fields[key].annotation):
                yield from _unknown(value, inner, at)


def _models(annotation: Any) -> list[Any]:
    """The one pydantic model in an annotation; none where there is a choice, or a mapping by name."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and not typing.get_args(annotation):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) is dict:
        return []
    found = [model for inner in typing.get_args(annotation) for model in _models(inner)]
    return found if len(found) == 1 else []
