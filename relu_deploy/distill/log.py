"""What a training leaves to read: one JSON object a line while it runs, a plot at the end."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calib.errors import FileError
from calib.files import atomic_path


class MetricsLog:
    """``metrics.jsonl``: lines of kind ``step`` and ``epoch``.

    A checkpoint stores the file's length, and a resumed run cuts it back to that, so that no step stands there twice.

    Args:
        path: The file; made if it is not there.
        length: Bytes that are kept.

    Raises:
        FileError: the file is not writable, or shorter than ``length``.
    """

    def __init__(self, path: Path, *, length: int = 0) -> None:
        self.path = path
        try:
            if length and (not path.is_file() or path.stat().st_size < length):
                raise FileError(f"{path} is shorter than at the last checkpoint", hint="put it back, or start again")
            with path.open("ab") as stream:
                stream.truncate(length)
        except OSError as error:
            raise FileError(f"cannot write {path}: {error.strerror or error}") from error

    @property
    def length(self) -> int:
        """Bytes so far."""
        return self.path.stat().st_size

    def write(self, values: Mapping[str, Any]) -> None:
        """Append a line that is on the disk when this returns.

        Raises:
            FileError: the disk is full, or the file went away.
        """
        line = json.dumps(_plain(values), allow_nan=False) + "\n"
        try:
            with self.path.open("ab") as stream:
                stream.write(line.encode())
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            what = f"cannot write {self.path}: {error.strerror or error}"
            raise FileError(what, hint="make room, then resume") from error

    def lines(self) -> list[dict[str, Any]]:
        """Everything written so far."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]


def plot(lines: Sequence[Mapping[str, Any]], target: Path, *, metric: str, teacher: float | None) -> str | None:
    """Draw loss, share of the smooth activation and metric over the steps.

    Args:
        lines: Of a :class:`MetricsLog`.
        target: A PNG file.
        metric: Which metric of the epochs.
        teacher: Its value for the teacher, a dashed line; None draws none.

    Returns:
        None, or why nothing was drawn.
    """
    if importlib.util.find_spec("matplotlib") is None:
        return "no plot: matplotlib is not installed (pip install 'relu-deploy[report]')"
    from matplotlib.figure import Figure

    steps = [line for line in lines if line["kind"] == "step"]
    epochs = [line for line in lines if line["kind"] == "epoch" and metric in line.get("metrics", {})]
    figure = Figure(figsize=(8, 8), layout="constrained")
    loss, gamma, score = figure.subplots(3, 1, sharex=True)
    for term in sorted({name for line in steps for name in line["losses"]}):
        some = [line for line in steps if term in line["losses"]]
        loss.plot([line["step"] for line in some], [line["losses"][term] for line in some], label=term)
    loss.set_ylabel("loss")
    if steps:
        loss.legend()
    some = [line for line in steps if line["smooth_share"] is not None]
    gamma.step([line["step"] for line in some], [line["smooth_share"] for line in some], where="post")
    gamma.set_ylabel("share of the smooth activation")
    gamma.set_ylim(-0.05, 1.05)
    score.plot([line["step"] for line in epochs], [line["metrics"][metric] for line in epochs], marker="o")
    if teacher is not None:
        score.axhline(teacher, linestyle="--", color="gray", label="original")
        score.legend()
    score.set_ylabel(metric)
    score.set_xlabel("step")
    with atomic_path(target) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
    return None


def _plain(value: Any) -> Any:
    """NaN and Inf are no JSON; they become text, so that the line that tells of them can be written."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
