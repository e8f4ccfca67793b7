"""Replace every region that is exactly ReLU by one Relu node, and say of the others what they are.

Source: the residues of gradual replacement, ``gamma act(x) + (1 - gamma) max(0, x)`` at gamma = 0 (SAT), ``alpha relu
+ (1 - alpha) act`` at alpha = 1 (PEA), and PReLU, LeakyReLU, Max, Where and Clip with the constants that make them
ReLU.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import onnx_graphsurgeon as gs

from relu_deploy.passes.certificate import Certificate
from relu_deploy.passes.classify import Activation, classify_piecewise_linear, classify_samples, summary
from relu_deploy.passes.floats import FLOAT_TYPES, LEAST_DOMAIN, FloatType, float_behaviour
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import NotPiecewiseLinearError, PiecewiseLinear
from relu_deploy.passes.region import Cut, Forest, find_regions, nodes_between, onnx_type, program_between
from relu_deploy.passes.symbolic import evaluate
from relu_deploy.report import PassReport, Skip

# How many cuts upwards a ReLU is looked for: -min(-x, 0) spans three, a scaled one five.
MAX_CUTS = 8
# Distinct channels that are named one by one in a report.
NAMED_CHANNELS = 8
# What is no activation: scales and shifts, and the arithmetic of normalisations.
_NOT_ACTIVATIONS = ("identity", "affine", "constant", "relu", "square", "sqrt", "reciprocal", "exp", "log")
_AFFINE_OPS = ("Add", "Sub", "Mul", "Div", "Neg", "Identity", "Dropout", "Cast", "Sum")


@dataclasses.dataclass(frozen=True)
class _Segment:
    """The function between a cut and the one above it; ``first`` is its first channel's where that is exact."""

    program: Program | None
    first: PiecewiseLinear | None
    refusal: str = ""


def collapse_relu(graph: gs.Graph) -> PassReport:
    """Replace regions that equal ReLU, exactly and on every float that matters, by one ``Relu`` each.

    Args:
        graph: Sorted topologically, with types and shapes of its tensors where they are known. Edited in place; nodes
            that nobody needs any more are left for ``cleanup``.

    Returns:
        Changed: the nodes whose output is now made by a Relu. Notes: a certificate for each. Skipped: every other
        activation with what it is, and gates with two live inputs.
    """
    return _Collapse(graph).run()


