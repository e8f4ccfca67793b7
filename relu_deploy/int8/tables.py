"""Activations without an integer kernel, as tables of codes: ``q_out = T[c, q_in]``, 256 entries a channel.

A function of one tensor between two 8-bit quantisers is known completely by its 256 values. So the nodes of an
activation are replaced by one stand-in before the placement is made, and by a ``GatherElements`` on codes after Q/DQ
are written. A table is standard ONNX: no plugin, and no float between two integer kernels.

ONNX Runtime's ``GatherElements`` costs a third of ``Gather``, but more than a few vectorised float operators between
DequantizeLinear and QuantizeLinear. A table is therefore made of what has no quick kernel: Mish, ELU, Softplus, a
learned activation. The rest stays as it is, in float between its quantisers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from calib.session import open_session
from relu_deploy import ops
from relu_deploy.graph import tidy
from relu_deploy.int8.formats import QParams
from relu_deploy.int8.place import MOVING_OPS, STAND_IN, Placement, is_clipping
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.operands import constant_shape, constant_values
from relu_deploy.passes.region import Cut, nodes_between, program_between

_CODES = 256
_LONG_ROW, _IMAGE_RANK = 1024, 4
# Milliseconds for a million elements on one core, as benchmarks/tables.py prints them, without the two quantisers: a
# float operator, those that are slower than the rest, and the look-up of codes.
_COST, _TABLE_COST = 0.1, 0.75
_COSTS = {
    "Tanh": 0.2, "Erf": 0.3, "HardSwish": 0.2, "Gelu": 0.4, "Floor": 0.2, "Round": 0.2, "Sqrt": 0.3, "Where": 0.4,
    "Sign": 0.7, "Atan": 0.7, "Sin": 1.2, "Cos": 1.2, "Elu": 1.4, "Selu": 1.4, "Celu": 1.7, "Log": 1.4, "PRelu": 3.4,
    "Pow": 6.0, "Mish": 9.4, "Asinh": 10.0, "Softplus": 14.0, ops.PWLU: 8.0,
}  # fmt: skip
_QUICK_POWERS = (2.0, 3.0, 0.5)


@dataclasses.dataclass(frozen=True)
class Site:
    """One activation that a table can stand for.

    Attributes:
        name: Of the stand-in, and of the node that made ``result``.
        source: Name of its input tensor.
        result: Name of its output tensor.
        nodes: What it replaces, producers first.
        axis: The channel axis of ``source``, counted from the front; None for one function for all elements.
        channels: How many there are along it; 1 without one.
        rank: Axes of ``source``; None where that is not known.
    """

    name: str
    source: str
    result: str
    nodes: tuple[_Kept, ...]
    axis: int | None
    channels: int
    rank: int | None


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A node as it was, for the case that it has to come back."""

    op: str
    name: str
    domain: str | None
    attrs: dict[str, Any]
    inputs: tuple[gs.Tensor, ...]
    outputs: tuple[gs.Tensor, ...]

    @classmethod
    def of(cls, node: gs.Node) -> _Kept:
        return cls(node.op, node.name, node.domain, dict(node.attrs), tuple(node.inputs), tuple(node.outputs))

    def again(self, tensors: dict[str, gs.Tensor] | None = None) -> gs.Node:
        """The node; with ``tensors`` in a graph that has its own, by name. What that lacks is added to it."""
        inputs, outputs = list(self.inputs), list(self.outputs)
        if tensors is not None:
            inputs, outputs = (
                [tensors.setdefault(end.name, end.copy()) if end.name else end for end in ends]
                for ends in (inputs, outputs)
            )
        return gs.Node(self.op, self.name, dict(self.attrs), inputs, outputs, domain=self.domain)


def stand_in(graph: gs.Graph, measured: Iterable[str]) -> tuple[Site, ...]:
    """Put a stand-in where an activation has no integer kernel of its own, in place.

    Args:
        graph: Sorted topologically, with types and shapes where they are known.
        measured: Names of the tensors that have a range.

    Returns:
        The sites, in the order of the graph.
    """
    known = set(measured)
    sites = _regions(graph, known)
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    sites.sort(key=lambda site: order[site.name])
    tensors = graph.tensors()
    for site in sites:
        # The last node only: those before it may have other readers, and else are tidied away.
        node = graph.nodes[order[site.name]]
        node.inputs.clear()
        node.outputs.clear()
        graph.nodes[order[site.name]] = gs.Node(
            STAND_IN, site.name, inputs=[tensors[site.source]], outputs=[tensors[site.result]], domain=ops.DOMAIN
        )
    tidy(graph)
    return tuple(sites)


