"""Mend the quantisers of activations: one positive scale, int8 with zero point 0, and the ReLU that they stood for."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import onnx
from onnx import TensorProto, helper

from relu_deploy.int8.formats import DEAD_ACTIVATION_SCALE
from relu_deploy.int8.lint.codes import BYTES, WHOLE
from relu_deploy.int8.lint.edit import add_constant, dtype_of, forget_type, insert_before, set_attribute
from relu_deploy.int8.lint.network import OWN_DOMAINS, Network, Quantizer, is_quantizer
from relu_deploy.int8.unions import Unions
from relu_deploy.report import PassReport, Skip
from relu_deploy.targets import Target

# Move codes and do not compute with them: what goes in and what comes out is on one grid.
_MOVERS = (
    "MaxPool", "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Split", "Gather", "Identity",
    "DepthToSpace", "SpaceToDepth", "Concat", "Expand", "Tile", "Resize",
)  # fmt: skip
_NEVER_NEGATIVE = ("Relu", "Sigmoid", "HardSigmoid", "Softmax", "Abs", "Exp")
_KEEP_SIGN = (
    *_MOVERS,
    "AveragePool",
    "GlobalAveragePool",
    "Resize",
    "QuantizeLinear",
    "DequantizeLinear",
    "ReduceMean",
)


@dataclasses.dataclass(frozen=True)
class _Grid:
    """Quantisers whose codes are one another's, and the range that these cover."""

    members: tuple[Quantizer, ...]
    low: float
    high: float


def mend_activations(model: onnx.ModelProto, target: Target) -> PassReport:
    """Give activations one positive scale and, for TensorRT, int8 codes with zero point 0 over the same range.

    An unsigned quantiser whose lowest code is 0.0 clips as a ReLU does, and quantisers of other tools drop the ReLU in
    front of it. Its int8 successor does not clip, so the ReLU is put back where nothing else keeps values positive.
    """
    net = Network(model)
    changed: list[str] = []
    skipped: list[Skip] = []
    relus = 0
    for grid in _groups(net):
        if all(_is_sound(q, target) for q in grid):
            continue
        reason = _why_not(net, grid)
        if reason:
            skipped.append(Skip(grid[0].node.name, reason))
            continue
        found = _range(grid)
        relus += _write(model.graph, net, found, target)
        changed += [q.node.name for q in grid]
    note = (
        f"a coarser step over the same range where codes were asymmetric; {relus} ReLU put back that a zero point was"
    )
    return PassReport("mend_activations", tuple(changed), tuple(skipped), {"": note} if changed else {})


def _groups(net: Network) -> list[list[Quantizer]]:
    """Quantisers joined by tensors of codes, through what moves codes."""
    unions = Unions()
    quantizers = [*net.quantizers, *(dq for dq in net.dequantizers if not net.is_constant(dq.source))]
    codes = {q.output if q.node.op_type == "QuantizeLinear" else q.source for q in quantizers}
    waiting = list(codes)
    while waiting:
        tensor = waiting.pop()
        for node in net.readers(tensor):
            if _moves(node):
                others = [*node.output, *(node.input if node.op_type == "Concat" else ())]
                waiting.extend([other for other in others if other and unions.join(other, tensor)])
    members: dict[str, list[Quantizer]] = {}
    for q in quantizers:
        if not net.is_constant(q.source):
            members.setdefault(unions.root(q.output if q.node.op_type == "QuantizeLinear" else q.source), []).append(q)
    return list(members.values())


def _is_sound(q: Quantizer, target: Target) -> bool:
    if q.scale is None or q.codes not in WHOLE:
        return True  # nothing that could be mended
    if not ((q.scale > 0) & np.isfinite(q.scale)).all() or (q.scale.ndim > 0 and (target != "ort" or q.scale.size > 1)):
        return False
    return (target == "ort" and q.codes in BYTES) or (q.codes == TensorProto.INT8 and not q.shifted)


def _why_not(net: Network, grid: list[Quantizer]) -> str:
    """Why a group cannot be mended; empty where it can."""
    first = grid[0]
    for q in grid:
        codes = q.output if q.node.op_type == "QuantizeLinear" else q.source
        if q.scale is None or q.codes not in WHOLE or q.codes != first.codes:
            return "its quantisers have computed scales, or codes of several types"
        if not q.scale.size:
            return "it has no scale"
        if not np.isfinite(q.scale).all():
            return "its scale is not finite, so its range is not known: calibrate again"
        if first.scale is None or not np.array_equal(q.scale, first.scale) or _zero(q) != _zero(first):
            return "its codes are written with one scale and read with another"
        if codes in net.outputs or (q.node.op_type == "DequantizeLinear" and net.maker(codes) is None):
            return "its codes enter or leave the network, whose interface is not changed"
        if any(not is_quantizer(reader, "DequantizeLinear") and not _moves(reader) for reader in net.readers(codes)):
            return "its codes are also read by an operator that computes with them"
    if not any(q.node.op_type == "QuantizeLinear" for q in grid):
        return "its codes are made by an operator on codes"
    return ""


