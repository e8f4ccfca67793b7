"""Keep ONNX Runtime from computing an INT8 product in float because of the ReLU behind it.

Its optimiser (``QDQSelectorActionTransformer``, seen in onnxruntime 1.31) looks for the quantiser of a MatMul or Gemm
behind a Relu or Clip that is its only reader, where that has a single reader in turn. Where that reader is no
quantiser, or one with codes past the bounds, it gives the whole product up, although the integer kernel could well give
floats. ``Max`` and ``Min`` compute the same and are passed over.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.report import PassReport

_PRODUCTS = ("MatMul", "Gemm")


def spare_products(graph: gs.Graph) -> PassReport:
    """Rewrite ``Relu(x)`` as ``Max(x, 0)`` and ``Clip(x, a, b)`` as ``Min(Max(x, a), b)`` behind INT8 products.

    Args:
        graph: Quantised for ``ort``, without the ReLU that became the clipping of a quantiser. Edited in place.

    Returns:
        Changed: the ReLU and Clip nodes.
    """
    outputs = {id(tensor) for tensor in graph.outputs}
    changed = [node for node in graph.nodes if node.op in ("Relu", "Clip") and _hides(node, outputs)]
    for node in changed:
        if node.op == "Relu":
            zero = gs.Constant(f"{node.name}/zero", np.zeros((), node.inputs[0].dtype or np.float32))
            node.op, node.inputs = "Max", [node.inputs[0], zero]
        else:
            _spell_clip(graph, node)
    return PassReport("spare_products", tuple(node.name for node in changed))


def _hides(node: gs.Node, outputs: set[int]) -> bool:
    """Whether a Relu or Clip is all that reads an INT8 product, and one node alone reads it."""
    data, made = node.inputs[0], node.outputs[0]
    layer = data.inputs[0] if data.inputs else None
    if layer is None or layer.op not in _PRODUCTS or id(data) in outputs or id(made) in outputs:
        return False
    if len(data.outputs) != 1 or len(made.outputs) != 1:
        return False
    makers = [operand.inputs[0].op if operand.inputs else "" for operand in layer.inputs[:2]]
    return makers == ["DequantizeLinear"] * 2


def _spell_clip(graph: gs.Graph, node: gs.Node) -> None:
    """Spell a Clip with one bound or two, in place; one without bounds becomes an Identity."""
    low, high = (node.inputs[i] if len(node.inputs) > i else gs.Variable.empty() for i in (1, 2))
    bounds = [(op, bound) for op, bound in (("Max", low), ("Min", high)) if not _is_absent(bound)]
    if len(bounds) < 2:
        node.op, node.inputs = (
            (bounds[0][0], [node.inputs[0], bounds[0][1]]) if bounds else ("Identity", node.inputs[:1])
        )
        return
    data = node.inputs[0]
    raised = gs.Variable(f"{node.outputs[0].name}/raised", data.dtype, data.shape)
    graph.nodes.append(gs.Node("Max", f"{node.name}/Max", inputs=[data, low], outputs=[raised]))
    node.op, node.inputs = "Min", [raised, high]


def _is_absent(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Variable) and tensor.is_empty()
