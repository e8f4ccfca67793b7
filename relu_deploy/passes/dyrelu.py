"""Find DY-ReLU: ``y = max_k (a_k x + b_k)`` whose coefficients a small network computes from the pooled x.

By function, not by spelling. From every tensor that is pooled over all positions, what follows is read as one of two
things: a *coefficient*, which depends on the pooled tensor alone (and, for the attention of variant C, on a map with
one channel), or a maximum of *lines* in x, whose slopes and offsets are coefficients. Max, Relu of a difference, Where
with a comparison and ReduceMax over stacked lines all give the same lines. A unit is where at least two lines have
slopes of their own that came through a linear layer: squeeze-excite has one, a static activation behind a gate scales
one and the same, normalisations have no linear layer, maxout and attention have no coefficients.

Source: Chen et al. 2020, "Dynamic ReLU", arXiv:2003.10027.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable

import onnx_graphsurgeon as gs

from relu_deploy.passes.lines import (
    GLOBAL_POOLS,
    INPUT,
    LAYOUT,
    SAME,
    ZERO,
    Coefficient,
    Line,
    Lines,
    Value,
    from_input,
    of_coefficients,
    rank_of,
    reduced,
    stacked_axes,
)

# A unit has some twenty to forty nodes; what follows a pooled tensor for longer is a network of its own.
MAX_NODES = 256

# Operators whose further inputs are sizes, axes or scales.
_ONE_OPERAND = (*LAYOUT, *SAME, "Slice", "Split", "Tile", "Pad", "Gather", "Clip", "Resize")


@dataclasses.dataclass(frozen=True, eq=False)
class DyReluSite:
    """One DY-ReLU in a graph.

    Attributes:
        name: Of the node that makes its output.
        output: What the unit gives.
        input: The x of its lines.
        variant: ``A``: one function for all channels; ``B``: one a channel; ``C``: with spatial attention.
        pieces: K, the number of lines.
        slopes: The tensor that is a_k, one a line; None where a line is spelled in another way than ``a_k x + b_k``.
        offsets: The tensor that is b_k, likewise; None also where a line has no offset.
        attention: The tensor that multiplies the maximum; None without, or where it is inside the coefficients.
        entries: Every coefficient that meets x or a line, with the node where it does.
        hyper: Nodes of the network that computes coefficients, in the graph's order.
        body: Nodes that compute the lines and their maximum, in the graph's order.
    """

    name: str
    output: gs.Tensor
    input: gs.Tensor
    variant: str
    pieces: int
    slopes: tuple[gs.Tensor | None, ...]
    offsets: tuple[gs.Tensor | None, ...]
    attention: gs.Tensor | None
    entries: tuple[tuple[gs.Node, gs.Tensor], ...]
    hyper: tuple[gs.Node, ...]
    body: tuple[gs.Node, ...]

    @property
    def nodes(self) -> frozenset[str]:
        """Names of all nodes that belong to it: none of them is an activation of its own."""
        return frozenset(node.name for node in (*self.hyper, *self.body))


def find_dyrelu(graph: gs.Graph) -> list[DyReluSite]:
    """Every DY-ReLU of a graph, in the graph's order; linear in its size.

    Args:
        graph: Sorted topologically, nodes named; not changed. Shapes help to tell the variants apart, and are needed
            where lines are stacked along an axis.
    """
    places = {id(node): place for place, node in enumerate(graph.nodes)}
    sites: list[DyReluSite] = []
    seen: set[int] = set()
    for node in graph.nodes:
        root = _root(node.inputs[0]) if _starts(node) else None
        if root is not None and id(root) not in seen:
            seen.add(id(root))
            sites.extend(_Reader(root, places).sites())
    return sites


def _starts(node: gs.Node) -> bool:
    """Whether a node may begin a hyper function: it pools, or is a linear layer of vectors."""
    if not node.inputs or isinstance(node.inputs[0], gs.Constant):
        return False
    if node.op in ("Gemm", "MatMul"):
        return rank_of(node.inputs[0]) == 2
    return node.op in GLOBAL_POOLS or node.op == "AveragePool" or node.op.startswith("Reduce")


def _root(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor behind changes of layout and type."""
    while len(tensor.inputs) == 1 and tensor.inputs[0].op in (*LAYOUT, *SAME) and tensor.inputs[0].inputs:
        source = tensor.inputs[0].inputs[0]
        if isinstance(source, gs.Constant) or source.is_empty():
            break
        tensor = source
    return tensor


