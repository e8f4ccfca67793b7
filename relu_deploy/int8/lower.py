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


def prelu_to_leaky(graph: gs.Graph) -> None:
    """Rewrite ``PRelu`` of one slope for all as ``LeakyRelu``: the same function, and only this has an integer kernel.

    A PReLU that is shared by all channels is exported with one slope; one of which training never moved the slopes has
    equal ones.
    """
    for node in graph.nodes:
        if node.op != "PRelu" or not isinstance(node.inputs[1], gs.Constant):
            continue
        slopes, shape = np.unique(node.inputs[1].values), node.inputs[0].shape
        # Slopes of more axes than the input has would give the result their shape.
        if slopes.size == 1 and shape is not None and node.inputs[1].values.ndim <= len(shape):
            node.op, node.attrs = "LeakyRelu", {"alpha": float(slopes[0])}
            del node.inputs[1]


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
