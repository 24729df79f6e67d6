"""The files that go to the cluster with a job: what git would keep of the current folder."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import os
import stat
import subprocess
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import qwen_ray
from qwen_ray.errors import UserError

LIMIT = 256 * 2**20
"""Bytes of files, unpacked. Ray keeps packages in the head's memory."""
PACKED_LIMIT = 95 * 2**20
"""Bytes of the zip. Ray's dashboard takes requests of up to 100 MiB."""
_MINUTE = 60.0
# Where git does not say what is left out. The first row is never sent, git or not.
_GIT = ".git"
_IGNORED_FOLDERS = {
    *("__pycache__", ".venv", "venv", "env", "node_modules", "runs", "wandb", "dist", "build", ".tox"),
    *(".mypy_cache", ".pytest_cache", ".ruff_cache", ".hypothesis", ".ipynb_checkpoints", ".cache"),
}
_IGNORED_FILES = ("*.pyc", "*.pyo", ".DS_Store", "*.swp")
# In small letters; names are compared without regard to case.
_SECRET_FOLDERS = {
    *(".ssh", ".aws", ".azure", ".kube", ".docker", ".gnupg", ".config", ".huggingface", ".ray"),
}
_SECRETS = (
    *(".env", ".env.*", "*.env", "*.pem", "*.key", "*.p12", "*.pfx", "id_*", "*.kubeconfig", "auth_token"),
    *("credentials*", "*credentials.json", ".git-credentials", ".pypirc", ".npmrc", ".netrc", "*_netrc"),
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
    """Left out because they look like secrets: files, and folders of such (with ``/`` at the end)."""

    def holds(self, path: str) -> bool:
        """Whether a file, or a folder with something in it, is inside. ``path``: normalised, relative."""
        return path == "." or bool(self._under(path))

    def digest(self, paths: Iterable[str]) -> str:
        """Hex SHA-256 of the names and contents of these files and folders, as far as they are inside."""
        found = hashlib.sha256()
        with zipfile.ZipFile(io.BytesIO(self.data)) as archive:
            for name in sorted({name for path in paths for name in self._under(path)}):
                content = hashlib.sha256(archive.read(name)).hexdigest()
                found.update(f"{content} {name}\0".encode())
        return found.hexdigest()

    def _under(self, path: str) -> list[str]:
        return [file for file in self.files if path in {".", file} or file.startswith(f"{path}/")]


def working_tree(root: Path, *, limit: int = LIMIT, packed: int = PACKED_LIMIT) -> Package:
    """The current state of ``root``: in git, what it tracks and what is new and not ignored; elsewhere, all
    but what is usually ignored. Never ``.git``, and no untracked file that looks like a secret.

    Raises :class:`UserError` naming the largest files if there are more than ``limit`` bytes, or more than
    ``packed`` in the zip, and for a file that cannot be read or named there.
    """
    found = _git_files(root)
    tracked: frozenset[str] = frozenset()
    if found is None:
        paths = sorted(_walk(root))
    else:
        tracked, paths = frozenset(found[0]), sorted({*found[0], *found[1]})
    secret = {path: _secret(path) for path in paths if path not in tracked}
    kept = [path for path in paths if not secret.get(path)]
    sizes = {path: size for path in kept if (size := _size(root / path)) is not None}
    _check_size(root, sizes, sum(sizes.values()), limit, "files")
    package = _package(
        {path: root / path for path in sizes}, withheld=tuple(dict.fromkeys(filter(None, secret.values())))
    )
    _check_size(root, sizes, len(package.data), packed, "packed files")
    return package


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


def _secret(path: str) -> str | None:
    """What looks like a secret in a path: the folder, or the whole path; None where nothing does."""
    parts = path.split("/")
    for depth, name in enumerate(parts[:-1], 1):
        if name.lower() in _SECRET_FOLDERS:
            return "/".join(parts[:depth]) + "/"
    return path if _matches(path.lower(), _SECRETS) else None


def _size(file: Path) -> int | None:
    """Bytes of a file; None for what git tracks and is gone, and for what is no file."""
    try:
        info = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        raise _unreadable(file, e) from None
    return info.st_size if stat.S_ISREG(info.st_mode) else None


def _shown(file: Path) -> str:
    """A path that can be printed, whatever its name is made of."""
    return os.fsencode(file).decode(errors="backslashreplace")


def _unreadable(file: Path, error: OSError) -> UserError:
    return UserError(
        f"it cannot be read ({error.strerror}), so it cannot be sent",
        where=_shown(file),
        fix="change its permissions, or let git ignore it (.gitignore)",
    )


def _check_size(root: Path, sizes: Mapping[str, int], total: int, limit: int, what: str) -> None:
    """``sizes``: of each file in bytes; ``total``: what is held against the limit."""
    if total <= limit:
        return
    largest = sorted(sizes, key=lambda name: (-sizes[name], name))[:5]
    named = ", ".join(f"{name} ({sizes[name] / 2**20:,.0f} MiB)" for name in largest)
    raise UserError(
        f"{total / 2**20:,.0f} MiB of {what} would be sent, {len(sizes)} in all; the limit is "
        f"{limit / 2**20:,.0f} MiB. The largest: {named}",
        where=str(root),
        fix="put data and models on storage that the nodes mount, and let git ignore them (.gitignore)",
    )


def _package(files: Mapping[str, Path], withheld: tuple[str, ...] = ()) -> Package:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            if (shown := _shown(Path(name))) != name:
                raise UserError(
                    "the name of this file is not UTF-8, so it cannot be sent",
                    where=shown,
                    fix="rename it, or let git ignore it (.gitignore)",
                )
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.compress_type = zipfile.ZIP_DEFLATED
            try:
                executable = files[name].stat().st_mode & 0o111
                content = files[name].read_bytes()
            except OSError as e:
                raise _unreadable(files[name], e) from None
            entry.external_attr = (0o755 if executable else 0o644) << 16
            archive.writestr(entry, content)
    data = buffer.getvalue()
    uri = f"gcs://_ray_pkg_{hashlib.sha256(data).hexdigest()[:16]}.zip"
    return Package(uri, data, frozenset(files), withheld)
