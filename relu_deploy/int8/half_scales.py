"""Float16 and the scales of quantised layers: the layers that read one DequantizeLinear agree on its type."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from relu_deploy.int8.placement import LINEAR_OPS, MOVING_OPS
from relu_deploy.report import Skip

# TensorRT-RTX 1.7's compiler ends with an internal error where the scales of the two operands of a product differ in
# type, a cast behind one of them notwithstanding; convolutions bear it (tests/engines/test_quantizer_engines.py).
_PRODUCTS = ("MatMul", "Gemm")


def agree(graph: gs.Graph, half: set[int], kept: set[int]) -> list[Skip]:
    """Take products out of ``half`` whose operand is dequantised to float32, and what moves it; says which and why.

    That operand is in float32 where float16 does not hold its scale, or where another layer that reads it has to
    compute in float32: behind a cast from float16 that one would multiply floats.
    """
    made = [(node, *carried(node)) for node in graph.nodes if node.op == "DequantizeLinear"]
    skipped: list[Skip] = []
    changed = True
    while changed:  # a product has two operands, through which one can pull the next along
        changed = False
        for node, movers, layers in made:
            wide = next((layer for layer in layers if id(layer) not in half), None)
            if not layers or (wide is None and holds(node) and id(node.outputs[0]) not in kept):
                continue
            operand = node.outputs[0].name
            reason = (
                f"float16 does not hold the scale of {operand}" if not holds(node) else
                f"a graph inside If, Loop or Scan reads {operand}" if wide is None else
                f"{wide.name}, which reads {operand} too, stays float32"
            )  # fmt: skip
            half.discard(id(node))
            for reader in (*movers, *(layer for layer in layers if layer.op in _PRODUCTS)):
                if id(reader) in half:
                    half.discard(id(reader))
                    skipped.append(Skip(reader.name, reason))
                    changed = True
    return skipped


def carried(dequantizer: gs.Node) -> tuple[list[gs.Node], list[gs.Node]]:
    """What moves dequantised values, and the layers that read them in the end."""
    movers: list[gs.Node] = []
    layers: list[gs.Node] = []
    waiting = [dequantizer]
    while waiting:
        for tensor in waiting.pop().outputs:
            for reader in tensor.outputs:
                if reader.op in MOVING_OPS and reader.inputs[0] is tensor:
                    movers.append(reader)
                    waiting.append(reader)
                elif reader.op in LINEAR_OPS and any(tensor is operand for operand in reader.inputs[:2]):
                    layers.append(reader)
    return (movers if layers else []), layers


def holds(node: gs.Node) -> bool:
    """Whether float16 holds the scale of a Q or DQ."""
    scale = node.inputs[1]
    return isinstance(scale, gs.Constant) and holds_scale(scale.values)


def holds_scale(scale: npt.NDArray[Any]) -> bool:
    """Whether float16 holds a scale exactly, and what it spans.

    >>> holds_scale(np.array(0.5)), holds_scale(np.array(0.1)), holds_scale(np.array(1e6))
    (True, False, False)
    """
    wide = scale.astype(np.float64)
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is not what it was
        half = wide.astype(np.float16)
    return bool((half == wide).all() and (wide * 128 <= 65504).all())