def take_back(graph: gs.Graph, sites: Sequence[Site], placement: Placement) -> tuple[Site, ...]:
    """Give the float nodes back where a stand-in is not between two quantised tensors; returns the sites left.

    It has to read codes, and whoever reads its result has to read the codes of that: a table gives nothing else.
    """
    left = []
    nodes = {node.name: node for node in graph.nodes if node.op == STAND_IN}
    for site in sites:
        if site.name not in nodes:  # nobody reads it
            continue
        before, behind = (placement.uses.get(name, frozenset()) for name in (site.source, site.result))
        if (before is None or site.name in before) and behind is None:
            left.append(site)
            continue
        nodes[site.name].inputs.clear()
        nodes[site.name].outputs.clear()
        graph.nodes.remove(nodes[site.name])
        graph.nodes.extend(kept.again() for kept in site.nodes if not any(t.inputs for t in kept.outputs))
    tidy(graph)
    return tuple(left)


def as_floats(graph: gs.Graph, sites: Sequence[Site]) -> gs.Graph:
    """Copy of a graph in which the float nodes are back in place of every stand-in: one that runs.

    Args:
        graph: With the stand-ins of ``sites``. Not changed.
        sites: Those that :func:`take_back` left.
    """
    copy = graph.copy()
    tensors, nodes = copy.tensors(), {node.name: node for node in copy.nodes if node.op == STAND_IN}
    for site in sites:
        if site.name in nodes:
            nodes[site.name].inputs.clear()
            nodes[site.name].outputs.clear()
            copy.nodes.remove(nodes[site.name])
            for kept in site.nodes:
                copy.nodes.append(kept.again(tensors))
    tidy(copy)
    return copy


def write_tables(graph: gs.Graph, sites: Sequence[Site], activations: dict[str, QParams]) -> None:
    """Replace every stand-in, and the quantisers it stands between, by a table on codes, in place.

    Args:
        graph: With Q/DQ written around the stand-ins.
        sites: Those that :func:`take_back` left.
        activations: Scale and zero point of every quantised tensor, by name.
    """
    nodes = {node.name: node for node in graph.nodes if node.op == STAND_IN}
    for site in sites:
        node = nodes[site.name]
        codes = node.inputs[0].inputs[0].inputs[0]
        quantizer = next(reader for reader in node.outputs[0].outputs if reader.op == "QuantizeLinear")
        result = quantizer.outputs[0]
        table = code_table(site, activations[site.source], activations[site.result], graph)
        for old in (node, quantizer):
            old.inputs.clear()
            old.outputs.clear()
        _gather(graph, site, codes, result, table)


def code_table(site: Site, source: QParams, result: QParams, graph: gs.Graph) -> npt.NDArray[np.uint8]:
    """``quantise(f(dequantise(q)))`` for every code of every channel, uint8 (C, 256).

    A PWLU is evaluated in float64 and rounded once to float32; other activations by ONNX Runtime, node by node, as they
    would run in float. Quantised as QuantizeLinear does: divided in float32, ties to even.

    Args:
        site: The activation.
        source: Scale and zero point of its input.
        result: Of its output.
        graph: What its opset is read from.
    """
    numbers = np.arange(_CODES, dtype=np.float32) - np.float32(source.zero_point)
    values = (numbers * np.float32(source.scale)).astype(np.float32)
    reals = _evaluate(site, np.broadcast_to(values, (site.channels, _CODES)), graph)
    steps = np.rint(reals / np.float32(result.scale)) + np.float32(result.zero_point)
    # NaN (0 * inf in a function that overflows at the end of its range) has no code; a saturating cast makes it 0.
    table: npt.NDArray[np.uint8] = np.nan_to_num(np.clip(steps, 0, _CODES - 1)).astype(np.uint8)
    return table


def _regions(graph: gs.Graph, known: set[str]) -> list[Site]:
    """Every function of one tensor that costs more in float than a table, from a branch to a branch."""
    functions = Functions(graph)
    sites: list[Site] = []

    def visit(cut: Cut, _: list[Cut]) -> Cut:
        assert cut.parent is not None  # noqa: S101 - only cuts with a parent are visited
        top = cut.parent
        while top.parent is not None and len(top.tensor.outputs) == 1 and functions.of_floats(top):
            top = top.parent
        site = _region_site(top, cut, known) if functions.of_floats(cut) else None
        if site is None and top is not cut.parent:
            top = cut.parent
            site = _region_site(top, cut, known) if functions.of_floats(cut) else None
        if site is None:
            return cut.parent
        sites.append(site)
        return top

    functions.walk(visit)
    return sites


