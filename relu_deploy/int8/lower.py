"""Spellings that have no integer kernel in ONNX Runtime, turned into equal ones that have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.place import fused_relu


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


def matmul_add_to_gemm(graph: gs.Graph) -> dict[str, str]:
    """Rewrite ``MatMul`` with constant weights and ``Add`` of a constant vector as ``Gemm``.

    ONNX Runtime does this by itself before it looks for integer kernels, for 2-D inputs and for all inputs of fixed
    shape, and then finds a Gemm whose bias carries no int32 Q/DQ, which it runs in float. So the Gemm has to exist
    before its bias is quantised. Inputs of more axes are reshaped to rows, ``(B, T, K) -> (B T, K)``, and back; a ReLU
    behind the bias comes to stand before the second reshape, so that it still fuses with the Gemm's quantiser. Where
    more than one axis is unknown there is no such reshape, and ONNX Runtime does not rewrite either.

    Returns:
        New tensor name -> name of the tensor with the same values, whose range it therefore has. A Gemm keeps the name
        of its MatMul.
    """
    aliases: dict[str, str] = {}
    for node in list(graph.nodes):
        if node.op != "MatMul" or (add := _bias_add(node, graph)) is None:
            continue
        bias = next(t for t in add.inputs if isinstance(t, gs.Constant))
        data, weight, output = node.inputs[0], node.inputs[1], add.outputs[0]
        relu = fused_relu(output, graph)
        node.inputs, node.outputs, add.inputs, add.outputs = [], [], [], []
        rows, last = data, output
        if len(data.shape) > 2:
            rows = _reshaped(graph, data, f"{node.name}/rows", (-1, weight.values.shape[0]), aliases)
            last = _reshaped_from(graph, node.name, output, relu, (*data.shape[:-1], weight.values.shape[1]), aliases)
        inputs = [rows, weight, gs.Constant(f"{node.name}/C", bias.values.reshape(-1))]
        graph.nodes.append(gs.Node("Gemm", node.name, inputs=inputs, outputs=[last]))
    return aliases


def _reshaped(
    graph: gs.Graph, data: gs.Variable, name: str, shape: tuple[int, ...], aliases: dict[str, str]
) -> gs.Variable:
    """A tensor with the values of ``data`` in another shape."""
    rows = gs.Variable(name, dtype=data.dtype, shape=[None if size < 0 else size for size in shape])
    target = gs.Constant(f"{name}/shape", np.asarray(shape, np.int64))
    graph.nodes.append(gs.Node("Reshape", f"{name}/Reshape", inputs=[data, target], outputs=[rows]))
    aliases[rows.name] = data.name
    return rows


def _reshaped_from(
    graph: gs.Graph, name: str, output: gs.Variable, relu: gs.Node | None, shape: Sequence[Any], aliases: dict[str, str]
) -> gs.Variable:
    """The rows (2-D) that ``output`` is the reshape of; or, where a ReLU takes it, what the ReLU then makes of rows."""
    last = gs.Variable(f"{name}/columns", dtype=output.dtype, shape=[None, shape[-1]])
    aliases[last.name] = output.name
    made = last
    if relu is not None:
        after = relu.outputs[0]
        made = gs.Variable(f"{relu.name}/columns", dtype=after.dtype, shape=[None, shape[-1]])
        aliases[made.name] = after.name
        relu.inputs[0], relu.outputs = last, [made]
        output = after
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    target = gs.Constant(f"{name}/back", np.asarray(sizes, np.int64))
    graph.nodes.append(gs.Node("Reshape", f"{name}/back/Reshape", inputs=[made, target], outputs=[output]))
    return last


def _bias_add(node: gs.Node, graph: gs.Graph) -> gs.Node | None:
    """The Add that gives a MatMul its bias, where nothing else reads the product."""
    data, weight, product = node.inputs[0], node.inputs[1], node.outputs[0]
    if not isinstance(weight, gs.Constant) or weight.values.ndim != 2 or not _has_rows(data):
        return None
    if len(product.outputs) != 1 or any(product is output for output in graph.outputs):
        return None
    add = product.outputs[0]
    constants = [t.values for t in add.inputs if isinstance(t, gs.Constant)]
    if add.op != "Add" or len(constants) != 1:
        return None
    columns = weight.values.shape[1]
    spread = constants[0].ndim <= len(data.shape) and constants[0].shape[-1:] == (columns,)
    return add if spread and constants[0].size == columns else None


def _has_rows(data: gs.Variable) -> bool:
    """Whether a tensor of known rank can be seen as rows, and back: at most one leading axis is unknown, none empty."""
    if not isinstance(data, gs.Variable) or data.shape is None or len(data.shape) < 2:
        return False
    leading = data.shape[:-1]
    unknown = [size for size in leading if not isinstance(size, int)]
    return len(leading) == 1 or (len(unknown) <= 1 and all(size > 0 for size in leading if isinstance(size, int)))


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