def _moves(node: onnx.NodeProto) -> bool:
    return node.op_type in _MOVERS and node.domain in OWN_DOMAINS


def _zero(q: Quantizer) -> tuple[float, ...]:
    return (0.0,) if q.zero_point is None else tuple(q.zero_point.astype(np.float64).reshape(-1))


def _range(grid: list[Quantizer]) -> _Grid:
    """The union over channels of what the codes cover."""
    q = grid[0]
    assert q.scale is not None  # noqa: S101 - _why_not has looked
    scale, zero = np.abs(q.scale.astype(np.float64)).reshape(-1), np.asarray(_zero(q))
    limits = np.iinfo(dtype_of(q.codes))
    bottom = limits.min if limits.min == 0 or q.shifted else -limits.max
    return _Grid(tuple(grid), float(((bottom - zero) * scale).min()), float(((limits.max - zero) * scale).max()))


def _write(graph: onnx.GraphProto, net: Network, grid: _Grid, target: Target) -> int:
    """Give every member the new grid. Returns the number of ReLU put back."""
    first = grid.members[0]
    assert first.scale is not None  # noqa: S101 - _why_not has looked
    dead = grid.low == grid.high
    dtype = np.dtype(np.int8) if target != "ort" or dtype_of(first.codes).kind == "i" else np.dtype(np.uint8)
    low, high = min(grid.low, 0.0), max(grid.high, 0.0)
    zero = 0
    if dead:
        step = DEAD_ACTIVATION_SCALE
    elif dtype == np.int8 and (target != "ort" or not first.shifted):
        step = max(-low, high) / 127
    else:
        step = (high - low) / 255
        zero = int(np.clip(np.rint(-low / step), 0, 255)) + np.iinfo(dtype).min
    scale = add_constant(graph, f"{first.output}/scale", np.asarray(step, first.scale.dtype))
    zero_name = add_constant(graph, f"{first.output}/zero_point", np.asarray(zero, dtype))
    relus = 0
    for q in grid.members:
        q.node.input[:] = [q.source, scale, zero_name]
        set_attribute(q.node, "axis", None)
        set_attribute(q.node, "output_dtype", None)
        if q.node.op_type == "QuantizeLinear":
            forget_type(graph, q.output)
            if grid.low == 0 and not dead and dtype == np.int8 and zero == 0 and not _never_negative(net, q.source):
                relus += _put_relu(graph, q.node)
    _forget_moved(graph, net, grid.members)
    return relus


def _put_relu(graph: onnx.GraphProto, quantizer: onnx.NodeProto) -> int:
    """A ReLU in front of a quantiser."""
    source, name = quantizer.input[0], f"{quantizer.name}/Relu"
    insert_before(graph, quantizer, [helper.make_node("Relu", [source], [f"{name}/output"], name)])
    quantizer.input[0] = f"{name}/output"
    return 1


def _forget_moved(graph: onnx.GraphProto, net: Network, members: Iterable[Quantizer]) -> None:
    """Drop what the file says of the types of codes between members."""
    waiting = [q.output for q in members if q.node.op_type == "QuantizeLinear"]
    while waiting:
        for node in net.readers(waiting.pop()):
            if node.op_type in _MOVERS:
                for output in node.output:
                    forget_type(graph, output)
                    waiting.append(output)


def _never_negative(net: Network, tensor: str) -> bool:
    """Whether a tensor is known to hold nothing below 0."""
    for _ in range(len(net.nodes)):
        maker = net.maker(tensor)
        if maker is None:
            return False
        if maker.op_type in _NEVER_NEGATIVE or net.starts_at_zero(tensor):
            return True
        if maker.op_type == "Clip":
            low = net.constant(maker.input[1]) if len(maker.input) > 1 and maker.input[1] else None
            return low is not None and bool((low >= 0).all())
        if maker.op_type == "Concat":
            return all(_never_negative(net, name) for name in maker.input)
        if maker.op_type not in _KEEP_SIGN:
            return False
        tensor = maker.input[0]
    return False
