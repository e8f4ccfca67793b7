"""What stands around an operator of a Q/DQ graph: the DequantizeLinear it reads, the QuantizeLinear that reads it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.place import clip_bounds, is_clipping

_BYTES = (np.dtype(np.uint8), np.dtype(np.int8))


@dataclasses.dataclass(frozen=True)
class Operand:
    """A tensor as codes: ``real = scale * (code - zero_point)``.

    Attributes:
        codes: The integer tensor; a constant for weights.
        scale: float32, one element, or ``(C,)`` along ``axis``.
        zero_point: Of the type of the codes and the shape of ``scale``.
        axis: Which axis of ``codes`` the scales belong to; None for one scale.
    """

    codes: gs.Tensor
    scale: gs.Constant
    zero_point: gs.Constant
    axis: int | None

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the codes."""
        dtype: np.dtype[Any] = self.zero_point.values.dtype
        return dtype

    @property
    def inputs(self) -> list[gs.Tensor]:
        """Codes, scale and zero point, as integer operators take them."""
        return [self.codes, self.scale, self.zero_point]

    def same_grid(self, other: Operand) -> bool:
        """Whether a code means the same number here and there."""
        return (
            self.dtype == other.dtype
            and self.axis is None
            and other.axis is None
            and bool(np.all(self.scale.values == other.scale.values))
            and bool(np.all(self.zero_point.values == other.zero_point.values))
        )


def read_operand(tensor: gs.Tensor) -> Operand | None:
    """The codes behind a tensor that a DequantizeLinear makes; None where none does, or not from constants."""
    node = tensor.inputs[0] if isinstance(tensor, gs.Variable) and tensor.inputs else None
    return _operand(node, "DequantizeLinear", node.inputs[0]) if node is not None else None


@dataclasses.dataclass(frozen=True)
class Quantised:
    """What an operator's output is quantised to.

    Attributes:
        operand: The codes, and their scale.
        nodes: The QuantizeLinear, behind a Relu or Clip that does nothing which it would not do by itself.
    """

    operand: Operand
    nodes: tuple[gs.Node, ...]


def read_result(tensor: gs.Variable, outputs: frozenset[int]) -> Quantised | str:
    """The quantiser that alone reads a tensor; else why there is none, in words.

    Args:
        tensor: Output of an operator.
        outputs: ``id`` of each output of the network.
    """
    if id(tensor) in outputs:
        return "its result leaves the network as floats"
    if len(tensor.outputs) != 1:
        return f"its result has {len(tensor.outputs)} readers" if tensor.outputs else "nothing reads its result"
    reader = tensor.outputs[0]
    if reader.op in ("Relu", "Clip") and reader.inputs[0] is tensor:
        behind = read_result(reader.outputs[0], outputs)
        if isinstance(behind, Quantised) and not _is_redundant(reader, behind.operand):
            return (
                f"{reader.op} {reader.name} stands between it and its quantiser, and clips to other bounds than codes"
            )
        return dataclasses.replace(behind, nodes=(reader, *behind.nodes)) if isinstance(behind, Quantised) else behind
    if reader.op != "QuantizeLinear":
        return f"its result goes to {reader.op} {reader.name} as floats"
    operand = _operand(reader, "QuantizeLinear", reader.outputs[0])
    return "the quantiser of its result is not of constants" if operand is None else Quantised(operand, (reader,))


def has_codes(node: gs.Node) -> bool:
    """Whether a node stands at codes: one of its inputs is dequantised for it, or its output is quantised."""
    if node.op in ("QuantizeLinear", "DequantizeLinear"):
        return False
    made = any(t.inputs and t.inputs[0].op == "DequantizeLinear" for t in node.inputs if isinstance(t, gs.Variable))
    return made or any(reader.op == "QuantizeLinear" for t in node.outputs for reader in t.outputs)


def _operand(node: gs.Node, op: str, codes: gs.Tensor) -> Operand | None:
    """Scale and zero point of one Q or DQ."""
    scale = node.inputs[1] if node.op == op and len(node.inputs) > 1 else None
    if not isinstance(scale, gs.Constant) or scale.values.dtype != np.float32 or node.attrs.get("block_size", 0):
        return None
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    if zero is None or (isinstance(zero, gs.Variable) and zero.is_empty()):
        dtype = _default_type(node, codes)
        zero = gs.Constant(f"{node.name}/zero_point", np.zeros(scale.values.shape, dtype)) if dtype else None
    if not isinstance(zero, gs.Constant) or scale.values.ndim > 1:
        return None
    axis = None if scale.values.size == 1 else int(node.attrs.get("axis", 1))
    return Operand(codes, scale, zero, axis)


def _default_type(node: gs.Node, codes: gs.Tensor) -> np.dtype[Any] | None:
    """Type of codes that have no zero point; uint8 where nothing else is said of what a quantiser makes."""
    if codes.dtype is not None:
        known: np.dtype[Any] = np.dtype(codes.dtype)
        return known
    return np.dtype(np.uint8) if node.op == "QuantizeLinear" and "output_dtype" not in node.attrs else None


def _is_redundant(node: gs.Node, grid: Operand) -> bool:
    """Whether no code lies outside of what a Relu or Clip lets through."""
    if grid.dtype not in _BYTES or grid.axis is not None:
        return False
    limits, scale, zero = np.iinfo(grid.dtype), float(grid.scale.values.item()), int(grid.zero_point.values.item())
    low, high = scale * (limits.min - zero), scale * (limits.max - zero)
    lower, upper = (0.0, np.inf) if node.op == "Relu" else clip_bounds(node)
    if node.op == "Relu" or is_clipping(node):
        return low >= 0 and upper is not None and high <= upper
    return lower is not None and upper is not None and lower <= low and high <= upper
