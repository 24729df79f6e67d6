"""The files that go to the cluster with a job: what git would keep of the current folder."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import qwen_ray
from qwen_ray.errors import UserError

LIMIT = 256 * 2**20
"""Bytes of files, unpacked. Ray keeps packages in the head's memory and refuses them above 500 MiB."""
_MINUTE = 60.0
# Where git does not say what is left out. The first row is never sent, git or not.
_GIT = ".git"
_IGNORED_FOLDERS = {
    *("__pycache__", ".venv", "venv", "env", "node_modules", "runs", "wandb", "dist", "build", ".tox"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".cache"),
}
_IGNORED_FILES = ("*.pyc", "*.pyo", ".DS_Store", "*.swp")
_SECRETS = (
    ".env",
    ".env.*",
    "*.pem",
    "*.key",
    "auth_token",
    ".netrc",
    "id_rsa",
    "id_ed25519",
    "*.kubeconfig",
)
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the zip of the same files is the same bytes


@dataclass(frozen=True)
class Package:
    """Files as a zip under a name made of their content, as Ray names packages."""

    uri: str
    data: bytes
    files: frozenset[str]
    """Paths inside, with ``/``."""
    withheld: tuple[str, ...] = ()
    """Files left out because they look like secrets."""

    def holds(self, path: str) -> bool:
        """Whether a file, or a folder with something in it, is inside. ``path``: normalised, relative."""
        return path == "." or path in self.files or any(f.startswith(f"{path}/") for f in self.files)


def working_tree(root: Path, *, limit: int = LIMIT) -> Package:
    """The current state of ``root``: in git, what it tracks and what is new and not ignored; elsewhere, all
    but what is usually ignored. Never ``.git``, and no untracked file that looks like a secret.

    Raises :class:`UserError` naming the largest files if there are more than ``limit`` bytes.
    """
    found = _git_files(root)
    tracked: frozenset[str] = frozenset()
    if found is None:
        paths = sorted(_walk(root))
    else:
        tracked, paths = frozenset(found[0]), sorted({*found[0], *found[1]})
    secret = [path for path in paths if path not in tracked and _matches(path, _SECRETS)]
    withheld = frozenset(secret)
    files = {path: root / path for path in paths if path not in withheld and (root / path).is_file()}
    _check_size(root, files, limit)
    return _package(files, withheld=tuple(secret))


def own_package() -> Package:
    """The installed ``qwen_ray`` itself, for clusters that have its dependencies but not it."""
    folder = Path(qwen_ray.__file__).parent
    return _package({f"{folder.name}/{path}": folder / path for path in _walk(folder)})


def _git_files(root: Path) -> tuple[list[str], list[str]] | None:
    """Paths tracked by git, and those that are new and not ignored. None: no git here."""

    def listed(*options: str) -> list[str]:
        done = subprocess.run(
            ["git", "-C", str(root), "ls-files", "-z", *options],
            capture_output=True,
            check=True,
            timeout=_MINUTE,
        )
        return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]

    try:
        return listed("--cached", "--recurse-submodules"), listed("--others", "--exclude-standard")
    except subprocess.TimeoutExpired:
        said = "it did not list the files within a minute"
    except FileNotFoundError:
        said = "it is not installed"
    except subprocess.CalledProcessError as e:
        said = e.stderr.decode(errors="replace").strip().splitlines()[0]
    if not any((folder / _GIT).exists() for folder in (root.resolve(), *root.resolve().parents)):
        return None
    raise UserError(f"git does not say what it ignores here: {said}", where=str(root))


def _walk(root: Path) -> Iterable[str]:
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(
            name
            for name in inner
            if name not in _IGNORED_FOLDERS and name != _GIT and not name.endswith(".egg-info")
        )
        for name in names:
            if not _matches(name, _IGNORED_FILES):
                yield Path(folder, name).relative_to(root).as_posix()


def _matches(path: str, patterns: Iterable[str]) -> bool:
    name = path.rpartition("/")[2]
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _check_size(root: Path, files: Mapping[str, Path], limit: int) -> None:
    sizes = {name: path.stat().st_size for name, path in files.items()}
    if (total := sum(sizes.values())) <= limit:
        return
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:5]
    named = ", ".join(f"{name} ({sizes[name] / 2**20:,.0f} MiB)" for name in largest)
    raise UserError(
        f"{total / 2**20:,.0f} MiB of files in {len(files)} files would be sent; the limit is "
        f"{limit / 2**20:,.0f} MiB. The largest: {named}",
        where=str(root),
        fix="put data and models on storage that the nodes mount, and let git ignore them (.gitignore)",
    )


def _package(files: Mapping[str, Path], withheld: tuple[str, ...] = ()) -> Package:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            executable = files[name].stat().st_mode & 0o111
            entry.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(entry, files[name].read_bytes())
    data = buffer.getvalue()
    uri = f"gcs://_ray_pkg_{hashlib.sha256(data).hexdigest()[:16]}.zip"
    return Package(uri, data, frozenset(files), withheld)
