"""Which tensors of a network are measured: types, ranks and sizes of its activations, as the runtime finds them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from calib.batches import Batch
from calib.blocks import in_blocks
from calib.derived import Derived, derivable
from calib.errors import CalibrationError
from calib.graph import activations, channel_axes, mixes_samples, shaped_only, unused_prefix
from calib.inputs import InputSpec
from calib.model import empty_like, opset
from calib.observers import Tensor
from calib.session import Session, with_outputs

_FLOATS = {"tensor(float)": "float32", "tensor(float16)": "float16"}
_OTHER_FLOATS = {"tensor(double)": "float64", "tensor(bfloat16)": "bfloat16"}
# Shape is of every version of the operators; a model of other domains only gets this one beside them.
_SHAPE_OPSET = 17
# Elements of constants that shapes may be inferred from: axes, shapes, sizes of Resize.
_SMALL = 1024


@dataclasses.dataclass(frozen=True)
class Found:
    """What a network holds.

    Attributes:
        tensors: Float activations, in the network's order.
        sizes: Bytes of each, on the first batch.
        types: Of all activations, as the runtime calls them.
        skipped: Activations of other float types, with the reason.
        derived: Those of ``tensors`` that need not be looked at, and what they follow from.
        shapes: Of all that nodes make, as the runtime inferred them: extents, names or None. No axes: not known.
        planes: Float32 tensors of four axes, derived or not.
        blocks: Numbers of channels of those that the runtime can keep in blocks, that are not derived, and that have
            the inputs' N.
    """

    tensors: tuple[Tensor, ...]
    sizes: Mapping[str, int]
    types: Mapping[str, str]
    skipped: Mapping[str, str]
    derived: Mapping[str, Derived]
    shapes: Mapping[str, Sequence[Any]]
    planes: frozenset[str]
    blocks: Mapping[str, int]


def discover(model: onnx.ModelProto, specs: tuple[InputSpec, ...], first: Batch) -> Found:
    """Find what to measure.

    Raises:
        CalibrationError: the runtime cannot load the network, or an operator fails.
    """
    fed = {spec.name: spec for spec in specs}
    names = activations(model)
    made = _inferred(model, [name for name in names if name not in fed])
    types = {name: made[name][0] if name in made else "" for name in names}
    floats = {name: _FLOATS[kind] for name, kind in types.items() if kind in _FLOATS}
    floats |= {name: spec.dtype.name for name, spec in fed.items() if spec.dtype.name in _FLOATS.values()}
    shapes = _shapes(model, {name: made[name][1] for name in floats if name not in fed}, first)
    shapes |= {name: first.feeds[name].shape for name in fed}
    wanted = [name for name in names if name in floats]
    axes = channel_axes(model, {name: len(shapes[name]) for name in wanted})
    shared = shaped_only(model)
    tensors = tuple(Tensor(n, floats[n], len(shapes[n]), axes[n], n in shared) for n in wanted)
    sizes = {t.name: math.prod(shapes[t.name]) * np.dtype(t.dtype).itemsize for t in tensors}
    skipped = {n: f"its type is {_OTHER_FLOATS[kind]}" for n, kind in types.items() if kind in _OTHER_FLOATS}
    batch = _batch_names(model)
    fixed = {name for name, found in made.items() if _is_fixed(found[1], batch=batch)}
    fixed |= {name for name, spec in fed.items() if spec.shape is not None and _is_fixed(spec.shape, batch={None})}
    derived = derivable(model, {t.name: t for t in tensors}, fixed)
    planes = {t.name: made[t.name][1] for t in tensors if t.name in made and t.rank == 4 and t.dtype == "float32"}
    channels = {n: s[1] for n, s in planes.items() if len(s) == 4 and type(s[1]) is int and s[1] > 0}
    extents = batch | {shapes[name][0] for name in fed if shapes.get(name)}
    # Extents that depend on values may be 0.
    sure = {n for n in channels if planes[n][0] in extents and (n in fixed or not mixes_samples(model))}
    sure.intersection_update(in_blocks(model, channels, shapes))
    blocks = {t.name: channels[t.name] for t in tensors if t.name in sure and t.axis == 1 and t.name not in derived}
    inferred = {name: shape for name, (_, shape) in made.items()}
    return Found(tensors, sizes, types, skipped, derived, inferred, frozenset(planes), blocks)


def _is_fixed(shape: Sequence[Any], *, batch: set[Any]) -> bool:
    """Whether a tensor always has as many elements to a sample, and at least one."""
    if len(shape) < 2 or not all(type(extent) is int and extent > 0 for extent in shape[1:]):
        return False
    return shape[0] in batch or (type(shape[0]) is int and shape[0] > 0)


def _batch_names(model: onnx.ModelProto) -> set[Any]:
    """What the network calls the first axis of its inputs, where it is open."""
    shapes = (value.type.tensor_type.shape.dim for value in model.graph.input)
    return {dims[0].dim_param for dims in shapes if len(dims) and dims[0].dim_param}


def _inferred(model: onnx.ModelProto, names: list[str]) -> dict[str, tuple[str, Sequence[Any]]]:
    """Types and shapes of tensors, as the runtime infers them from the nodes alone.

    What a file says of its shapes is left out, since exporters get it wrong; and weights, which nothing is inferred
    from, need not be loaded for this.

    Raises:
        CalibrationError: the runtime cannot load the network.
    """
    bare = empty_like(model)
    bare.graph.node.extend(model.graph.node)
    bare.graph.input.extend(model.graph.input)
    bare.graph.sparse_initializer.extend(model.graph.sparse_initializer)
    bare.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    fed = {value.name for value in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= _SMALL:
            bare.graph.initializer.append(tensor)
        elif tensor.name not in fed:
            value = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            bare.graph.input.append(value)
    try:
        return Session(bare, threads=1).describe()
    except CalibrationError:  # some operators want their weights when they are loaded
        del bare.graph.input[:], bare.graph.initializer[:]
        bare.graph.input.extend(model.graph.input)
        bare.graph.initializer.extend(model.graph.initializer)
        return Session(bare, threads=1).describe()


def _shapes(model: onnx.ModelProto, inferred: Mapping[str, Sequence[Any]], first: Batch) -> dict[str, tuple[int, ...]]:
    """Extents of tensors on the first batch.

    What the runtime inferred is taken where it is complete. No extents may mean that they are not known: those are
    looked at by running the batch.
    """
    known = {
        name: tuple(shape) for name, shape in inferred.items() if shape and all(type(extent) is int for extent in shape)
    }
    return known | _seen(model, [name for name in inferred if name not in known], first)


def _seen(
    model: onnx.ModelProto, names: list[str], first: Batch
) -> dict[str, tuple[int, ...]]:  # fmt: skip
    """Extents as they are in a run; the tensors themselves are freed as the network runs."""
    if not names:
        return {}
    prefix = unused_prefix(model)
    outputs = [f"{prefix}/{index}/shape" for index in range(len(names))]
    nodes = [helper.make_node("Shape", [name], [out]) for name, out in zip(names, outputs, strict=True)]
    looking = with_outputs(model, outputs, nodes)
    del looking.graph.output[: len(model.graph.output)]
    if not opset(model):
        looking.opset_import.append(helper.make_opsetid("", _SHAPE_OPSET))
    found = Session(looking, threads=1).run(outputs, first.feeds, first.samples[0].origin)
    return {name: tuple(map(int, shape)) for name, shape in zip(names, found, strict=True)}
