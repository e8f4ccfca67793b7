"""Checkpoints: whole or absent, read without executing them, and refused for another run than theirs."""

from __future__ import annotations

import contextlib
import fcntl
import io
import pickle
import random
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from calib.errors import FileError
from calib.files import atomic_path
from relu_deploy.errors import TrainingError

KEPT = 2
_NAME = re.compile(r"step-(\d+)\.pt")
_DAMAGED = (RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError, pickle.UnpicklingError)


def save(folder: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Write a checkpoint, then remove all but the newest two.

    Raises:
        FileError: it cannot be written; those that were there are still there.
    """
    buffer = io.BytesIO()  # torch's own writer reports a full disk as an internal error
    torch.save(dict(state), buffer)
    target = folder / f"step-{step:09d}.pt"
    with atomic_path(target) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    for old in existing(folder)[:-KEPT]:
        old.unlink(missing_ok=True)
    return target


def existing(folder: Path) -> list[Path]:
    """Checkpoints, oldest first."""
    return sorted(path for path in folder.glob("step-*.pt") if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    return int(match.group(1)) if match else -1


def newest(folder: Path) -> str:
    """What is kept, for messages about a training that stopped."""
    found = existing(folder)
    return f"the checkpoint of step {step_of(found[-1])} is kept" if found else "there is no checkpoint yet"


def load_newest(folder: Path) -> tuple[dict[str, Any], Path, tuple[str, ...]] | None:
    """The newest checkpoint that can be read, and a phrase for each newer one that cannot; None without any.

    Raises:
        FileError: there are checkpoints, and none can be read.
    """
    notes: list[str] = []
    found = existing(folder)
    for path in reversed(found):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (*_DAMAGED, OSError) as error:
            notes.append(f"{path} cannot be read ({str(error).splitlines()[0][:120] if str(error) else 'damaged'})")
            continue
        if isinstance(state, dict) and state.get("format") == 1:
            return state, path, tuple(notes)
        notes.append(f"{path} is no checkpoint of this version")
    if found:
        raise FileError("; ".join(notes), hint="remove the folder and start again")
    return None


def check_same_run(stored: Mapping[str, Any], mine: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with another configuration, network or data; ``stored`` and ``mine`` map names to plain values.

    Raises:
        TrainingError: names what differs.
    """
    different = [name for name in mine if stored.get(name) != mine[name]]
    if different:
        name = different[0]
        values = f": {stored.get(name)!r} there, {mine[name]!r} here" if not str(name).endswith("fingerprint") else ""
        raise TrainingError(
            f"{path} is of another run: {name} differs{values}",
            hint="resume with what the run was started with (config.json in its folder), or choose another folder",
        )


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder for this run; the system gives the lock back however the process ends.

    Raises:
        FileError: another process has it.
    """
    try:
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise FileError(f"cannot write in {folder}: {error.strerror or error}") from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise FileError(
                f"another process trains in {folder}", hint="wait for it, or choose another folder"
            ) from None
        yield


def random_state() -> dict[str, Any]:
    """The states of torch's, numpy's and Python's generators, as tensors and plain values."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002  # what data sets draw from
    version, numbers, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(gauss)],
        "python": [version, list(numbers), gauss_next],
    }  # fmt: skip


def set_random_state(state: Mapping[str, Any]) -> None:
    """Put the generators where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, numbers, gauss_next = state["python"]
    random.setstate((version, tuple(numbers), gauss_next))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the generators for a while and give them back as they were: a library does not reseed its caller."""
    before = random_state()
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)
    try:
        yield
    finally:
        set_random_state(before)