def _region_site(top: Cut, cut: Cut, known: set[str]) -> Site | None:
    """A site between two cuts, or None where there is none."""
    if cut.node is None or not {top.tensor.name, cut.tensor.name} <= known:
        return None
    try:
        nodes = nodes_between(top, cut)
        program = program_between(top, cut)
    except UnsupportedError:
        return None
    if _float_cost(nodes) <= _TABLE_COST:
        return None
    if len(nodes) > 1 and any(map(ops.is_pwlu, nodes)):
        return None  # evaluated alone, so that no definition is needed
    rank = None if top.tensor.shape is None else len(top.tensor.shape)
    channels = max(program.constants.shape[1], 1)
    if channels > 1 and (rank is None or program.axis is None):
        return None
    axis = program.axis + rank if channels > 1 and rank is not None and program.axis is not None else None
    return Site(cut.node.name, top.tensor.name, cut.tensor.name, tuple(map(_Kept.of, nodes)), axis, channels, rank)


def _float_cost(nodes: Sequence[gs.Node]) -> float:
    """What the nodes cost one by one; moving operators and those that quantisers or integer kernels take, nothing."""
    total = 0.0
    for node in nodes:
        if node.op in (*MOVING_OPS, "LeakyRelu", "Sigmoid", "Cast", "Dropout") or is_clipping(node):
            continue
        exponent = constant_values(node.inputs[1]) if node.op == "Pow" else None
        quick = exponent is not None and exponent.size == 1 and float(exponent.reshape(-1)[0]) in _QUICK_POWERS
        total += _COSTS["Sqrt"] if quick else _COSTS.get(node.op, _COST)
    return total


def _evaluate(site: Site, values: npt.NDArray[np.float32], graph: gs.Graph) -> npt.NDArray[np.float32]:
    """The function at some points of each channel, (C, points) to the same."""
    if len(site.nodes) == 1 and site.nodes[0].op == ops.PWLU:
        function = ops.pwlu_of(site.nodes[0].name, site.nodes[0].inputs)
        exact: npt.NDArray[np.float32] = function(values.T, 1).T.astype(np.float32)
        return exact
    rank = max(site.rank or 1, 2)
    # Constants of equal entries still have as many as there are channels: the points go along another axis.
    other = next(axis for axis in range(rank) if axis not in _wide_axes(site, rank))
    shape = [1] * rank
    shape[other] = values.shape[1]
    if site.axis is not None:
        shape[site.axis] = site.channels
    # In front and behind, then where they belong: channels and points.
    ends = (site.axis if site.axis is not None else int(other == 0)), other
    feed = np.moveaxis(values.reshape(*values.shape, *[1] * (rank - 2)), (0, 1), ends)
    session = open_session(_body(site, shape, graph), threads=1)
    (found,) = session.run(None, {site.source: np.ascontiguousarray(feed)})
    flat: npt.NDArray[np.float32] = np.moveaxis(np.asarray(found, np.float32), ends, (0, 1))
    return flat.reshape(*flat.shape[:2], -1)[: site.channels, :, 0]


def _wide_axes(site: Site, rank: int) -> set[int]:
    """Axes along which a side constant has more than one entry."""
    shapes = [constant_shape(tensor) for kept in site.nodes for tensor in kept.inputs if not tensor.is_empty()]
    return {
        axis for shape in shapes if shape is not None
        for axis, size in enumerate(shape, start=rank - len(shape)) if size != 1
    }  # fmt: skip


def _body(site: Site, shape: Sequence[int], graph: gs.Graph) -> onnx.ModelProto:
    """The activation alone, as a network of float32 tensors of one shape."""
    copies: dict[int, gs.Tensor] = {}

    def copy(tensor: gs.Tensor) -> gs.Tensor:
        if isinstance(tensor, gs.Constant) or tensor.is_empty():
            return tensor
        values = constant_values(tensor)
        if values is not None:
            return copies.setdefault(id(tensor), gs.Constant(tensor.name, values))
        return copies.setdefault(id(tensor), gs.Variable(tensor.name, dtype=tensor.dtype))

    nodes = [
        gs.Node(k.op, k.name, dict(k.attrs), [copy(t) for t in k.inputs], [copy(t) for t in k.outputs], k.domain)
        for k in site.nodes
    ]
    inputs = [t for node in nodes for t in node.inputs if t.name == site.source][:1]
    outputs = [t for node in nodes for t in node.outputs if t.name == site.result]
    inputs[0].dtype, inputs[0].shape = np.float32, list(shape)
    outputs[0].dtype = np.float32
    body = gs.Graph(nodes, inputs, outputs, opset=graph.opset, import_domains=graph.import_domains)
    model: onnx.ModelProto = gs.export_onnx(body, do_type_check=False)
    model.ir_version = 8
    return model


