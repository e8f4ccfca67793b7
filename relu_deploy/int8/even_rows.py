"""Weights of convolutions evened out row by row: one scale for the layer is then as fine as one for each channel.

On TensorRT-RTX 1.7 a convolution with one weight scale fuses bias and ReLU and writes float16; one with a scale for
each output channel does not (docs/placement.md). With factors ``f`` of the output channels,

    act(W x + b)  =  act((f W x + f b) / f)

the rows of ``f W`` are of one size, and ``1 / f`` is a multiplication in the kernel that computes ``act`` or quantises:
that kernel is there anyway, so it costs nothing. Behind a ReLU, which is part of the convolution, it comes after it.
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from calib.ranges import Ranges
from relu_deploy.int8.even_inputs import LARGEST_FACTOR
from relu_deploy.int8.formats import NumberFormat
from relu_deploy.int8.fuse_noise import Array
from relu_deploy.int8.granularity import MOST_NOISE, may_share, shared_noise, shares_scale
from relu_deploy.int8.half import LARGEST
from relu_deploy.int8.islands_absorb import times
from relu_deploy.int8.placement import LINEAR_OPS, MOVING_OPS, Placement
from relu_deploy.passes.edit import Names, RefusedError, dims
from relu_deploy.passes.linear import Affine, after, read_layer, write
from relu_deploy.report import PassReport, Skip

Bounds = dict[str, tuple[float, float]]
# One scale that makes this little noise (40 dB) is about as fine as one for each channel.
_EVEN = MOST_NOISE / 10
# How much larger than the largest value of the tensor a channel may become, as far as float16 goes.
_ROOM = 64.0
_TINY = float(np.finfo(np.float32).tiny)


def even_rows(
    graph: gs.Graph, placement: Placement, ranges: Ranges, bounds: Bounds, number: NumberFormat
) -> PassReport:
    """Even out the rows of INT8 convolutions that one scale does not fit, in place.

    Args:
        graph: What ``placement`` was made from. Sorted again afterwards.
        placement: For ``tensorrt-rtx``.
        ranges: Measured by channel, where they were.
        bounds: Tensor name -> range; gets those of new tensors, and new ones of what is scaled.
        number: The target's format; nothing is done unless float16 and one scale a layer go together.

    Returns:
        ``changed``: the convolutions, with how many channels were scaled; ``skipped``: those left alone, and why.
    """
    changed, skipped, notes = [], [], {}
    names, outputs = Names(graph), {id(tensor) for tensor in graph.outputs}
    for node in list(graph.nodes) if number.merges else ():
        if node.name not in placement.chosen or node.op != "Conv" or not may_share(node, number):
            continue
        if shared_noise(node.inputs[1].values, number.weight_max) <= _EVEN:
            continue
        try:
            scaled, size = _even(graph, node, placement, ranges, bounds, number, names, outputs)
        except RefusedError as refused:
            skipped.append(Skip(node.name, str(refused)))
            continue
        changed.append(node.name)
        notes[node.name] = f"{scaled} of {size} channels scaled"
    graph.toposort()
    return PassReport("even_rows", tuple(changed), tuple(skipped), notes)


def _even(
    graph: gs.Graph, node: gs.Node, placement: Placement, ranges: Ranges, bounds: Bounds, number: NumberFormat,
    names: Names, outputs: set[int],
) -> tuple[int, int]:  # fmt: skip
    """Scale one convolution and undo it behind; how many channels were scaled, and of how many."""
    made = node.outputs[0]
    relu = made.outputs[0] if len(made.outputs) == 1 and made.outputs[0].op == "Relu" else None
    target = made if relu is None else relu.outputs[0]
    if shares_scale(node, number):  # with a scale for each channel a kernel adds the bias, and may as well multiply
        _refuse_costly(target, placement)
    if id(target) in outputs or id(made) in outputs:
        raise RefusedError("it is an output of the network: a multiplication there is a kernel")
    if dims(target) is None:
        raise RefusedError("the shape of its output is not known")
    layer = read_layer(node)
    extent = _extent(made.name, layer.bias.size, ranges, bounds)
    factors = row_factors(layer.weight, extent)
    write(layer, after(layer, Affine(factors, np.zeros_like(factors))), names, "rows")
    inner = gs.Variable(names.new(f"{target.name}/rows"), dtype=target.dtype, shape=target.shape)
    maker = target.inputs[0]
    maker.outputs = [inner]
    graph.nodes.append(times(f"{target.name}/evened_rows", inner, 1 / factors, layer, target, names))
    reach = float((factors * extent).max())
    bounds[inner.name] = (0.0 if relu is not None else -reach, reach)
    if relu is not None:
        bounds[made.name] = -reach, reach
    return int((factors != 1).sum()), factors.size


def row_factors(weight: np.ndarray, extent: Array) -> Array:
    """Factors ``(C,)``, at least 1, that make rows as large as the largest one, as far as float16 has room for it."""
    rows = np.abs(weight.astype(np.float64)).reshape(weight.shape[0], -1).max(axis=1)
    wanted = np.where(rows > 0, rows.max() / np.maximum(rows, _TINY), 1.0)
    allowed = min(_ROOM * float(extent.max()), LARGEST) / np.maximum(extent, _TINY)
    return np.asarray(np.minimum(np.minimum(wanted, LARGEST_FACTOR), np.maximum(allowed, 1.0)))


def _extent(name: str, channels: int, ranges: Ranges, bounds: Bounds) -> Array:
    """Largest magnitude of each channel that a convolution makes, ``(C,)``; of the tensor where that is all we know."""
    measured = ranges.tensors.get(name)
    if measured is not None and measured.axis == 1 and measured.channel_min is not None:
        low, high = measured.channel_min.astype(np.float64), np.asarray(measured.channel_max, dtype=np.float64)
        if low.size == channels:
            return np.maximum(-low, high)
    if name not in bounds:
        raise RefusedError("the range of its output is not known")
    return np.full(channels, max(map(abs, bounds[name])))


def _refuse_costly(tensor: gs.Variable, placement: Placement) -> None:
    """Refuse where a multiplication of a tensor would be a kernel, or keep the compiler from moving codes.

    Raises:
        RefusedError: with the reason.
    """
    quantised, joined = False, False
    readers = placement.uses.get(tensor.name, frozenset())
    for reader in tensor.outputs:
        codes = readers is None or reader.name in readers
        quantised = quantised or codes
        if codes or reader.op == "MaxPool":
            continue
        if reader.op in LINEAR_OPS:
            raise RefusedError(f"{reader.op} {reader.name} reads it in float")
        if reader.op in MOVING_OPS:
            raise RefusedError(f"{reader.op} {reader.name} moves its values")
        joined = joined or reader.op == "Concat"
    if quantised and joined:
        raise RefusedError("a layer and a Concat read it, as one tensor of codes")
