"""Fold a constant ``Pad`` into the convolution or pool behind it, which then pads by itself.

A Conv pads with zeros. An AveragePool does where it counts its padding. A MaxPool pads with -inf: equal to a Pad of
-inf, and to one of zeros where nothing is below zero, as behind a ReLU, and every window reaches a real value.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import (
    RefusedError,
    detach,
    given,
    int_values,
    is_standard,
    pinned_names,
    producer_of,
    set_input,
)
from relu_deploy.passes.region import constant_values
from relu_deploy.passes.windows import explicit_pads, kernel, spatial_rank, window
from relu_deploy.report import PassReport, Skip

_READERS = ("Conv", "AveragePool", "MaxPool")
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Exp", "Abs", "Softplus")


@dataclasses.dataclass(frozen=True)
class _Padding:
    """What a Pad adds along the spatial axes of its reader, and with which value."""

    begin: list[int]
    end: list[int]
    value: float


def fold_pad(graph: gs.Graph) -> PassReport:
    """Let Conv, AveragePool and MaxPool do the padding of a Pad in front of them.

    Args:
        graph: Sorted topologically; edited in place. A Pad that others read too stays for them.

    Returns:
        Changed: Pad nodes that at least one reader no longer needs. Skipped: those in front of such a layer that are
        still needed, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    pinned = pinned_names(graph)
    for node in reversed(graph.nodes):  # of two Pads in a row, the second first
        if not is_standard(node, "Pad"):
            continue
        readers = {id(r): r for r in node.outputs[0].outputs if is_standard(r, *_READERS) and _reads(r, node)}
        reasons = [reason for reader in readers.values() if (reason := _absorb(node, reader))]
        skipped.extend([Skip(node.name, reasons[0])] if reasons else [])
        changed.extend([node.name] if len(reasons) < len(readers) else [])
        if not node.outputs[0].outputs and node.outputs[0].name not in pinned:
            detach(node)
    drop_detached(graph)
    return PassReport("fold_pad", tuple(reversed(changed)), tuple(reversed(skipped)))


def _reads(reader: gs.Node, pad: gs.Node) -> bool:
    """Whether the padded tensor is what the reader slides over, and nothing else of it."""
    return [tensor is pad.outputs[0] for tensor in reader.inputs] == [True] + [False] * (len(reader.inputs) - 1)


def _absorb(pad: gs.Node, reader: gs.Node) -> str:
    """Fold a Pad into one reader; why not, where it cannot be."""
    try:
        padding = _padding(pad, spatial_rank(reader) + 2)
        own = explicit_pads(reader)
        begin, end = (
            [a + b for a, b in zip(*pair, strict=True)] for pair in zip(own, (padding.begin, padding.end), strict=True)
        )
        if reader.op == "Conv":
            _check_value(padding, 0.0)
        else:
            _check_pool(reader, pad, padding, counts=any(map(any, own)), pads=[*begin, *end])
    except RefusedError as error:
        return str(error)
    reader.attrs.pop("auto_pad", None)
    reader.attrs["pads"] = [*begin, *end]
    if reader.op == "AveragePool":
        reader.attrs["count_include_pad"] = 1
    set_input(reader, 0, pad.inputs[0])
    return ""


def _padding(pad: gs.Node, rank: int) -> _Padding:
    """Amounts and value of a Pad, in any opset."""
    if pad.attrs.get("mode", "constant") not in ("constant", b"constant"):
        raise RefusedError(f"it pads with the mode {pad.attrs['mode']}, not with a constant")
    amounts, axes = int_values(pad, "pads", 1), int_values(pad, "axes", 3)
    if amounts is None or (axes is None and given(pad, 3) is not None):
        raise RefusedError("its amounts are computed at run time")
    axes = list(range(rank)) if axes is None else [axis % rank for axis in axes]
    if len(amounts) != 2 * len(axes):
        raise RefusedError("its amounts do not fit the rank of the layer behind it")
    if min(amounts, default=0) < 0:
        raise RefusedError("it crops: its amounts are negative")
    begin, end = ([0] * rank, [0] * rank)
    for index, axis in enumerate(axes):
        begin[axis], end[axis] = amounts[index], amounts[index + len(axes)]
    if any(begin[:2] + end[:2]):
        raise RefusedError("it pads the batch or the channels")
    return _Padding(begin[2:], end[2:], _value(pad))


def _value(pad: gs.Node) -> float:
    tensor = given(pad, 2)
    if tensor is None:
        return float(pad.attrs.get("value", 0.0))
    values = constant_values(tensor)
    if values is None or values.size != 1:
        raise RefusedError("its value is computed at run time")
    return float(np.asarray(values, dtype=np.float64).reshape(()))


def _check_value(padding: _Padding, wanted: float) -> None:
    if padding.value != wanted:
        raise RefusedError(f"it pads with {padding.value:g}, the layer behind it with {wanted:g}")


def _check_pool(pool: gs.Node, pad: gs.Node, padding: _Padding, *, counts: bool, pads: list[int]) -> None:
    """Refuse where a pool that pads ``pads`` would give something else; ``counts``: it pads something already."""
    if any(not tensor.is_empty() for tensor in pool.outputs[1:]):
        raise RefusedError("the pool behind it gives the places of its maxima, which are counted in the padded tensor")
    if pool.attrs.get("ceil_mode", 0) or any(step != 1 for step in window(pool, "dilations")):
        raise RefusedError("the pool behind it rounds its size up, or is dilated")
    if any(amount >= size for amount, size in zip(pads, [*kernel(pool)] * 2, strict=True)):
        raise RefusedError("windows of the pool behind it would lie in the padding altogether")
    if pool.op == "AveragePool":
        _check_value(padding, 0.0)
        if counts and not pool.attrs.get("count_include_pad", 0):
            raise RefusedError("the AveragePool behind it pads too, and leaves its own padding out of the mean")
        return
    source = producer_of(pad.inputs[0])
    if padding.value != 0.0 or source is None or not is_standard(source, *_NEVER_NEGATIVE):
        _check_value(padding, -math.inf)
