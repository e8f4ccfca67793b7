"""Weights that the runtime is handed as they lie in memory, beside a model that only names them.

So a network is cut, extended and loaded without its weights being copied, serialised and parsed each time.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime as ort

from calib.model import empty_like

# Smaller ones may be what shapes are inferred from.
_LEAST_BYTES = 1 << 10
_Tensor = onnx.TensorProto


def apart(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, onnx.TensorProto]]:
    """A copy of a network in which its large float32 weights are only named, and those weights."""
    fed = {value.name for value in model.graph.input}
    weights = {t.name: t for t in model.graph.initializer if t.name not in fed and _is_plain(t)}
    bare = empty_like(model)
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.output.extend(model.graph.output)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    for tensor in model.graph.initializer:
        if tensor.name not in weights:
            bare.graph.initializer.append(tensor)
            continue
        named = bare.graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        named.data_location = _Tensor.EXTERNAL
        named.external_data.add(key="location", value="memory")
    return bare, weights


def _is_plain(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor holds float32 numbers as this machine does, and as many as it says."""
    if tensor.data_type != _Tensor.FLOAT or tensor.data_location == _Tensor.EXTERNAL or sys.byteorder != "little":
        return False
    size = len(tensor.raw_data)
    return size >= _LEAST_BYTES and size == 4 * np.prod(tensor.dims, dtype=np.int64)


def values_of(model: onnx.ModelProto, weights: Mapping[str, onnx.TensorProto]) -> dict[str, ort.OrtValue]:
    """The weights that a model only names, for the runtime: it reads them where they are, as long as it runs."""
    names = [tensor.name for tensor in model.graph.initializer if tensor.name in weights]
    arrays = {name: np.frombuffer(weights[name].raw_data, np.float32).reshape(weights[name].dims) for name in names}
    return {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