def _gather(graph: gs.Graph, site: Site, codes: gs.Variable, result: gs.Variable, table: npt.NDArray[np.uint8]) -> None:
    """``codes -> channels last -> rows -> int32 -> GatherElements``, and the way back.

    ONNX Runtime's integer convolutions work channels-last, with transpositions around each that cancel against these.
    """
    inner, outer = codes, result
    if (order := _channels_last(site)) is not None:
        shape = None if codes.shape is None else [codes.shape[axis] for axis in order]
        inner = _node(graph, site, "Transpose", "last", [codes], np.uint8, {"perm": order}, shape)
        outer = gs.Variable(f"{site.name}/last_codes", dtype=np.uint8, shape=shape)
        back = [order.index(axis) for axis in range(len(order))]
        graph.nodes.append(gs.Node("Transpose", f"{site.name}/back", {"perm": back}, [outer], [result]))
    columns = site.channels if site.channels > 1 else _row_length(inner)
    rows = _node(graph, site, "Reshape", "rows", [inner, _ints(site, "rows_shape", (-1, columns))], np.uint8)
    index = _node(graph, site, "Cast", "index", [rows], np.int32, {"to": onnx.TensorProto.INT32})
    axis, stored = 0, gs.Constant(f"{site.name}/table", np.ascontiguousarray(table.T))
    if site.channels == 1:  # one table, which every row has to have
        count = _node(graph, site, "Shape", "size", [rows], np.int64)
        ends = [_ints(site, name, (at,)) for name, at in (("first", 0), ("second", 1))]
        count = _node(graph, site, "Slice", "count", [count, *ends], np.int64)
        size = _ints(site, "entries", (_CODES,))
        whole = _node(graph, site, "Concat", "tables_shape", [count, size], np.int64, {"axis": 0})
        axis, stored = 1, _node(graph, site, "Expand", "tables", [gs.Constant(stored.name, table), whole], np.uint8)
    found = _node(graph, site, "GatherElements", "found", [stored, index], np.uint8, {"axis": axis})
    shape_back = _shape_of(graph, site, inner)
    graph.nodes.append(gs.Node("Reshape", f"{site.name}/codes", inputs=[found, shape_back], outputs=[outer]))


def _row_length(codes: gs.Variable) -> int:
    """As many elements as trailing axes of fixed size hold, up to where a row is long enough for one task."""
    length = 1
    for size in reversed((codes.shape or ())[1:]):
        if not isinstance(size, int) or length >= _LONG_ROW:
            break
        length *= size
    return max(length, 1)


def _channels_last(site: Site) -> list[int] | None:
    """The order of axes that puts the channels last; None where they are, or where there are none.

    Images and volumes have theirs on axis 1, also where the activation is the same for all.
    """
    axis = site.axis if site.axis is not None else 1
    if site.rank is None or axis == site.rank - 1 or (site.axis is None and site.rank < _IMAGE_RANK):
        return None
    return [*(other for other in range(site.rank) if other != axis), axis]


def _shape_of(graph: gs.Graph, site: Site, codes: gs.Variable) -> gs.Tensor:
    """The shape of the codes: a constant where one axis at most is dynamic."""
    shape = codes.shape
    if shape is not None and sum(not isinstance(size, int) for size in shape) <= 1:
        return _ints(site, "codes_shape", tuple(size if isinstance(size, int) else -1 for size in shape))
    return _node(graph, site, "Shape", "codes_shape", [codes], np.int64)


def _ints(site: Site, name: str, values: tuple[int, ...]) -> gs.Constant:
    return gs.Constant(f"{site.name}/{name}", np.asarray(values, np.int64))


def _node(
    graph: gs.Graph, site: Site, op: str, name: str, inputs: list[Any], dtype: type,
    attrs: dict[str, Any] | None = None, shape: list[Any] | None = None,
) -> gs.Variable:  # fmt: skip
    output = gs.Variable(f"{site.name}/{name}", dtype=dtype, shape=shape)
    graph.nodes.append(gs.Node(op, f"{site.name}/{name}", attrs or {}, inputs, [output]))
    return output
