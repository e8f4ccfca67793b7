"""What the weights of a layer are multiplied with, written as rows: ``y = W x`` for each row ``x``.

A convolution is a matrix product over the windows of its input (im2col), with a matrix for each group.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.store import weight_axis

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Windows:
    """How a layer reads its input.

    Attributes:
        groups: Matrices of the layer; 1 for all but grouped convolutions.
        kernel: Extents of the window; empty for products of matrices.
        strides: Between windows.
        dilations: Between the elements of a window.
        pads: Zeros before and behind each axis; None: as ``auto_pad`` says, ``same`` to the end or the front.
        same: ``SAME_UPPER``, ``SAME_LOWER`` or empty.
    """

    groups: int = 1
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    same: str = ""

    def padded(self, x: Array) -> Array:
        """``(N, C, *space)`` with the zeros that the layer puts around it."""
        rank = len(self.kernel)
        before, behind = list(self.pads[:rank]), list(self.pads[rank:])
        if self.same:
            for at, extent in enumerate(x.shape[2:]):
                span = (self.kernel[at] - 1) * self.dilations[at] + 1
                total = max((-(-extent // self.strides[at]) - 1) * self.strides[at] + span - extent, 0)
                small, large = total // 2, total - total // 2
                before[at], behind[at] = (small, large) if self.same == "SAME_UPPER" else (large, small)
        return np.pad(x, [(0, 0), (0, 0), *zip(before, behind, strict=True)])

    def rows(self, x: Array, most: int, seed: int) -> Floats:
        """Rows of one input, ``(groups, n, K)``, float32; at most ``most`` of them, the same ones for equal shapes.

        Args:
            x: Input of the layer.
            most: Rows to pick at random where there are more.
            seed: What decides which.
        """
        if not self.kernel:
            flat = x.reshape(-1, x.shape[-1])
            return np.ascontiguousarray(flat[_picked(len(flat), most, seed)], np.float32)[None]
        x = self.padded(x)
        spans = [(k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True)]
        seen = np.lib.stride_tricks.sliding_window_view(x, spans, axis=tuple(range(2, x.ndim)))
        rank = len(self.kernel)
        steps = [slice(None), slice(None), *(slice(None, None, step) for step in (*self.strides, *self.dilations))]
        seen = seen[tuple(steps)]
        places = (seen.shape[0], *seen.shape[2 : 2 + rank])
        chosen = np.unravel_index(_picked(int(np.prod(places)), most, seed), places)
        taken = np.moveaxis(seen, 1, rank + 1)[chosen]  # (n, C, *kernel)
        grouped = taken.reshape(len(taken), self.groups, -1).astype(np.float32)
        return np.ascontiguousarray(grouped.transpose(1, 0, 2))


def windows_of(node: gs.Node) -> Windows | None:
    """How a layer with constant weights reads its input; None where its weights are no matrix over windows."""
    shape = node.inputs[1].values.shape
    if node.op in ("Gemm", "MatMul"):
        return Windows() if len(shape) == 2 and not node.attrs.get("transA", 0) else None
    if node.op != "Conv":
        return None
    rank = len(shape) - 2
    same = str(node.attrs.get("auto_pad", "NOTSET"))
    return Windows(
        groups=int(node.attrs.get("group", 1)), kernel=tuple(shape[2:]),
        strides=_ints(node, "strides", [1] * rank), dilations=_ints(node, "dilations", [1] * rank),
        pads=(0,) * 2 * rank if same == "VALID" else _ints(node, "pads", [0] * 2 * rank),
        same=same if same.startswith("SAME") else "",
    )  # fmt: skip


def as_matrix(node: gs.Node, weight: Array, groups: int) -> Array:
    """Weights as ``(groups, R, K)``: a row for each output channel."""
    rows = np.moveaxis(weight, weight_axis(node) or 0, 0)
    return rows.reshape(groups, rows.shape[0] // groups, -1)


def from_matrix(node: gs.Node, matrix: Array, like: Array) -> Array:
    """Undo :func:`as_matrix`; ``like`` gives the shape."""
    axis = weight_axis(node) or 0
    shape = np.moveaxis(like, axis, 0).shape
    return np.ascontiguousarray(np.moveaxis(matrix.reshape(shape), 0, axis))


def _ints(node: gs.Node, name: str, default: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(value) for value in node.attrs.get(name, default))


def _picked(count: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(seed).choice(count, most, replace=False))
