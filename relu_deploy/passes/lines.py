"""What becomes of an input x on its way through a DY-ReLU: coefficients, and maxima of lines in x."""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from relu_deploy.passes.region import constant_values

LAYOUT = ("Transpose", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Expand")
SAME = ("Identity", "Cast", "Dropout", "QuantizeLinear", "DequantizeLinear")
GLOBAL_POOLS = ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")
_LINEAR = ("Gemm", "MatMul", "Conv")


@dataclasses.dataclass(frozen=True)
class Coefficient:
    """A tensor that is known once x is pooled.

    Attributes:
        pooled: Whether it depends on the pooled x.
        linear: Whether a linear layer is in between.
        left: How many axes of x it still varies along, the batch among them: 2 means positions are gone.
        width: Outputs of the last linear layer; 0 where there is none.
    """

    pooled: bool = False
    linear: bool = False
    left: int = 0
    width: int = 0

    def join(self, other: Coefficient) -> Coefficient:
        """What depends on both."""
        return Coefficient(
            self.pooled or other.pooled,
            self.linear or other.linear,
            max(self.left, other.left),
            max(self.width, other.width),
        )


@dataclasses.dataclass(frozen=True)
class Line:
    """One straight line in x.

    Attributes:
        sloped: Whether its slope is a coefficient that came through a linear layer.
        flat: Whether its slope is 0.
        plain: Whether it is x itself.
        slope: The tensor that is its slope, if one is.
        offset: The tensor that is its offset, if one is.
        entries: Which coefficients went into it, and which of a stack of lines it is.
        stacks: Axes (negative) along which the slope varies and x does not, with their lengths.
    """

    sloped: bool = False
    flat: bool = False
    plain: bool = False
    slope: gs.Tensor | None = dataclasses.field(default=None, compare=False)
    offset: gs.Tensor | None = dataclasses.field(default=None, compare=False)
    entries: frozenset[object] = frozenset()
    stacks: tuple[tuple[int, int], ...] = ()

    def changed(self, *entries: object) -> Line:
        """What it is once a constant, or the coefficients ``entries``, changed it so that no tensors name it."""
        more = self.entries.union(entries)
        return dataclasses.replace(self, plain=False, slope=None, offset=None, entries=more)

    def raised(self, offset: gs.Tensor, entry: object) -> Line:
        """Itself plus a coefficient."""
        if self.offset is not None or self.plain:
            return self.changed(entry)
        return dataclasses.replace(self, offset=offset, entries=self.entries | {entry})

    def plus(self, other: Line) -> Line:
        """Their sum, which is no tensor times x any more."""
        return Line(
            self.sloped or other.sloped,
            self.flat and other.flat,
            entries=self.entries | other.entries,
            stacks=tuple({*self.stacks, *other.stacks}),
        )


@dataclasses.dataclass(frozen=True)
class Lines:
    """The maximum of some lines.

    Attributes:
        lines: At least one.
        moved: Whether the axes are not those of x.
        stack: Axis (negative) along which the lines still lie side by side; 0 where they do not.
        attention: What multiplied the maximum.
    """

    lines: tuple[Line, ...]
    moved: bool = False
    stack: int = 0
    attention: gs.Tensor | None = dataclasses.field(default=None, compare=False)

    @property
    def is_input(self) -> bool:
        """Whether it is x, in any layout."""
        return len(self.lines) == 1 and self.lines[0].plain

    @property
    def is_unit(self) -> bool:
        """Whether it is a DY-ReLU: at least two lines, each with a slope of its own."""
        own = {line.entries for line in self.lines}
        return len(own) == len(self.lines) >= 2 and all(line.sloped for line in self.lines) and not self.stack


Value = Coefficient | Lines
INPUT = Lines((Line(plain=True),))
ZERO = Line(flat=True)


def weight_of(node: gs.Node) -> tuple[int, ...] | None:
    """Shape of the constant weight of a linear layer, quantised or not; None for other nodes and live weights."""
    tensor = node.inputs[1] if node.op in _LINEAR and len(node.inputs) > 1 else None
    while tensor is not None and tensor.inputs and tensor.inputs[0].op in ("DequantizeLinear", "QuantizeLinear"):
        tensor = tensor.inputs[0].inputs[0]
    values = None if tensor is None else constant_values(tensor)
    return None if values is None or values.ndim < 2 else values.shape


def of_coefficients(node: gs.Node, values: list[Coefficient]) -> Coefficient:
    """What a node makes of coefficients."""
    joined = values[0]
    for value in values[1:]:
        joined = joined.join(value)
    if node.op.startswith("Reduce"):
        axes = axes_of(node)
        return dataclasses.replace(joined, left=max(joined.left - len(axes or ()), 0)) if axes is not None else joined
    weight = weight_of(node)
    if weight is not None:
        first = node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0))
        return dataclasses.replace(joined, linear=True, width=int(weight[0 if first else -1]))
    return joined


