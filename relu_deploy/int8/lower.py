"""Spellings that have no integer kernel in ONNX Runtime, turned into equal ones that have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs


def spatial_mean_to_pool(graph: gs.Graph) -> dict[str, str]:
    """Rewrite ``ReduceMean`` over all spatial axes of (N, C, ...) as ``GlobalAveragePool``.

    Exporters write adaptive average pooling to 1x1, and ``x.mean((2, 3))``, as ReduceMean. The two operators are
    equal up to the order of summation; only the second has an integer kernel.

    Returns:
        New tensor name -> name of the tensor with the same values, whose range it therefore has.
    """
    aliases: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "ReduceMean" or not _is_spatial(node):
            continue
        data, output = node.inputs[0], node.outputs[0]
        keepdims = node.attrs.get("keepdims", 1)
        node.inputs, node.outputs = [], []
        pooled = output
        if not keepdims:
            pooled = gs.Variable(
                f"{output.name}/pooled", dtype=output.dtype, shape=(*data.shape[:2], *(1,) * (len(data.shape) - 2))
            )
            aliases[pooled.name] = output.name
            graph.nodes.append(gs.Node("Flatten", f"{node.name}/Flatten", {"axis": 1}, [pooled], [output]))
        graph.nodes.append(gs.Node("GlobalAveragePool", node.name, inputs=[data], outputs=[pooled]))
    return aliases


def _is_spatial(node: gs.Node) -> bool:
    """Whether a ReduceMean takes a tensor of 3 to 5 axes over exactly those from axis 2 on."""
    shape = node.inputs[0].shape
    axes = _axes(node)
    if shape is None or not 3 <= len(shape) <= 5 or axes is None:
        return False
    return sorted(axis % len(shape) for axis in axes) == list(range(2, len(shape)))


def _axes(node: gs.Node) -> list[int] | None:
    """Axes of a reduction: an attribute before opset 18, an input since; None where absent or computed."""
    axes: Any = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values
    return None if axes is None else [int(axis) for axis in np.asarray(axes).reshape(-1)]
