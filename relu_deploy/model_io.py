"""The inputs and outputs of an ONNX model."""

from __future__ import annotations

import numpy as np
import onnx

from relu_deploy.errors import ModelError
from relu_deploy.graph import fits_one_message
from relu_deploy.tensors import TensorSpec


def model_io(model: onnx.ModelProto) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs (without initializers that old files list among them) and outputs of a model.

    Raises:
        ModelError: one of them is no tensor, or of a type that numpy has not.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    if not all(value.type.tensor_type.HasField("shape") for value in model.graph.output):
        model = _inferred(model)
    inputs = tuple(_spec(value) for value in model.graph.input if value.name not in stored)
    return inputs, tuple(_spec(value) for value in model.graph.output)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with shapes where onnx can tell them, as far as it is small enough to be serialised for that."""
    if not fits_one_message(model):
        return model
    try:
        return onnx.shape_inference.infer_shapes(model)
    except onnx.shape_inference.InferenceError:
        return model


def _spec(value: onnx.ValueInfoProto) -> TensorSpec:
    """The specification of a graph input or output."""
    tensor = value.type.tensor_type
    shape: tuple[int | str, ...] = ("...",)
    if tensor.HasField("shape"):
        # Some exporters write -1 for an axis that is dynamic.
        shape = tuple(dim.dim_value if dim.dim_value > 0 else dim.dim_param or "?" for dim in tensor.shape.dim)
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
    except KeyError as error:
        raise ModelError(f"{value.name!r} is not a tensor of a type that an engine can take or give") from error
    return TensorSpec(value.name, shape, dtype)
