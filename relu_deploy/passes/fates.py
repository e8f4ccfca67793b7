"""What becomes of an activation, and how far it is from ReLU."""

from __future__ import annotations

import dataclasses
import math

import onnx_graphsurgeon as gs

from relu_deploy.passes.certificate import Certificate, certify_within
from relu_deploy.passes.collapse import Collapse
from relu_deploy.passes.floats import FLOAT_TYPES, FloatType
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.program import Program
from relu_deploy.passes.region import onnx_type
from relu_deploy.passes.spans import Span

# Distinct channels that a bound is searched for; each takes some two milliseconds.
MOST_CHANNELS = 1024
TRAINING, TOLERANCE = "needs training", "Relu with a tolerance"
# What kinds become; a smooth one, which is not among them, needs training first.
BECOMES = {
    "leaky_relu": "PRelu", "prelu": "PRelu", "abs": "PRelu", "relu6": "Clip", "clipped_relu": "Clip", "clip": "Clip",
    "hard_sigmoid": "Clip", "pwlu": "table", "piecewise_linear": "table", "relu": "Relu", "mixed": "nothing",
    "dy_relu": "nothing",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Fate:
    """What becomes of an activation.

    Attributes:
        becomes: As in :class:`relu_deploy.passes.survey.Site`.
        bound: Proven bound of the distance from ReLU, tensor units; None without a proof.
        domain: Inputs that it holds for; None without a bound or where the type is not known.
        reason: Why something that is ReLU in real arithmetic stays; empty else.
    """

    becomes: str
    bound: float | None = None
    domain: str | None = None
    reason: str = ""


class Fates:
    """One graph, asked about its activations.

    Attributes:
        functions: Of the graph.
    """

    def __init__(self, graph: gs.Graph) -> None:
        self._collapse = Collapse(graph)
        self.functions: Functions = self._collapse.functions
        self._bounds: dict[object, tuple[float | None, str | None]] = {}

    def of(self, span: Span, kind: str) -> Fate:
        """What becomes of one that is counted; ``kind`` is its name."""
        if span.program is None:
            return Fate("nothing")
        if kind == "relu":
            return self._of_relu(span)
        bound, domain = self._bound(span.program, FLOAT_TYPES.get(onnx_type(span.top.tensor)))
        near = kind == "blend" and bound is not None
        return Fate(TOLERANCE if near else BECOMES.get(kind, TRAINING), bound, domain)

    def _of_relu(self, span: Span) -> Fate:
        verdict = self._collapse.certify(span.top, span.bottom)
        if isinstance(verdict, Certificate):
            return Fate("Relu", verdict.eps, verdict.where)
        is_relu = len(span.nodes) == 1 and span.nodes[0].op == "Relu"
        return Fate("Relu", 0.0) if is_relu else Fate("nothing", reason=str(verdict))

    def _bound(self, program: Program, kind: FloatType | None) -> tuple[float | None, str | None]:
        """The bound and its domain, once for each distinct function."""
        if kind is None or program.channels().shape[1] > MOST_CHANNELS:
            return None, None
        key = (program.steps, program.constants.tobytes(), kind.name)
        if key not in self._bounds:
            self._bounds[key] = self._measured(program, kind)
        return self._bounds[key]

    def _measured(self, program: Program, kind: FloatType) -> tuple[float | None, str | None]:
        found = certify_within(program, kind, self.functions.exact_column, tolerance=math.inf, domain=None)
        if isinstance(found, Certificate):
            return found.eps, found.where
        return (None, None) if found.eps is None else (found.eps, f"every finite {kind.name}, in exact arithmetic")
