"""Replace every region that is exactly ReLU by one Relu node, and say of the others what they are.

Source: the residues of gradual replacement, ``gamma act(x) + (1 - gamma) max(0, x)`` at gamma = 0 (SAT), ``alpha relu
+ (1 - alpha) act`` at alpha = 1 (PEA), and PReLU, LeakyReLU, Max, Where and Clip with the constants that make them
ReLU.
"""

from __future__ import annotations

from fractions import Fraction

import onnx_graphsurgeon as gs

from relu_deploy.passes.certificate import Certificate, Refusal, certify_exact
from relu_deploy.passes.floats import FLOAT_TYPES, FloatType
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.program import Program
from relu_deploy.passes.pwl import NotPiecewiseLinearError, PiecewiseLinear
from relu_deploy.passes.region import Cut, onnx_type, program_between
from relu_deploy.report import PassReport, Skip

# How many cuts upwards a ReLU is looked for: -min(-x, 0) spans three, a scaled one five.
MAX_CUTS = 8


def collapse_relu(graph: gs.Graph) -> PassReport:
    """Replace regions that equal ReLU, exactly and on every float that matters, by one ``Relu`` each.

    Args:
        graph: Sorted topologically, with types and shapes of its tensors where they are known. Edited in place; nodes
            that nobody needs any more are left for ``cleanup``.

    Returns:
        Changed: the nodes whose output is now made by a Relu. Notes: a certificate for each. Skipped: every other
        activation with what it is, and gates with two live inputs.
    """
    return Collapse(graph).run()


class Collapse:
    """One run over one graph; what is ReLU to a tolerance is the business of a subclass.

    Attributes:
        looks_like: What a candidate is before anything is proven.
    """

    looks_like = "it is ReLU"

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.functions = Functions(graph)
        self._verdicts: dict[object, Certificate | Refusal] = {}
        self.replaced: list[tuple[Cut, Cut, Certificate]] = []
        self._skipped: dict[str, Skip] = {}

    def run(self) -> PassReport:
        """Decide from the sinks upwards, so that a window that is collapsed whole is not looked into."""
        self.functions.walk(self._decide)
        for cut in self.functions.gates():
            self._skip(cut, "a gate: it multiplies two live inputs, so it is no function of one tensor")
        places = {id(node): index for index, node in enumerate(self.graph.nodes)}
        changed = tuple(self._replace(top, cut, places) for top, cut, _ in reversed(self.replaced))
        notes = {name: str(item[2]) for name, item in zip(changed, reversed(self.replaced), strict=True)}
        return PassReport("collapse_relu", changed, tuple(reversed(self._skipped.values())), notes)

    def _decide(self, cut: Cut, followers: list[Cut]) -> Cut:
        """Collapse the longest window above ``cut`` that is ReLU, or say why not; returns the cut to go on from."""
        assert cut.parent is not None and cut.node is not None  # noqa: S101, PT018 - the walk visits no root
        if not self.functions.of_floats(cut):
            return cut.parent
        refusals: list[Refusal] = []
        for top in self._candidates(cut):
            if top is cut.parent and cut.node.op == "Relu":
                return top  # it is one already
            verdict = self.certify(top, cut)
            if isinstance(verdict, Certificate):
                self.replaced.append((top, cut, verdict))
                return top
            refusals.append(verdict)
        activation = None if refusals else self.functions.activation(cut, followers)
        if refusals or activation:
            self._skip(cut, str(refusals[0] if refusals else activation))
        return cut.parent

    def _candidates(self, cut: Cut) -> list[Cut]:
        """Cuts above, farthest first, from which the first channel is ReLU in real arithmetic."""
        found: list[Cut] = []
        total: PiecewiseLinear | None = None
        here = cut
        for _ in range(MAX_CUTS):
            function = self.functions.segment(here).first if here.parent else None
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

    def certify(self, top: Cut, cut: Cut) -> Certificate | Refusal:
        """A certificate for all channels, or the reason why there is none."""
        kind = FLOAT_TYPES.get(onnx_type(top.tensor))
        if kind is None:
            return Refusal(f"{self.looks_like}, but the type of {top.tensor.name} is not known")
        try:
            program = program_between(top, cut)
        except UnsupportedError as error:
            return Refusal(f"{self.looks_like}, but {error}")
        return self._prove(program, kind, top)

    def _prove(self, program: Program, kind: FloatType, top: Cut) -> Certificate | Refusal:  # noqa: ARG002 - a subclass
        """Once for each distinct function."""
        key = (program.steps, program.constants.tobytes(), kind.name)
        if key not in self._verdicts:
            self._verdicts[key] = certify_exact(program, kind, self.functions.exact_column)
        return self._verdicts[key]

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
