"""What a damaged or hostile ONNX file may hold that onnx's checker lets pass, and what reads it later trips over.

Every check is linear in the size of the file, and takes no memory for what the file only claims to hold.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from relu_deploy.errors import ModelError

# A network of a hundred thousand nodes is large; what calls of local functions unfold to beyond this is a bomb.
MAX_INLINED_NODES = 1_000_000
# The depth that onnx's own checker allows for calls of local functions.
MAX_CALL_DEPTH = 100
# Types that share a byte in ``raw_data``. How the six-bit ones are packed is not settled: their number is not checked.
_SMALL = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_UNCOUNTED = ("UNDEFINED", "FLOAT6E2M3", "FLOAT6E3M2")
_KNOWN_TYPES = frozenset(onnx.TensorProto.DataType.values())
_Graph = onnx.GraphProto | onnx.FunctionProto


def check_parsed(model: onnx.ModelProto, source: Path | str) -> None:
    """Refuse what no honest writer makes; ``source`` names the model in messages.

    Args:
        model: As parsed. External data need not be loaded.
        source: File, or what else the model came from.

    Raises:
        ModelError: text is not UTF-8, a type is none of ONNX's, a tensor holds more or less than its shape says, or
            local functions call one another in a circle or unfold to absurd sizes.
    """
    for message in _messages(model):
        _check_text(message, source)
        if isinstance(message, onnx.TensorProto):
            _check_tensor(message, source)
        kinds = (onnx.TypeProto.Tensor, onnx.TypeProto.SparseTensor)
        if isinstance(message, kinds) and message.elem_type not in _KNOWN_TYPES:
            raise _damaged(source, f"element type {message.elem_type} is none of ONNX's")
    _check_calls(model, source)


def _damaged(source: Path | str, what: str) -> ModelError:
    return ModelError(f"{source} is not a valid ONNX model: {what}", hint="copy or export it again")


def _messages(root: Message) -> Iterator[Message]:
    """A message and every one inside it, without touching the numbers that tensors hold."""
    waiting = [root]
    while waiting:
        message = waiting.pop()
        yield message
        if isinstance(message, onnx.TensorProto):
            waiting.extend(message.external_data)
            continue
        for field in message.DESCRIPTOR.fields:
            if field.type != FieldDescriptor.TYPE_MESSAGE:
                continue
            value = getattr(message, field.name)
            if isinstance(value, Message):
                if message.HasField(field.name):
                    waiting.append(value)
            else:
                waiting.extend(value)


def _check_text(message: Message, source: Path | str) -> None:
    """The parser hands text that is not UTF-8 through as bytes."""
    for field in message.DESCRIPTOR.fields:
        if field.type != FieldDescriptor.TYPE_STRING:
            continue
        value = getattr(message, field.name)
        if any(isinstance(text, bytes) for text in ([value] if isinstance(value, (str, bytes)) else value)):
            raise _damaged(source, f"{field.name} of a {message.DESCRIPTOR.name} is not text: {value!r:.80}")


def _check_tensor(tensor: onnx.TensorProto, source: Path | str) -> None:
    """Dimensions, type and, where the values lie in the file itself, their number."""
    what = f"tensor {tensor.name!r}"
    if tensor.data_type not in _KNOWN_TYPES:
        raise _damaged(source, f"{what} has the type {tensor.data_type}, which is none of ONNX's")
    if any(extent < 0 for extent in tensor.dims):
        raise _damaged(source, f"{what} has a negative dimension: {list(tensor.dims)}")
    kind = onnx.TensorProto.DataType.Name(tensor.data_type)
    if tensor.data_location == onnx.TensorProto.EXTERNAL or kind in _UNCOUNTED:
        return  # external data is measured when it is read
    found, needed, unit = _stored(tensor, kind)
    if found != needed:
        raise _damaged(source, f"{what} holds {found} {unit}, its shape {list(tensor.dims)} needs {needed}")


def _stored(tensor: onnx.TensorProto, kind: str) -> tuple[int, int, str]:
    """How much a tensor holds, how much its shape needs, and of what."""
    elements, bits = math.prod(tensor.dims), _SMALL.get(kind)
    packed = None if bits is None else (elements * bits + 7) // 8
    if tensor.HasField("raw_data"):
        size = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        return len(tensor.raw_data), elements * size if packed is None else packed, "bytes"
    field = onnx.helper.tensor_dtype_to_field(tensor.data_type)
    each = 2 if kind.startswith("COMPLEX") else 1
    return len(getattr(tensor, field)), elements * each if packed is None else packed, "values"


def _check_calls(model: onnx.ModelProto, source: Path | str) -> None:
    """Count the nodes that a model has once its local functions are unfolded; thirty calls of calls can be billions."""
    functions = {(f.domain, f.name, f.overload): f for f in model.functions}
    sizes: dict[tuple[str, str, str], int] = {}

    def size(body: _Graph, calls: tuple[tuple[str, str, str], ...]) -> int:
        total = 0
        for node in _nodes(body):
            key = (node.domain, node.op_type, node.overload)
            if key not in functions:
                total += 1
                continue
            if key in calls or len(calls) >= MAX_CALL_DEPTH:
                raise _damaged(source, f"its local function {node.domain}.{node.op_type} calls itself, or too deeply")
            if key not in sizes:
                sizes[key] = size(functions[key], (*calls, key))
            total += sizes[key]
        return total

    if functions and (found := size(model.graph, ())) > MAX_INLINED_NODES:
        raise _damaged(source, f"its local functions unfold to {found} nodes; the limit is {MAX_INLINED_NODES}")


def _nodes(body: _Graph) -> Iterator[onnx.NodeProto]:
    """Every node of a body and of the graphs inside its attributes."""
    for node in body.node:
        yield node
        for attribute in node.attribute:
            for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _nodes(graph)