def _is_constant(tensor: gs.Tensor) -> bool:
    """Whether a tensor is known before the network runs: an initializer, quantised or not."""
    while not isinstance(tensor, gs.Constant):
        if len(tensor.inputs) != 1:
            return False
        (node,) = tensor.inputs
        if node.op == "Constant":
            return True
        if node.op not in SAME or not node.inputs:
            return False
        tensor = node.inputs[0]
    return True


def _before_same(tensor: gs.Tensor) -> gs.Tensor:
    """What the unit itself gives, without casts and quantisers behind it."""
    while tensor.inputs[0].op in SAME:
        tensor = tensor.inputs[0].inputs[0]
    return tensor


class _Reader:
    """Reads what follows one tensor."""

    def __init__(self, root: gs.Tensor, places: dict[int, int]) -> None:
        self.root = root
        self.places = places
        self.values: dict[int, Value] = {id(root): INPUT}
        self.nodes: dict[int, gs.Node] = {}
        # Where a coefficient meets a line: the key that lines carry in their entries.
        self.entries: dict[object, tuple[gs.Node, gs.Tensor]] = {}

    def sites(self) -> list[DyReluSite]:
        """All units of this input."""
        units: dict[int, gs.Tensor] = {}
        heap: list[tuple[int, gs.Node]] = []
        queued: set[int] = set()
        self._queue(self.root, heap, queued)
        while heap and len(self.nodes) < MAX_NODES:
            place, node = heapq.heappop(heap)
            for tensor, value in self._read(node):
                self.values[id(tensor)] = value
                self.nodes[place] = node
                if isinstance(value, Lines) and value.is_unit:
                    units[id(tensor)] = tensor
                self._queue(tensor, heap, queued)
        inner = {id(tensor) for unit in units.values() for tensor in self._ancestors(unit)[1]}
        last = {id(end): end for key, unit in units.items() if key not in inner for end in [_before_same(unit)]}
        return [self._site(unit) for unit in last.values()]

    def _queue(self, tensor: gs.Tensor, heap: list[tuple[int, gs.Node]], queued: set[int]) -> None:
        for node in tensor.outputs:
            place = self.places.get(id(node))
            if place is not None and place not in queued:
                queued.add(place)
                heapq.heappush(heap, (place, node))

    def _read(self, node: gs.Node) -> list[tuple[gs.Tensor, Value]]:
        """Values of a node's outputs; none where it is neither coefficient nor lines."""
        if node.domain not in (None, "", "ai.onnx") or any(_has_graph(value) for value in node.attrs.values()):
            return []
        operands = node.inputs[:1] if node.op in _ONE_OPERAND else node.inputs
        live = [tensor for tensor in operands if not tensor.is_empty() and not _is_constant(tensor)]
        known = [self.values.get(id(tensor)) for tensor in live]
        if node.op == "Where" and len(known) == 3 and all(known[1:]):
            return self._outputs(node, self._where(node))
        values = [value for value in known if value is not None]
        if not live or len(values) < len(live):
            return []
        if all(isinstance(value, Coefficient) for value in values):
            return self._outputs(node, of_coefficients(node, [v for v in values if isinstance(v, Coefficient)]))
        return self._outputs(node, self._lines(node, live, values))

    def _outputs(self, node: gs.Node, value: Value | None) -> list[tuple[gs.Tensor, Value]]:
        if value is None:
            return []
        several = isinstance(value, Coefficient)
        return [(tensor, value) for tensor in (node.outputs if several else node.outputs[:1])]

    def _lines(self, node: gs.Node, live: list[gs.Tensor], values: list[Value]) -> Value | None:
        """What becomes of lines; at least one value is some."""
        first = values[0]
        if isinstance(first, Lines) and len(node.inputs) >= 1 and node.inputs[0] is live[0]:
            if first.is_input:
                found = from_input(node)
                if found is not None:
                    return found
            if node.op in (*LAYOUT, *SAME):
                return self._moved(node, first)
            if node.op == "ReduceMax":
                return reduced(node, first)
        rule = _RULES.get(node.op)
        return None if rule is None else rule(self, node)

    def _moved(self, node: gs.Node, lines: Lines) -> Lines | None:
        """Another layout or type; behind a finished unit only back to the layout of x, or to its attention."""
        if lines.is_unit and not lines.moved and node.op not in SAME:
            return None
        moved = lines.moved or node.op in LAYOUT
        shape, wanted = node.outputs[0].shape, self.root.shape
        if lines.is_unit and shape is not None and wanted is not None and list(shape) == list(wanted):
            moved = False
        return dataclasses.replace(lines, moved=moved, stack=0 if node.op == "Transpose" else lines.stack)

    def _operand(self, tensor: gs.Tensor) -> Value:
        """Value of an operand; constants are coefficients that depend on nothing."""
        return self.values.get(id(tensor), Coefficient())

    def _maximum(self, node: gs.Node) -> Lines | None:
        return self._join([self._operand(tensor) for tensor in node.inputs])

    def _join(self, values: list[Value]) -> Lines | None:
        lines: list[Line] = []
        for value in values:
            if isinstance(value, Coefficient):
                lines.append(ZERO)
            elif value.attention is not None or value.stack:
                return None
            else:
                lines.extend(value.lines)
        return Lines(tuple(lines), any(isinstance(value, Lines) and value.moved for value in values))

    def _where(self, node: gs.Node) -> Lines | None:
        """``Where(p > q, p, q)``."""
        test = node.inputs[0].inputs[0] if node.inputs[0].inputs else None
        if test is None or test.op not in ("Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
            return None
        pair = test.inputs if test.op.startswith("Greater") else list(reversed(test.inputs))
        if not all(one is two for one, two in zip(pair, node.inputs[1:], strict=True)):
            return None
        lines = self._join([self._operand(tensor) for tensor in node.inputs[1:]])
        if lines is not None:
            self.nodes[self.places[id(test)]] = test
            self.values[id(test.outputs[0])] = Coefficient()
        return lines

    def _relu(self, node: gs.Node) -> Lines | None:
        value = self._operand(node.inputs[0])
        return self._join([value, Coefficient()])

    def _sum(self, node: gs.Node) -> Lines | None:
        one, two = (self._operand(tensor) for tensor in node.inputs)
        if isinstance(one, Coefficient):
            if node.op == "Sub" and isinstance(two, Lines) and len(two.lines) > 1:
                return None  # a minimum
            return self._shifted(node, two, one, node.inputs[0])
        if isinstance(two, Coefficient):
            return self._shifted(node, one, two, node.inputs[1])
        return self._added(node, one, two)

    def _added(self, node: gs.Node, one: Lines, two: Lines) -> Lines | None:
        """Sum of two maxima, of which one is a single line."""
        if len(one.lines) > 1 < len(two.lines) or (node.op == "Sub" and len(two.lines) > 1) or one.stack or two.stack:
            return None
        if one.attention is not None or two.attention is not None or _is_shortcut(one, two):
            return None
        return Lines(tuple(p.plus(q) for p in one.lines for q in two.lines), one.moved or two.moved)

    def _shifted(self, node: gs.Node, value: Value, by: Coefficient, tensor: gs.Tensor) -> Lines | None:
        """Lines plus a coefficient; behind a finished unit it is another layer's business."""
        if not isinstance(value, Lines) or value.is_unit:
            return None
        if not by.pooled and not by.left:
            return dataclasses.replace(value, lines=tuple(p.changed() for p in value.lines))
        self.entries[id(node)] = (node, tensor)
        if node.op == "Add":
            lines = tuple(p.raised(tensor, id(node)) for p in value.lines)
        else:
            lines = tuple(p.changed(id(node)) for p in value.lines)
        return dataclasses.replace(value, lines=lines)

    def _product(self, node: gs.Node) -> Lines | None:
        one, two = (self._operand(tensor) for tensor in node.inputs)
        if isinstance(one, Coefficient) and isinstance(two, Lines) and node.op == "Mul":
            return self._scaled(node, two, one, node.inputs[0], node.inputs[1])
        if isinstance(one, Lines) and isinstance(two, Coefficient):
            return self._scaled(node, one, two, node.inputs[1], node.inputs[0])
        return None

    def _scaled(
        self, node: gs.Node, value: Lines, by: Coefficient, tensor: gs.Tensor, other: gs.Tensor
    ) -> Lines | None:
        """Lines times a coefficient: a slope, or the attention over a finished maximum."""
        if value.is_unit and by.left > 2 and value.attention is None and node.op == "Mul":
            self.entries[id(node)] = (node, tensor)
            return dataclasses.replace(value, attention=tensor)
        if len(value.lines) > 1:
            return None
        (line,) = value.lines
        if not by.pooled and not by.left:
            return dataclasses.replace(value, lines=(line.changed(),))
        self.entries[id(node)] = (node, tensor)
        sloped = line.sloped or (by.pooled and by.linear and not line.flat)
        slope = tensor if line.plain and node.op == "Mul" else None
        stacks = tuple({*line.stacks, *stacked_axes(tensor, other)})
        scaled = Line(sloped, line.flat, slope=slope, entries=line.entries | {id(node)}, stacks=stacks)
        return dataclasses.replace(value, lines=(scaled,))

    def _normalised(self, node: gs.Node) -> Lines | None:
        """A BatchNormalization whose scale and offset are coefficients: a line, as ``dyrelu_spell`` writes it."""
        value, scale, offset = (self._operand(tensor) for tensor in node.inputs[:3])
        if not isinstance(value, Lines) or not isinstance(scale, Coefficient) or not isinstance(offset, Coefficient):
            return None
        scaled = self._scaled(node, value, scale, node.inputs[1], node.inputs[0]) if scale.pooled else None
        if scaled is None:
            return None
        key = (id(node), "offset")
        self.entries[key] = (node, node.inputs[2])
        return dataclasses.replace(scaled, lines=tuple(line.changed(key) for line in scaled.lines))

    def _stacked(self, node: gs.Node) -> Lines | None:
        """Single lines side by side along an axis that they do not have otherwise."""
        values = [self._operand(tensor) for tensor in node.inputs]
        axis, rank = node.attrs.get("axis"), rank_of(node.outputs[0])
        if axis is None or rank is None:
            return None
        lines: list[Line] = []
        for tensor, value in zip(node.inputs, values, strict=True):
            thin = tensor.shape is not None and tensor.shape[axis] == 1
            if not isinstance(value, Lines) or len(value.lines) > 1 or value.stack or not thin:
                return None
            lines.extend(value.lines)
        return Lines(tuple(lines), True, axis - rank if axis >= 0 else axis)

    def _ancestors(self, tensor: gs.Tensor) -> tuple[list[gs.Node], list[gs.Tensor]]:
        """Nodes from the root to a tensor, in order, and the tensors that they make except itself."""
        found: dict[int, gs.Node] = {}
        stack = [tensor]
        while stack:
            for node in stack.pop().inputs:
                place = self.places.get(id(node))
                if place in self.nodes and place not in found:
                    found[place] = node
                    stack.extend(t for t in node.inputs if t is not self.root and not t.is_empty())
        nodes = [found[place] for place in sorted(found)]
        return nodes, [made for node in nodes for made in node.outputs if made is not tensor]

    def _body(self, tensor: gs.Tensor) -> set[int]:
        """``id`` of the nodes from x to a tensor by way of lines alone."""
        found: set[int] = set()
        stack = [tensor]
        while stack:
            (node,) = stack.pop().inputs
            if id(node) not in found:
                found.add(id(node))
                stack.extend(t for t in node.inputs if t is not self.root and isinstance(self.values.get(id(t)), Lines))
        return found

    def _site(self, tensor: gs.Tensor) -> DyReluSite:
        value = self.values[id(tensor)]
        assert isinstance(value, Lines)  # noqa: S101 - only units come here
        nodes, _ = self._ancestors(tensor)
        own = {id(node) for node in nodes}
        entries = tuple(entry for entry in self.entries.values() if id(entry[0]) in own)
        body = self._body(tensor)
        return DyReluSite(
            str(tensor.inputs[0].name),
            tensor,
            self.root,
            self._variant(value, entries),
            len(value.lines),
            tuple(line.slope for line in value.lines),
            tuple(line.offset for line in value.lines),
            value.attention,
            entries,
            tuple(node for node in nodes if id(node) not in body),
            tuple(node for node in nodes if id(node) in body),
        )

    def _variant(self, value: Lines, entries: tuple[tuple[gs.Node, gs.Tensor], ...]) -> str:
        coefficients = [self.values[id(tensor)] for _, tensor in entries]
        known = [c for c in coefficients if isinstance(c, Coefficient)]
        if any(c.left > 2 for c in known):
            return "C"
        shapes = [tensor.shape for _, tensor in entries]
        flat = any(shape is not None and len(shape) < 2 for shape in shapes)
        if all(shape is not None for shape in shapes) and not flat and not any(line.stacks for line in value.lines):
            return "B" if any(size != 1 for shape in shapes for size in (shape or [])[1:]) else "A"
        return "B" if max(c.width for c in known) > 2 * len(value.lines) else "A"


def _is_shortcut(one: Lines, two: Lines) -> bool:
    """A finished unit plus x: a residual connection behind it."""
    return (one.is_unit and two.is_input) or (two.is_unit and one.is_input)


def _has_graph(value: object) -> bool:
    return isinstance(value, gs.Graph)


_RULES: dict[str, Callable[[_Reader, gs.Node], Lines | None]] = {
    "Add": _Reader._sum,  # noqa: SLF001 - a table of this file's own methods
    "Sub": _Reader._sum,  # noqa: SLF001
    "Mul": _Reader._product,  # noqa: SLF001
    "Div": _Reader._product,  # noqa: SLF001
    "Max": _Reader._maximum,  # noqa: SLF001
    "Relu": _Reader._relu,  # noqa: SLF001
    "BatchNormalization": _Reader._normalised,  # noqa: SLF001
    "Concat": _Reader._stacked,  # noqa: SLF001
}
