"""Files that a set mounts from its ConfigMaps: scripts, and the configurations of our commands."""

from __future__ import annotations

import argparse
import io
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from qwen_ray.errors import UserError
from qwen_ray.manifests.entry_points import command_faults, command_of, commands, parsed
from qwen_ray.manifests.faults import Fault
from qwen_ray.manifests.objects import Manifest, Part, containers, job, mapping, pods
from qwen_ray.verbs import Output

_FIX = "mend the file that the ConfigMap is made of"
Reader = Callable[[argparse.Namespace, Path], None]
Files = dict[str, tuple[Manifest, str, str]]
"""By path in a container: the ConfigMap, its key, the text."""


def faults(manifests: list[Manifest]) -> Iterator[Fault]:
    """Commands in mounted scripts that our parser refuses, and mounted configurations that a verb does."""
    maps = {(m.namespace, m.name): m for m in manifests if m.kind == "ConfigMap"}
    found: dict[tuple[str, str, str], Fault] = {}
    for manifest in manifests:
        of_job = job(manifest)
        for pod in pods(manifest):
            for container in containers(pod):
                files = _files(pod, container, maps)
                # A job's entry point runs in the head's pod, or in one of a worker.
                runs = str(of_job.get("entrypoint", "")) if of_job and pod.role == "head" else ""
                for fault in _of_command(f"{command_of(container)}\n{runs}", files) if files else ():
                    found.setdefault((fault.object, fault.field, fault.what), fault)
    yield from found.values()


def _files(pod: Part, container: Part, maps: dict[tuple[str, str], Manifest]) -> Files:
    volumes = {volume.get("name"): volume for volume in pod.parts("spec.volumes")}
    files: Files = {}
    for mount in container.parts("volumeMounts"):
        volume = volumes.get(mount.get("name"))
        if volume is None or mount.get("subPath"):
            continue
        sources = [
            volume.part("configMap"),
            *(s.part("configMap") for s in volume.parts("projected.sources")),
        ]
        for source in sources:
            of = maps.get((pod.manifest.namespace, str(source.get("name"))))
            texts = mapping(of.tree, "data") if of else {}
            named = {item.get("key"): item.get("path") for item in source.parts("items")}
            for key in named or texts:
                if of and key in texts:
                    path = PurePosixPath(mount.get("mountPath")) / str(named.get(key, key))
                    files[str(path)] = (of, str(key), str(texts[key]))
    return files


def _of_command(text: str, files: Files) -> Iterator[Fault]:
    for path in [path for path in files if path.endswith(".sh") and path in text]:
        source, key, script = files[path]
        for wrong in command_faults(script):
            yield Fault(source.file, source.title, f"data.{key}", "entry-point", wrong, _FIX)
        text += f"\n{script}"
    for words in commands(text):
        verb = " ".join(word for word in words[:2] if not word.startswith(("-", "/")))
        args, reader = parsed(words), _READERS.get(verb)
        if reader is None or isinstance(args, str):
            continue
        given = str(getattr(args, "config", None) or getattr(args, "file", None))
        if given in files:
            source, key, _ = files[given]
            for error in _read(reader, args, given, files):
                what, fix = error.what, error.fix or _FIX
                yield Fault(source.file, source.title, f"data.{key}", "config-file", what, fix)


def _read(reader: Reader, args: argparse.Namespace, path: str, files: Files) -> Iterator[UserError]:
    """What a reader of configurations says about a mounted file."""
    folders = sorted({str(PurePosixPath(file).parent) for file in files}, key=len)
    mounts = re.compile("|".join(re.escape(f"{folder}/") for folder in reversed(folders)))
    with tempfile.TemporaryDirectory() as root:
        for file, (_, _, text) in files.items():
            here = Path(f"{root}{file}")
            here.parent.mkdir(parents=True, exist_ok=True)
            # A configuration may name another one that is mounted.
            here.write_text(mounts.sub(lambda found: f"{root}{found[0]}", text), encoding="utf-8")
        try:
            reader(args, Path(f"{root}{path}"))
        except UserError as e:
            yield UserError(e.what.replace(root, ""), fix=e.fix.replace(root, ""))


def _train(args: argparse.Namespace, file: Path) -> None:
    args.config, args.dry_run = str(file), True  # with the options of the command, as they override it
    args.verb(args, Output(io.StringIO(), as_json=False))


def _sweep(args: argparse.Namespace, file: Path) -> None:
    from qwen_ray.sweeps.spec import load_sweep

    load_sweep(file, sets=args.set, out=args.out)


def _pipeline(args: argparse.Namespace, file: Path) -> None:
    from qwen_ray.lifecycle.spec import PipelineSpec

    PipelineSpec.read(file, sets=args.set)


_READERS: dict[str, Reader] = {"train": _train, "sweep": _sweep, "pipeline run": _pipeline}
