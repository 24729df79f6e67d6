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
OPERATORS = {"&&", "||", ";", "|", "&", "(", ")", "\n"}
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_COMMENT = re.compile(r"(?m)(^|\s)#.*$")
_ALL_OF = re.compile(r"\$@|\$\{\w+\[@\]\}")  # of an array: none, one or more words
_BEFORE = {"exec", "time", "nohup", "env", "nice"}
_SHELLS = {"sh", "bash"}
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
    """What our parser says about every `qwen-ray ...` of a shell command."""
    return [wrong for words in commands(text) if isinstance(wrong := parsed(words), str)]


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
    """The arguments of every `qwen-ray` in a shell command."""
    words: list[str] = []
    for token in [*tokens(text), ";"]:
        if token not in OPERATORS:
            words += [] if _ALL_OF.fullmatch(token) else [token]
            continue
        while words and (_ASSIGNMENT.match(words[0]) or words[0] in _BEFORE):
            words = words[1:]
        if words[:1] == ["qwen-ray"]:
            yield words[1:]
        elif words[1:3] == ["-m", "qwen_ray.cli"]:
            yield words[3:]
        words = []


def tokens(text: str) -> list[str]:
    """The words and operators of a shell command; none of one that is not for us to read."""
    text = _COMMENT.sub("", text.replace("\\\n", " ")).replace("\n", " ; ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|()")
    lexer.whitespace_split, lexer.commenters = True, ""
    try:
        return list(lexer)
    except ValueError:  # an open quotation mark
        return []


def command_of(container: Part) -> str:
    """What a container runs, as a shell command, with the variables that are known put in."""
    words = [*container.get("command", []), *container.get("args", [])]
    known = {
        name: str(entry.get("value", ""))
        for name, entry in environment(container).items()
        if "value" in entry
    }
    words = [re.sub(r"\$\((\w+)\)", lambda m: known.get(m[1], m[0]), str(word)) for word in words]
    if words and words[0].rpartition("/")[2] in _SHELLS:
        scripts = [words[i + 1] for i, word in enumerate(words[:-1]) if re.fullmatch(r"-\w*c", word)]
        return scripts[0] if scripts else ""
    return shlex.join(words)


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