def from_input(node: gs.Node) -> Coefficient | None:
    """The start of a coefficient: x pooled, or mapped to one channel."""
    tensor = node.inputs[0]
    rank = rank_of(tensor)
    if node.op in ("Shape", "Size"):
        return Coefficient()
    if node.op in GLOBAL_POOLS:
        return Coefficient(pooled=True, left=2)
    if node.op == "AveragePool":
        whole = tensor.shape is not None and list(node.attrs.get("kernel_shape", [])) == list(tensor.shape[2:])
        return Coefficient(pooled=True, left=2) if whole else None
    if node.op.startswith("Reduce"):
        axes = axes_of(node)
        if not axes or 0 in axes or (rank is not None and -rank in axes):
            return None
        return Coefficient(pooled=True, left=max((rank or len(axes) + 2) - len(axes), 0))
    weight = weight_of(node)
    if weight is None:
        return None
    if node.op != "Conv" and rank == 2:
        return of_coefficients(node, [Coefficient(pooled=True, left=2)])
    first = node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0))
    return Coefficient(left=3, width=1) if weight[0 if first else -1] == 1 else None


def axes_of(node: gs.Node) -> list[int] | None:
    """Axes of a reduction; None where they are not constant, or are all."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1:
        values = constant_values(node.inputs[1])
        axes = None if values is None else values.reshape(-1).tolist()
    return None if axes is None else [int(axis) for axis in axes]


def reduced(node: gs.Node, lines: Lines) -> Lines | None:
    """The maximum over the axis that lines are stacked along."""
    axes, rank = axes_of(node), rank_of(node.inputs[0])
    if axes is None or len(axes) != 1 or rank is None:
        return None
    axis = axes[0] - rank if axes[0] >= 0 else axes[0]
    if lines.stack == axis:
        return dataclasses.replace(lines, stack=0, moved=True)
    if len(lines.lines) != 1 or lines.stack:
        return None
    (line,) = lines.lines
    count = dict(line.stacks).get(axis, 0)
    several = [dataclasses.replace(line, entries=line.entries | {("of the stack", k)}) for k in range(count)]
    return Lines(tuple(several), moved=True) if several else None


def stacked_axes(coefficient: gs.Tensor, x: gs.Tensor) -> list[tuple[int, int]]:
    """Axes (negative) along which a coefficient varies and x has one entry."""
    if coefficient.shape is None or x.shape is None:
        return []
    wide, thin = list(coefficient.shape), list(x.shape)
    return [
        (axis, size)
        for axis, size in ((i - len(wide), size) for i, size in enumerate(wide))
        if isinstance(size, int) and size > 1 and (len(thin) < -axis or thin[axis] == 1)
    ]


def rank_of(tensor: gs.Tensor) -> int | None:
    """Number of axes; None where it is not known."""
    return None if tensor.shape is None else len(tensor.shape)
