"""Spellings that have no integer kernel in ONNX Runtime, turned into equal ones that have."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs


def spatial_mean_to_pool(graph: gs.Graph) -> dict[str, str]:
    """Rewrite ``ReduceMean`` over all spatial axes of (N, C, H, W) as ``GlobalAveragePool``.

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
            pooled = gs.Variable(f"{output.name}/pooled", dtype=output.dtype, shape=(*data.shape[:2], 1, 1))
            aliases[pooled.name] = output.name
            graph.nodes.append(gs.Node("Flatten", f"{node.name}/Flatten", {"axis": 1}, [pooled], [output]))
        graph.nodes.append(gs.Node("GlobalAveragePool", node.name, inputs=[data], outputs=[pooled]))
    return aliases


def matmul_add_to_gemm(graph: gs.Graph) -> int:
    """Rewrite ``MatMul`` with constant weights and ``Add`` of a constant vector as ``Gemm``, for 2-D inputs.

    ONNX Runtime does this by itself before it looks for integer kernels, and then finds a Gemm whose bias carries no
    int32 Q/DQ, which it runs in float. So the Gemm has to exist before its bias is quantised.

    Returns:
        How many pairs were rewritten; a Gemm keeps the name of its MatMul.
    """
    rewritten = 0
    for node in list(graph.nodes):
        if node.op != "MatMul" or (add := _bias_add(node, graph)) is None:
            continue
        bias = next(t for t in add.inputs if isinstance(t, gs.Constant))
        output = add.outputs[0]
        inputs = [*node.inputs, gs.Constant(f"{node.name}/C", bias.values.reshape(-1))]
        node.inputs, node.outputs, add.inputs, add.outputs = [], [], [], []
        graph.nodes.append(gs.Node("Gemm", node.name, inputs=inputs, outputs=[output]))
        rewritten += 1
    return rewritten


def _bias_add(node: gs.Node, graph: gs.Graph) -> gs.Node | None:
    """The Add that gives a 2-D MatMul its bias, where nothing else reads the product."""
    data, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
    if not isinstance(weight, gs.Constant) or weight.values.ndim != 2 or data.shape is None or len(data.shape) != 2:
        return None
    if len(product.outputs) != 1 or any(product is output for output in graph.outputs):
        return None
    add = product.outputs[0]
    constants = [t.values for t in add.inputs if isinstance(t, gs.Constant)]
    if add.op != "Add" or len(constants) != 1 or constants[0].ndim > 2:
        return None
    return add if constants[0].shape in ((weight.values.shape[1],), (1, weight.values.shape[1])) else None


def _is_spatial(node: gs.Node) -> bool:
    """Whether a ReduceMean takes a 4-D tensor over exactly its axes 2 and 3."""
    shape = node.inputs[0].shape
    axes = _axes(node)
    if shape is None or len(shape) != 4 or axes is None:
        return False
    return sorted(axis % 4 for axis in axes) == [2, 3]


def _axes(node: gs.Node) -> list[int] | None:
    """Axes of a reduction: an attribute before opset 18, an input since; None where absent or computed."""
    axes: Any = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and isinstance(node.inputs[1], gs.Constant):
        axes = node.inputs[1].values
    return None if axes is None else [int(axis) for axis in np.asarray(axes).reshape(-1)]
