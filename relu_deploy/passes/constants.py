"""Turn what depends on constants alone into initializers: Constant nodes, ``1 - gamma``, shape arithmetic.

Each node is computed by ONNX Runtime itself, so the value is the one that a runtime would have computed.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from calib.errors import first_line
from calib.runtime import RUNTIME_ERRORS
from calib.session import open_session
from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import array_values, detach, dims, is_standard, known_shape
from relu_deploy.report import PassReport, Skip

# A folded value may be as large as what it was computed from, or this many bytes: shape arithmetic, masks, small
# tables.
FREE_BYTES = 1 << 16
# Quantised weights must stay behind their DequantizeLinear; random numbers are not constants.
_NEVER = (
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "RandomNormal", "RandomUniform", "RandomNormalLike",
    "RandomUniformLike", "Bernoulli", "Multinomial", "If", "Loop", "Scan",
)  # fmt: skip


def fold_constants(graph: gs.Graph) -> PassReport:
    """Compute nodes whose inputs are all known, where the result is small.

    Args:
        graph: Sorted topologically, shapes known where they can be. Edited in place.

    Returns:
        Changed: the nodes that became initializers. Skipped: those whose result would be large or cannot be computed.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    outputs = {id(tensor) for tensor in graph.outputs}
    learned: set[int] = set()
    for node in graph.nodes:
        if node.op in _NEVER or not is_standard(node, node.op):
            continue
        used = [tensor for tensor in node.outputs if not tensor.is_empty()]
        try:
            value = _value_of(node, graph) if len(used) == 1 and id(used[0]) not in outputs else None
        except _CannotFoldError as error:
            skipped.append(Skip(node.name, str(error)))
            continue
        if value is not None:
            detach(node)
            used[0].to_constant(value)
            changed.append(node.name)
            learned.add(id(used[0]))
        elif any(id(tensor) in learned for tensor in node.inputs):
            learned.update(_learn(node, graph))
    drop_detached(graph)
    return PassReport("fold_constants", tuple(changed), tuple(skipped))


def _learn(node: gs.Node, graph: gs.Graph) -> list[int]:
    """Infer shapes of live tensors anew, now that more of what they follow from is known; those that this told more."""
    if all(known_shape(tensor) is not None for tensor in node.outputs if not tensor.is_empty()):
        return []
    try:
        inferred = {value.name: value.type.tensor_type for value in _single_node_model(node, graph).graph.output}
    except (_CannotFoldError, onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return []
    return [id(tensor) for tensor in node.outputs if not tensor.is_empty() and _refine(tensor, inferred[tensor.name])]


def _refine(tensor: gs.Variable, kind: onnx.TypeProto.Tensor) -> bool:
    """Write what was inferred into a tensor, if it says more than is known."""
    if tensor.type != "tensor_type" or not kind.elem_type or not kind.HasField("shape"):
        return False
    shape = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]
    known = sum(size is not None for size in dims(tensor) or ())
    if sum(isinstance(size, int) for size in shape) <= known:
        return False
    tensor.shape = shape
    tensor.dtype = tensor.dtype or onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
    return True


class _CannotFoldError(Exception):
    """Why a node with constant inputs stays."""


def _value_of(node: gs.Node, graph: gs.Graph) -> Any:
    """Value of a node's output (an array or graphsurgeon's lazy values); None where it is not constant."""
    if node.op == "Constant":
        return _constant_node(node)
    if node.op == "Shape":
        return _static_shape(node)
    if node.op == "CastLike":
        return _cast_like(node)
    if not node.inputs or not all(t.is_empty() or isinstance(t, gs.Constant) for t in node.inputs):
        return None
    return _compute(node, graph)


def _constant_node(node: gs.Node) -> Any:
    value = node.attrs.get("value")
    if isinstance(value, gs.Constant):
        return value._values  # noqa: SLF001 - lazy values keep types that numpy has not (bfloat16, int4)
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64}
    for name, kind in kinds.items():
        if name in node.attrs:
            return np.array(node.attrs[name], dtype=kind)
    return None


def _static_shape(node: gs.Node) -> np.ndarray | None:
    """Shape of a tensor whose every dimension is known beforehand."""
    shape = node.inputs[0].shape
    if shape is None or not all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape):
        return None
    if isinstance(node.inputs[0], gs.Variable) and not shape and node.inputs[0].dtype is None:
        return None  # graphsurgeon writes an unknown shape of an untyped tensor as ()
    start, end = node.attrs.get("start", 0), node.attrs.get("end", len(shape))
    return np.array(list(shape)[start:end], dtype=np.int64)


def _cast_like(node: gs.Node) -> np.ndarray | None:
    """A constant in the type of a live tensor, of which only the type is needed; between floats of numpy."""
    value, like = node.inputs[0], node.inputs[1].dtype
    if not isinstance(value, gs.Constant) or like is None or isinstance(like, int):
        return None
    values = np.asarray(value.values)
    return values.astype(like) if values.dtype.kind == np.dtype(like).kind == "f" else None


def _compute(node: gs.Node, graph: gs.Graph) -> np.ndarray | None:
    model = _single_node_model(node, graph)
    size, taken = _result_bytes(model), sum(len(t.raw_data) for t in model.graph.initializer)
    if size is None:
        raise _CannotFoldError("the size of its result is not known beforehand")
    if size > max(FREE_BYTES, taken):
        raise _CannotFoldError(f"its result has {size} bytes, more than the {taken} it is computed from")
    try:
        result = open_session(model, optimise=True, threads=1).run(None, {})[0]
    except RUNTIME_ERRORS as error:
        raise _CannotFoldError(f"ONNX Runtime cannot compute it: {first_line(error, limit=120)}") from error
    return np.asarray(result)


def _single_node_model(node: gs.Node, graph: gs.Graph) -> onnx.ModelProto:
    """The node alone, its constants as initializers and what is live as inputs; types of its outputs inferred."""
    initializers, live = [], []
    for tensor in {id(t): t for t in node.inputs if not t.is_empty()}.values():
        if isinstance(tensor, gs.Constant):
            initializers.append(_initializer(tensor))
        else:
            live.append(gs.exporters.onnx_exporter.OnnxExporter.export_value_info_proto(tensor, do_type_check=False))
    proto = gs.exporters.onnx_exporter.OnnxExporter.export_node(node)
    results = [onnx.ValueInfoProto(name=tensor.name) for tensor in node.outputs if not tensor.is_empty()]
    body = onnx.helper.make_graph([proto], "fold", live, results, initializers)
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", graph.opset)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def _initializer(tensor: gs.Constant) -> onnx.TensorProto:
    values = array_values(tensor)
    if values is None or values.dtype.kind not in "fiub":
        raise _CannotFoldError(f"its input {tensor.name} is of a type that is not computed with here")
    return onnx.numpy_helper.from_array(np.ascontiguousarray(values).reshape(values.shape), tensor.name)


def _result_bytes(model: onnx.ModelProto) -> int | None:
    """Bytes of the result by shape inference; None where it does not tell."""
    kind = model.graph.output[0].type.tensor_type
    if not kind.elem_type or not kind.HasField("shape") or not all(d.HasField("dim_value") for d in kind.shape.dim):
        return None
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if dtype.kind not in "fiub":
        raise _CannotFoldError("its result is of a type that is not computed with here")
    return math.prod((dtype.itemsize, *(dimension.dim_value for dimension in kind.shape.dim)))
