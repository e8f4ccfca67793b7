"""What ranges must respect so that ONNX Runtime's integer kernels compute what the Q/DQ graph says."""

from __future__ import annotations

import onnx_graphsurgeon as gs


def respect_softmax(graph: gs.Graph, bounds: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Ranges in which the outputs of ``Softmax`` can be quantised safely.

    ONNX Runtime fuses a Softmax between Q/DQ to ``QLinearSoftmax``, which wraps around where every other kernel
    saturates: a probability above the calibrated largest one, or 1.0 on a grid that ends there, becomes almost 0
    (seen with onnxruntime 1.31). A probability is never above 1, so a grid on which 1.0 is code 254 cannot overflow.
    Over an axis of one element that kernel is always wrong, and such an output is left in float.

    Args:
        graph: Shapes known where they can be.
        bounds: Tensor name -> smallest and largest value measured. Not changed.

    Returns:
        The bounds, changed where a Softmax asks for it.
    """
    safe = dict(bounds)
    for node in graph.nodes:
        name = node.outputs[0].name if node.outputs else ""
        if node.op != "Softmax" or name not in safe:
            continue
        shape, axis = node.outputs[0].shape, node.attrs.get("axis", -1)
        if shape is not None and shape[axis] == 1:
            del safe[name]
        else:
            safe[name] = (0.0, 255 / 254)
    return safe