class _Collapse:
    """One run over one graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.forest: Forest = find_regions(graph)
        self._segments: dict[int, _Segment] = {}
        self._exact: dict[object, PiecewiseLinear | None] = {}
        self._labels: dict[object, Activation] = {}
        self._certificates: dict[object, Certificate | str] = {}
        self._replaced: list[tuple[Cut, Cut, Certificate]] = []
        self._skipped: dict[str, Skip] = {}

    def run(self) -> PassReport:
        """Decide from the sinks upwards, so that a window that is collapsed whole is not looked into."""
        order = {id(cut): number for number, cut in enumerate(self.forest.cuts.values())}
        needed = {id(cut): cut for cut in self.forest.exits}
        followers: dict[int, list[Cut]] = {}
        for cut in sorted(self.forest.cuts.values(), key=lambda cut: -order[id(cut)]):
            if id(cut) not in needed or cut.parent is None:
                continue
            top = self._decide(cut, followers.get(id(cut), []))
            needed[id(top)] = top
            followers.setdefault(id(top), []).append(cut)
        self._gates()
        places = {id(node): index for index, node in enumerate(self.graph.nodes)}
        changed = tuple(self._replace(top, cut, places) for top, cut, _ in reversed(self._replaced))
        notes = {name: str(item[2]) for name, item in zip(changed, reversed(self._replaced), strict=True)}
        return PassReport("collapse_relu", changed, tuple(reversed(self._skipped.values())), notes)

    def _decide(self, cut: Cut, followers: list[Cut]) -> Cut:
        """Collapse the longest window above ``cut`` that is ReLU, or say why not; returns the cut to go on from."""
        assert cut.parent is not None and cut.node is not None  # noqa: S101, PT018 - the caller asks for no root
        if not {onnx_type(cut.tensor), onnx_type(cut.parent.tensor)} <= {*FLOAT_TYPES, 0}:
            return cut.parent  # integer and boolean arithmetic is about shapes and masks
        refusals: list[str] = []
        for top in self._candidates(cut):
            if top is cut.parent and cut.node.op == "Relu":
                return top  # it is one already
            verdict = self._certify(top, cut)
            if isinstance(verdict, Certificate):
                self._replaced.append((top, cut, verdict))
                return top
            refusals.append(verdict)
        segment = self._segment(cut)
        if refusals:
            self._skip(cut, refusals[0])
        elif segment.program is None:
            if any(node.op not in _AFFINE_OPS for node in _affordable_nodes(cut)):
                self._skip(cut, f"left alone: {segment.refusal}")
        elif segment.first is None or not segment.first.is_affine or segment.program.constants.shape[1] > 1:
            self._name(cut, segment.program, followers)
        return cut.parent

    def _candidates(self, cut: Cut) -> list[Cut]:
        """Cuts above, farthest first, from which the first channel is ReLU in real arithmetic."""
        found: list[Cut] = []
        total: PiecewiseLinear | None = None
        here = cut
        for _ in range(MAX_CUTS):
            function = self._segment(here).first if here.parent else None
            if function is None or here.parent is None:
                break
            try:
                total = function if total is None else total.after(function)
            except NotPiecewiseLinearError:
                break
            if total.is_constant:
                break
            here = here.parent
            kind = FLOAT_TYPES.get(onnx_type(here.tensor))
            same = onnx_type(here.tensor) == onnx_type(cut.tensor)
            if same and total.is_relu(Fraction(kind.largest) if kind else None):
                found.insert(0, here)
        return found

    def _segment(self, cut: Cut) -> _Segment:
        if id(cut) not in self._segments:
            assert cut.parent is not None  # noqa: S101 - roots have no segment
            try:
                program = program_between(cut.parent, cut, same_shape=False)
                self._segments[id(cut)] = _Segment(program, self._evaluate(program, 0))
            except UnsupportedError as error:
                self._segments[id(cut)] = _Segment(None, None, str(error))
        return self._segments[id(cut)]

    def _evaluate(self, program: Program, channel: int) -> PiecewiseLinear | None:
        """Symbolic evaluation, once for each distinct function: networks repeat their activation."""
        column = program.constants[:, min(channel, program.constants.shape[1] - 1)]
        key = (program.steps, column.tobytes())
        if key not in self._exact:
            self._exact[key] = evaluate(program, [float(value) for value in column])
        return self._exact[key]

    def _certify(self, top: Cut, cut: Cut) -> Certificate | str:
        """A certificate for all channels, or the reason why there is none."""
        kind = FLOAT_TYPES.get(onnx_type(top.tensor))
        if kind is None:
            return f"it is ReLU, but the type of {top.tensor.name} is not known"
        try:
            program = program_between(top, cut)
        except UnsupportedError as error:
            return f"it is ReLU, but {error}"
        key = (program.steps, program.constants.tobytes(), kind.name)
        if key not in self._certificates:
            self._certificates[key] = self._prove(program, kind)
        return self._certificates[key]

    def _prove(self, program: Program, kind: FloatType) -> Certificate | str:
        table = program.channels()
        largest = Fraction(kind.largest)
        for column in table.T:
            function = evaluate(program, [float(value) for value in column])
            if function is None or not function.is_relu(largest):
                what = "not piecewise linear" if function is None else classify_piecewise_linear(function).detail
                return f"ReLU in some channels only; in another it is {what}"
        behaviour = float_behaviour(program, kind)
        if behaviour.limit < LEAST_DOMAIN * kind.largest:
            return (
                f"ReLU in exact arithmetic, but in {kind.name} not finite or not accurate for "
                f"|x| > {behaviour.limit:.4g} (0 * inf, overflow or lost digits)"
            )
        whole = behaviour.limit == kind.largest
        return Certificate(0.0, behaviour.limit, kind.name, whole, behaviour.rounding)

    def _name(self, cut: Cut, program: Program, followers: list[Cut]) -> None:
        """Skip with what the function is; a constant factor behind it (GELU's 0.5) may belong to it."""
        label = self._label(program)
        if label.kind in ("unknown", "relu") and len(followers) == 1 and self._affine(followers[0]):
            assert cut.parent is not None  # noqa: S101 - roots have no segment
            longer = self._label(program_between(cut.parent, followers[0], same_shape=False))
            label = longer if longer.kind != "unknown" else label
        if label.kind not in _NOT_ACTIVATIONS:
            self._skip(cut, str(label))

    def _affine(self, cut: Cut) -> bool:
        segment = self._segment(cut)
        return segment.program is not None and segment.first is not None and segment.first.is_affine

    def _label(self, program: Program) -> Activation:
        table = program.channels()
        key = (program.steps, table.tobytes())
        if key not in self._labels:
            columns = [tuple(float(v) for v in column) for column in table.T[:NAMED_CHANNELS]] or [()]
            self._labels[key] = summary([self._label_column(program, c) for c in columns], program.constants.shape[1])
        return self._labels[key]

    def _label_column(self, program: Program, column: tuple[float, ...]) -> Activation:
        function = evaluate(program, column)
        return classify_piecewise_linear(function) if function else classify_samples(program, column)

    def _gates(self) -> None:
        """Report products of two live tensors, one of which an activation made."""
        for cut in self.forest.cuts.values():
            if cut.gate and cut.node is not None and cut.node.op == "Mul" and onnx_type(cut.tensor) in FLOAT_TYPES:
                sides = [self.forest.cuts.get(id(tensor)) for tensor in cut.node.inputs]
                if any(side and side.parent and not self._affine(side) for side in sides):
                    self._skip(cut, "a gate: it multiplies two live inputs, so it is no function of one tensor")

    def _skip(self, cut: Cut, reason: str) -> None:
        assert cut.node is not None  # noqa: S101 - only tensors that a node makes are skipped
        self._skipped[cut.node.name] = Skip(cut.node.name, reason)

    def _replace(self, top: Cut, cut: Cut, places: dict[int, int]) -> str:
        """Let a Relu make the tensor, under its old name and in the place of the old node."""
        old, tensor = cut.node, cut.tensor
        assert old is not None  # noqa: S101 - only tensors that a node makes are replaced
        old.inputs.clear()
        old.outputs.clear()
        self.graph.nodes[places[id(old)]] = gs.Node("Relu", old.name, inputs=[top.tensor], outputs=[tensor])
        return str(old.name)


def _affordable_nodes(cut: Cut) -> list[gs.Node]:
    """Nodes of a refused segment; the one that makes the tensor where there are too many to list."""
    try:
        return nodes_between(cut.parent, cut) if cut.parent else []
    except UnsupportedError:
        return [cut.node] if cut.node is not None else []
