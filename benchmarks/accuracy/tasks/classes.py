"""What tasks that name one class a sample have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.accuracy.scores import Score, each
from benchmarks.accuracy.task import Array, Outputs


def answers(outputs: Outputs) -> Sequence[Any]:
    """The class of each sample, from the one output (N, classes)."""
    (scores,) = outputs.values()
    return scores.argmax(1).tolist()  # type: ignore[no-any-return]


def score(found: Sequence[int], reference: Sequence[int], truth: Mapping[str, Array]) -> dict[str, Score]:
    """Right answers, and answers that are the float network's."""
    return {
        "right": each([f == w for f, w in zip(found, truth["label"].tolist(), strict=True)]),
        "same as float": each([f == r for f, r in zip(found, reference, strict=True)]),
    }
