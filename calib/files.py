"""Files that are whole or absent (temporary name, then rename), and their hashes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calib.errors import FileError

_CHUNK = 1 << 20


@contextlib.contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``target``; rename it onto ``target`` if the block ends well.

    A failed block leaves ``target`` as it was, and no temporary file behind. A link stays, and what it points to is
    written.

    Raises:
        FileError: the folder does not exist or is not writable, or ``target`` is a folder, a device or a pipe.
    """
    check_writable(target)
    target = behind_links(target)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError), temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    except OSError as error:
        raise FileError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Refuse an output path before hours of work are spent on it.

    Raises:
        FileError: the folder is missing or not writable, or ``target`` is itself a folder, a device or a pipe.
    """
    folder = behind_links(target).parent
    if not folder.is_dir():
        raise FileError(f"cannot write {target}: {folder} is not a folder", hint=f"mkdir -p {folder}")
    if target.is_dir():
        raise FileError(f"cannot write {target}: it is a folder", hint="name a file inside it")
    if target.exists() and not target.is_file():
        # A file is put in its place when it is whole: as root that would take away /dev/null from everybody.
        raise FileError(f"cannot write {target}: it is a device or a pipe, no file", hint="name a file")
    if not os.access(folder, os.W_OK):
        raise FileError(f"cannot write {target}: no permission to write in {folder}")


def behind_links(target: Path) -> Path:
    """What a link points to, whether it exists or not; another path as it is."""
    return Path(os.path.realpath(target)) if target.is_symlink() else target


def require_file(path: Path, *, to: str = "read") -> None:
    """Refuse an input that is not there, before anything is done with the others.

    Args:
        path: A file, or a link to one.
        to: What it is wanted for, as in "cannot read the model x.onnx".

    Raises:
        FileError: it does not exist, is a folder, or its name is none that the system takes.
    """
    try:
        if path.is_file():
            return
        why = "is a folder" if path.is_dir() else "does not exist"
    except OSError as error:  # longer than the system takes
        raise FileError(f"cannot {to} {path}: {error.strerror or error}") from error
    raise FileError(f"cannot {to} {path}: it {why}")


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, where it does not exist.

    Raises:
        FileError: a file is in the way, or there is no permission.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"cannot make the folder {folder}: {error.strerror or error}") from error
    check_writable(folder / "anything")


def write_text(target: Path, text: str) -> None:
    """Write ``text`` as UTF-8, whole or not at all."""
    with atomic_path(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all. NaN and Inf are refused: they are not JSON."""
    write_text(target, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(source: Path, *, max_bytes: int = 1 << 30) -> Any:
    """Read JSON from a file of at most ``max_bytes``.

    Raises:
        FileError: the file is missing, too large, or not JSON.
    """
    try:
        if source.stat().st_size > max_bytes:
            raise FileError(f"{source} is larger than {max_bytes} bytes, so it is not one of our files")
        return json.loads(source.read_text(encoding="utf-8"))
    except OSError as error:
        raise FileError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{source} is not valid JSON: {error}", hint="it may be cut short; make it again") from error


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, as 64 hex digits."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
