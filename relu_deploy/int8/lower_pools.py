"""Average pools that ONNX Runtime's integer kernel would divide by another number than its float kernel.

With ``ceil_mode`` the last window may hang over the padded input. ONNX counts of it what lies inside of the padding;
QLinearAveragePool of onnxruntime 1.31 divides by the whole window where ``count_include_pad`` is set, which makes the
averages at the border too small. Each such pool has an equal spelling without that combination.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.report import PassReport, Skip


def spell_average_pools(graph: gs.Graph) -> PassReport:
    """Rewrite every AveragePool that both rounds its size up and counts padding.

    Args:
        graph: Shapes known where they can be. Edited in place.

    Returns:
        Changed: pools, with a note of how. Skipped: pools with padding of whose shape too little is known.
    """
    changed: dict[str, str] = {}
    skipped: list[Skip] = []
    for node in list(graph.nodes):
        if not counts_otherwise(node):
            continue
        if not any(node.attrs.get("pads", ())):
            node.attrs["count_include_pad"] = 0
            changed[node.name] = "there is no padding to count"
            continue
        if _with_known_shape(graph, node):
            changed[node.name] = "its last windows are padded, and their averages multiplied by what that is too little"
        else:
            skipped.append(Skip(node.name, "the shape of its input is not known, or a window starts in the padding"))
    return PassReport("spell_average_pools", tuple(changed), tuple(skipped), changed)


def counts_otherwise(node: gs.Node) -> bool:
    """Whether the integer kernel may count the elements of a window otherwise than ONNX says."""
    attrs = node.attrs
    return (
        node.op == "AveragePool"
        and bool(attrs.get("ceil_mode", 0))
        and bool(attrs.get("count_include_pad", 0))
        and attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )


def _with_known_shape(graph: gs.Graph, node: gs.Node) -> bool:
    """Pad as far as the windows reach, divide by the whole window, and multiply by what that is too little."""
    shape: list[Any] = list(node.inputs[0].shape or ())[2:]
    kernel, pads = node.attrs["kernel_shape"], node.attrs["pads"]
    strides = node.attrs.get("strides", [1] * len(kernel))
    if len(shape) != len(kernel) or not all(isinstance(size, int) for size in shape):
        return False
    begins, ends = pads[: len(shape)], pads[len(shape) :]
    counts, reach = [], []
    for axis in zip(shape, begins, ends, kernel, strides, strict=True):
        count, end = _along(*axis)
        if not count.all():
            return False
        counts.append(count)
        reach.append(end)
    node.attrs |= {"pads": [*begins, *reach], "ceil_mode": 0}
    missing = np.float32(math.prod(kernel)) / math.prod(np.ix_(*counts))
    if np.all(missing == 1):
        return True
    result = node.outputs[0]
    mean = gs.Variable(f"{node.name}/whole_window", dtype=result.dtype, shape=result.shape)
    factor = gs.Constant(f"{node.name}/missing", missing[None, None].astype(result.dtype or np.float32))
    node.outputs = [mean]
    graph.nodes.append(gs.Node("Mul", f"{node.name}/Mul", {}, [mean, factor], [result]))
    return True


def _along(size: int, begin: int, end: int, width: int, stride: int) -> tuple[npt.NDArray[np.float64], int]:
    """Along one axis: how many elements each window counts, and the padding behind that they reach into.

    A window that starts in the padding behind has 0: ONNX's shape inference keeps it, ONNX Runtime drops it.

    >>> _along(8, 1, 1, 3, 2)
    (array([3., 3., 3., 3., 2.]), 2)
    """
    windows = math.ceil((size + begin + end - width) / stride) + 1
    starts = np.arange(windows) * stride - begin
    counts = np.minimum(starts + width, size + end) - starts
    return np.where(starts < size, counts, 0).astype(np.float64), max(int(starts[-1]) + width - size, 0)
