"""Replace regions that are ReLU to a tolerance by one Relu node, with the bound that was proven for each.

Source: what gradual replacement leaves behind when it is stopped early, ``gamma act(x) + (1 - gamma) max(0, x)`` at
gamma = 0.01 (SAT), ``alpha relu + (1 - alpha) act`` at alpha = 0.98 (PEA); and on a calibrated range whatever bends
outside of it.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.certificate import Certificate, Refusal, certify_within
from relu_deploy.passes.collapse import MAX_CUTS, Collapse
from relu_deploy.passes.domain import Domain, Domains
from relu_deploy.passes.floats import FLOAT_TYPES, FloatType, sample
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.program import Program
from relu_deploy.passes.region import Cut, onnx_type, program_between
from relu_deploy.report import PassReport

# Where an activation that is far from ReLU shows it, and how far it may be off there before it is measured at all.
_NEAR, _POINTS = 6.0, 49


@dataclasses.dataclass(frozen=True)
class Collapsed:
    """One region that became a Relu.

    Attributes:
        node: The node whose output is now made by a Relu.
        input: Tensor that the Relu reads.
        output: Tensor that it makes.
        certificate: What was proven.
        domain: Where that holds, channel by channel; None for what the certificate says.
    """

    node: str
    input: str
    output: str
    certificate: Certificate
    domain: Domain | None = None


def collapse_within(graph: gs.Graph, *, tolerance: float, domains: Domains) -> tuple[PassReport, tuple[Collapsed, ...]]:
    """Replace regions that are within a tolerance of ReLU on their domain.

    Args:
        graph: Sorted topologically, with types and shapes of its tensors where they are known. Edited in place; nodes
            that nobody needs any more are left for ``cleanup``.
        tolerance: Largest ``sup |region(x) - relu(x)|`` that is accepted, tensor units; 0 accepts what is exactly ReLU
            on its domain.
        domains: Tells the domain of each region.

    Returns:
        The report, under the name of the exact pass, whose second half this is; and what was collapsed.
    """
    run = _Within(graph, tolerance, domains)
    report = run.run()
    found = tuple(
        Collapsed(name, top.tensor.name, cut.tensor.name, certificate, run.held[id(cut)])
        for name, (top, cut, certificate) in zip(report.changed, reversed(run.replaced), strict=True)
    )
    return report, found


class _Within(Collapse):
    """One run over one graph."""

    looks_like = "it may be close to ReLU"

    def __init__(self, graph: gs.Graph, tolerance: float, domains: Domains) -> None:
        super().__init__(graph)
        self.tolerance, self.domains = tolerance, domains
        self.held: dict[int, Domain | None] = {}  # by id of the cut that was replaced

    def _decide(self, cut: Cut, followers: list[Cut]) -> Cut:
        """Collapse the window above ``cut`` that is closest to ReLU, the longest of equal ones, or say why not."""
        assert cut.parent is not None and cut.node is not None  # noqa: S101, PT018 - the walk visits no root
        if not self.functions.of_floats(cut):
            return cut.parent
        verdicts = self._verdicts_of(cut)
        best = _closest(verdicts)
        if best is not None and self._adds_nothing(cut, best[1]):
            best = None
        if best is not None:
            top, certificate = best
            if top is not cut.parent or cut.node.op != "Relu":
                self.replaced.append((top, cut, certificate))
                domain = self._domain(program_between(top, cut), top)
                self.held[id(cut)] = domain if isinstance(domain, Domain) else None
            return top
        activation = self.functions.activation(cut, followers)
        refusals = [verdict for _, verdict in verdicts if isinstance(verdict, Refusal) and not verdict.distance]
        if activation:
            self._skip(cut, f"{activation}: {self._measured(cut, followers)}")
        elif refusals:
            self._skip(cut, str(refusals[0]))
        return cut.parent

    def _verdicts_of(self, cut: Cut) -> list[tuple[Cut, Certificate | Refusal]]:
        return [(top, self.certify(top, cut)) for top in self._candidates(cut)]

    def _adds_nothing(self, cut: Cut, certificate: Certificate) -> bool:
        """Whether a cut is a line of its parent, and the parent is as close to ReLU: then the line may as well stay."""
        if not self.functions.is_affine(cut) or cut.parent is None:
            return False
        above = _closest(self._verdicts_of(cut.parent))
        return above is not None and above[1].eps <= certificate.eps

    def _candidates(self, cut: Cut) -> list[Cut]:
        """Cuts above, farthest first, from which the function is not a line and looks like ReLU."""
        found: list[Cut] = []
        here, bends = cut, False
        for _ in range(MAX_CUTS):
            if here.parent is None or self.functions.segment(here).program is None:
                break
            bends = bends or not self.functions.is_affine(here)
            here = here.parent
            if bends and onnx_type(here.tensor) == onnx_type(cut.tensor) and self._looks_like_relu(here, cut):
                found.insert(0, here)
        return found

    def _looks_like_relu(self, top: Cut, cut: Cut) -> bool:
        """Whether the first and the last channel are within the tolerance at some points: cheap, and proves nothing."""
        try:
            program = program_between(top, cut, same_shape=False)
        except UnsupportedError:
            return False
        domain = self._domain(program, top)
        low, high = domain.ends if isinstance(domain, Domain) else (-_NEAR, _NEAR)
        points = (
            np.linspace(max(low, -_NEAR), min(high, _NEAR), _POINTS) if low < _NEAR and high > -_NEAR else [low, high]
        )
        points = np.asarray(points)
        for column in program.constants.T[[0, -1]]:
            gap = np.abs(sample(program, column, points) - np.maximum(points, 0))
            # Each channel has a range of its own, so a wide point of another channel's may not count against it.
            shared = isinstance(domain, Domain) and len(domain.low) > 1
            if not shared and (gap[np.isfinite(gap)] > self.tolerance * 1.001 + 1e-6 * np.abs(points).max()).any():
                return False
        return True

    def _domain(self, program: Program, top: Cut) -> Domain | str | None:
        return self.domains.of(top.tensor, program.constants.shape[1], program.axis)

    def _prove(self, program: Program, kind: FloatType, top: Cut) -> Certificate | Refusal:
        domain = self._domain(program, top)
        if isinstance(domain, str):
            return Refusal(domain)
        ends = () if domain is None else (domain.low.tobytes(), domain.high.tobytes())
        key = (program.steps, program.constants.tobytes(), kind.name, *ends)
        if key not in self._verdicts:
            self._verdicts[key] = certify_within(
                program, kind, self.functions.exact_column, tolerance=self.tolerance, domain=domain
            )
        return self._verdicts[key]

    def _measured(self, cut: Cut, followers: list[Cut]) -> str:
        """How far an activation is from ReLU; a constant factor behind it may belong to it."""
        assert cut.parent is not None  # noqa: S101 - the walk visits no root
        ends = [cut, *(f for f in followers if len(followers) == 1 and self.functions.is_affine(f))]
        kinds = {onnx_type(end.tensor) for end in ends} - set(FLOAT_TYPES)
        verdicts = [] if kinds else [self.certify(cut.parent, end) for end in ends]
        refusals = [verdict for verdict in verdicts if isinstance(verdict, Refusal)]
        measured = [refusal for refusal in refusals if refusal.eps is not None]
        if measured:
            return str(min(measured, key=lambda refusal: refusal.eps or 0.0))
        return str(refusals[0]) if refusals else "its type is not known"


def _closest(verdicts: list[tuple[Cut, Certificate | Refusal]]) -> tuple[Cut, Certificate] | None:
    """The window with the smallest bound; of equal ones the first, which is the longest."""
    proven = [(top, verdict) for top, verdict in verdicts if isinstance(verdict, Certificate)]
    return min(proven, key=lambda pair: pair[1].eps) if proven else None
