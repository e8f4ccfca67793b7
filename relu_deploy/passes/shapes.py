"""Give every tensor of a graph the type and shape that follow from the network's inputs."""

from __future__ import annotations

import onnx
import onnx_graphsurgeon as gs

from relu_deploy.graph import fits_one_message


def annotate(graph: gs.Graph, model: onnx.ModelProto) -> None:
    """Write inferred types and shapes into the tensors of ``graph`` that have none.

    Args:
        graph: Graphsurgeon's view of ``model``; edited in place.
        model: Not changed. One past 2 GiB, or that onnx cannot infer, is left as it is: passes then refuse what needs
            a shape, and say so.
    """
    if not fits_one_message(model):
        return
    try:
        inferred = gs.import_onnx(onnx.shape_inference.infer_shapes(model, data_prop=True)).tensors()
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError, IndexError):  # it is C++, which raises these
        return
    for name, tensor in graph.tensors().items():
        known = inferred.get(name)
        if not isinstance(tensor, gs.Variable) or not isinstance(known, gs.Variable):
            continue
        if known.type != "tensor_type":  # a sequence; written with a shape it would be a tensor
            continue
        tensor.dtype = known.dtype if tensor.dtype is None else tensor.dtype
        tensor.shape = known.shape if tensor.shape is None else tensor.shape
