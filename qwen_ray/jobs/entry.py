"""Where a job begins, on a node of the cluster: it checks what the job needs and becomes the verb.

``python -m qwen_ray.jobs.entry --qwen-ray VERSION --attempt N [--out OUT] -- VERB ARGS...``. Its command
line is seen by everybody who may list jobs, and holds no secret.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from qwen_ray import __version__
from qwen_ray.doctor.ranges import misfits
from qwen_ray.errors import EXIT_BAD_INPUT, UserError
from qwen_ray.jobs import secrets

FILES = "files"
"""Beside what a job writes, OUT.files holds the files it came with."""


def main(argv: Sequence[str] | None = None) -> None:
    """Check, then replace this process by the verb's. Exits with 2 where something is missing."""
    args, rest = _parse(list(sys.argv[1:] if argv is None else argv))
    try:
        _check(args.qwen_ray)
        with unpacked() as here:
            if args.out:
                keep_files(here, Path(args.out))
        if rest[0] == "sweep" and args.attempt > 1:
            rest = resumed(rest)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_INPUT)
    os.execv(sys.executable, [sys.executable, "-m", "qwen_ray.cli", *rest])


@contextmanager
def unpacked() -> Iterator[Path]:
    """Go to the folder of the files that the job came with, which stays as it is while the block runs.

    Ray nodes of one machine share it, and each removes it and unpacks it anew, holding a lock beside it (Ray
    2.60, _private/runtime_env/packaging.py). So it may have gone since this process began.
    """
    with ExitStack() as held:
        try:
            here = _working_folder()
            with suppress(FileNotFoundError):  # Ray did not unpack it
                lock = held.enter_context(open(f"{here}.zip.lock", "rb"))
                fcntl.flock(lock, fcntl.LOCK_EX)
            os.chdir(here)
        except OSError as e:
            raise UserError(
                f"the job's files are not there any more ({e.strerror or e})", fix="submit again"
            ) from None
        yield here


def _working_folder() -> Path:
    """Also of one that was removed."""
    try:
        return Path.cwd()
    except FileNotFoundError:
        return Path(os.readlink("/proc/self/cwd").removesuffix(" (deleted)"))


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="qwen_ray.jobs.entry")
    parser.add_argument("--qwen-ray", required=True)
    parser.add_argument("--attempt", type=int, required=True)
    parser.add_argument("--out")
    parser.add_argument("verb", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    return args, [word for index, word in enumerate(args.verb) if index or word != "--"]


def _check(asked: str) -> None:
    if asked != __version__:
        raise UserError(
            f"this node has qwen-ray {__version__}, the job was submitted with {asked}",
            where=sys.prefix,
            fix="install the same version on both sides, or submit with --install",
        )
    if wrong := misfits():
        raise UserError(
            f"this node's packages are not those that qwen-ray {__version__} was built for: "
            + "; ".join(wrong),
            where=sys.prefix,
            fix="install qwen-ray's requirements on the nodes, or submit with --pip FILE",
        )
    if missing := secrets.load():
        raise UserError(
            f"{', '.join(missing)} not set on this node",
            where=f"the environment of Ray, {secrets.folder()}",
            fix="start Ray with it in its environment, or mount a file of that name there",
        )


def keep_files(here: Path, out: Path) -> None:
    """Put the files that the job came with beside what it writes, and go there.

    Ray's folder for them has another name whenever one of them has changed or the cluster was started
    anew; but a run is resumed only with the paths it was started with, and workers on other nodes read
    them too.
    """
    if not any(here.iterdir()):
        return
    kept, new = (out.with_name(f"{out.name}.{ending}") for ending in (FILES, f"{FILES}.new"))
    try:
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(here, new)
        shutil.rmtree(kept, ignore_errors=True)
        new.rename(kept)
    except OSError as e:
        raise UserError(
            f"the node cannot write there ({e.strerror or e})",
            where=str(out.parent),
            fix="name a path on storage that every node mounts; `qwen-ray doctor --storage` checks it",
        ) from None
    os.chdir(kept)


def resumed(argv: list[str]) -> list[str]:
    """A sweep's arguments, with ``--resume`` where its folder holds one that was begun."""
    from qwen_ray import sweep_verbs
    from qwen_ray.sweeps.folder import STATE
    from qwen_ray.sweeps.spec import load_sweep

    parser = argparse.ArgumentParser()
    sweep_verbs.add(parser.add_subparsers())
    args = parser.parse_args(argv)
    spec = load_sweep(Path(args.file), sets=args.set, out=args.out)
    begun = (Path(spec.out).expanduser() / STATE).is_file()
    return [*argv, "--resume"] if begun and not args.resume else argv


if __name__ == "__main__":
    main()
