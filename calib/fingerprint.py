"""Fingerprints: which network, and which data, a ranges file belongs to.

The network's covers what is computed: operators, attributes, tensor names, weights, operator-set versions. It does not
depend on how weights are stored, on file paths, documentation strings, metadata, or node names (nothing is keyed by
them).

The data's is a sum of one hash a sample, so it does not depend on batches or order, and those of shards add up to
that of one run over all of them. A sum cannot tell whether two shards share samples: a sketch can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

_A = onnx.AttributeProto
_MODULUS = 1 << 256
# Samples that a sketch remembers, and hex digits of each: 48 bits, so that two of 256 are alike by chance in one of
# 10**10 cases.
SKETCH = 256
_SKETCH_DIGITS = 12


class _Digest:
    """SHA-256 over length-prefixed fields, so that no two sequences of fields run together."""

    def __init__(self, base_dir: str) -> None:
        self._hash = hashlib.sha256()
        self.base_dir = base_dir

    def add(self, *fields: str | bytes | int | memoryview) -> None:
        for field in fields:
            data = field if isinstance(field, (bytes, memoryview)) else str(field).encode()
            self._hash.update(len(data).to_bytes(8, "little"))
            self._hash.update(data)

    def hex(self) -> str:
        return self._hash.hexdigest()


def model_fingerprint(model: onnx.ModelProto, *, base_dir: Path | None = None) -> str:
    """Hash what a network computes.

    Tensors are hashed one by one, so the model may be larger than a protobuf message.

    Args:
        model: Weights inside it, or external.
        base_dir: Where external weights lie; needed only when there are some.

    Returns:
        64 hex digits.
    """
    digest = _Digest(str(base_dir or ""))
    for entry in sorted(model.opset_import, key=lambda entry: (entry.domain, entry.version)):
        digest.add("opset", "" if entry.domain == "ai.onnx" else entry.domain, entry.version)
    for function in sorted(model.functions, key=lambda function: (function.domain, function.name)):
        digest.add("function", function.domain, function.name, *function.input, "->", *function.output)
        digest.add(*sorted(function.attribute))
        _add_attributes(digest, function.attribute_proto)
        _add_nodes(digest, function.node)
    _add_graph(digest, model.graph)
    return digest.hex()


def _add_graph(digest: _Digest, graph: onnx.GraphProto) -> None:
    """Add inputs, outputs, weights and nodes."""
    for kind, values in (("input", graph.input), ("output", graph.output)):
        for value in values:
            digest.add(kind, value.name, value.type.SerializeToString(deterministic=True))
    for tensor in sorted(graph.initializer, key=lambda tensor: tensor.name):
        digest.add("weight", tensor.name)
        _add_tensor(digest, tensor)
    for sparse in sorted(graph.sparse_initializer, key=lambda sparse: sparse.values.name):
        digest.add("sparse", sparse.values.name)
        _add_sparse(digest, sparse)
    _add_nodes(digest, graph.node)


def _add_nodes(digest: _Digest, nodes: Iterable[onnx.NodeProto]) -> None:
    """Add operators in their order."""
    for node in nodes:
        digest.add(
            "node", "" if node.domain == "ai.onnx" else node.domain, node.op_type, *node.input, "->", *node.output
        )
        _add_attributes(digest, node.attribute)


def _add_attributes(digest: _Digest, attributes: Iterable[onnx.AttributeProto]) -> None:
    """Add attributes by name; tensors and graphs in them by content."""
    for attribute in sorted(attributes, key=lambda attribute: attribute.name):
        digest.add("attribute", attribute.name, attribute.type, attribute.ref_attr_name)
        if attribute.type in (_A.TENSOR, _A.TENSORS):
            for tensor in [attribute.t] if attribute.type == _A.TENSOR else attribute.tensors:
                _add_tensor(digest, tensor)
        elif attribute.type in (_A.GRAPH, _A.GRAPHS):
            for graph in [attribute.g] if attribute.type == _A.GRAPH else attribute.graphs:
                _add_graph(digest, graph)
        elif attribute.type in (_A.SPARSE_TENSOR, _A.SPARSE_TENSORS):
            one = attribute.type == _A.SPARSE_TENSOR
            for sparse in [attribute.sparse_tensor] if one else attribute.sparse_tensors:
                _add_sparse(digest, sparse)
        else:
            bare = onnx.AttributeProto()
            bare.CopyFrom(attribute)
            bare.ClearField("doc_string")
            digest.add(bare.SerializeToString(deterministic=True))


def _add_tensor(digest: _Digest, tensor: onnx.TensorProto) -> None:
    """Add type, shape and values, whichever field or file holds the values."""
    digest.add("tensor", tensor.data_type, *tensor.dims)
    if tensor.data_type == onnx.TensorProto.STRING:
        digest.add(*tensor.string_data)
    elif tensor.HasField("raw_data"):
        # The same bytes that to_array().tobytes() would give, without two copies of them. Raw data is little-endian.
        digest.add(tensor.raw_data)
    else:
        array = np.atleast_1d(numpy_helper.to_array(tensor, base_dir=digest.base_dir))
        digest.add(_packed(array))


def _packed(array: NDArray[Any]) -> bytes:
    """Bytes of an array as ``raw_data`` would store them (4-bit types two a byte)."""
    return numpy_helper.from_array(array).raw_data if array.dtype.itemsize == 1 else _little(array).tobytes()


def _little(array: NDArray[Any]) -> NDArray[Any]:
    """The array in little-endian byte order."""
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _add_sparse(digest: _Digest, sparse: onnx.SparseTensorProto) -> None:
    """Add a sparse tensor by its values and their places."""
    digest.add(*sparse.dims)
    _add_tensor(digest, sparse.values)
    _add_tensor(digest, sparse.indices)


def sample_hash(feeds: Mapping[str, NDArray[Any]]) -> int:
    """Hash one sample as it is fed to the network.

    Args:
        feeds: Arrays by input name.

    Returns:
        An integer below 2**256.
    """
    digest = _Digest("")
    for name in sorted(feeds):
        array = np.asarray(feeds[name])
        digest.add(name, array.dtype.name, array.ndim, *array.shape)
        digest.add(np.ascontiguousarray(_little(array)).reshape(-1).view(np.uint8).data)
    return int(digest.hex(), 16)


def combine(*hashes: int) -> int:
    """Hash of several samples or shards: their sum, so order and grouping do not matter.

    >>> combine(combine(1, 2), 3) == combine(3, combine(2, 1))
    True
    """
    return sum(hashes) % _MODULUS


def to_hex(value: int) -> str:
    """64 hex digits of a data fingerprint."""
    return f"{value:064x}"


def sketch_of(value: int) -> str:
    """What a sketch holds of one sample's hash."""
    return to_hex(value)[:_SKETCH_DIGITS]


def sketch(*parts: Iterable[str]) -> tuple[str, ...]:
    """The smallest ``SKETCH`` hashes of all parts, each once: a random choice of samples that all shards make alike.

    >>> sketch(["b", "a"], ["a"])
    ('a', 'b')
    """
    return tuple(sorted({name for part in parts for name in part})[:SKETCH])
