"""List every activation of a network: what it is, where it is, what it would become, and what stays and why.

Nothing is changed. What counts as an activation is decided by the function and by the place, never by the spelling.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import onnx
import onnx_graphsurgeon as gs

from calib.model import first_quantized
from relu_deploy import ops
from relu_deploy.graph import import_graph, tidy
from relu_deploy.passes.classify import Activation
from relu_deploy.passes.constants import fold_constants
from relu_deploy.passes.dyrelu import find_dyrelu
from relu_deploy.passes.fates import BECOMES, TRAINING, Fates
from relu_deploy.passes.fused import fused_activation
from relu_deploy.passes.quantisers import see_through_quantisers
from relu_deploy.passes.roles import NoActivationError, why_left_alone
from relu_deploy.passes.run import inline_functions
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.spans import Span, find_spans
from relu_deploy.passes.surroundings import Surroundings
from relu_deploy.report import PassReport

_QUANTISED = (
    "the network is quantised: quantisers are looked through, and a ReLU that became the clipping of one is not listed"
)
# Clips from here on keep float16 from overflowing, and are no activations.
GUARD = 1000
# Operators that are activations wherever they stand.
_NATIVE = ("Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Shrink", "Selu", "Elu", "Celu", "PWLU")


@dataclasses.dataclass(frozen=True)
class Layer:
    """A linear layer: name of its node, and operator."""

    name: str
    op: str


@dataclasses.dataclass(frozen=True)
class Site:
    """One activation.

    Attributes:
        name: The node that makes its result.
        kind: What it is, for programs: ``silu``, ``gelu_erf``, ``relu``, ...; ``unknown`` where it is not recognised.
        detail: What it is, for people, with its numbers.
        spelling: Its operators, producers first, joined by hyphens.
        nodes: Its nodes, in the same order.
        input: The tensor that it is a function of.
        output: The tensor that it makes.
        after: The nearest linear layer before it; None where there is none.
        becomes: ``Relu``, ``Relu with a tolerance``, ``PRelu``, ``Clip``, ``table``, ``needs training`` or ``nothing``.
        bound: Proven bound of the distance from ReLU over ``domain``, in units of the tensor; None without a proof.
        domain: Inputs that ``bound`` holds for; None without a bound, and for a Relu of a tensor of unknown type.
        left_alone: Why it stays and is not among ``counts``; None for one that is.
        channels: Channels with constants of their own; 1 where all share them.
    """

    name: str
    kind: str
    detail: str
    spelling: str
    nodes: tuple[str, ...]
    input: str
    output: str
    after: Layer | None
    becomes: str
    bound: float | None
    domain: str | None
    left_alone: str | None
    channels: int


@dataclasses.dataclass(frozen=True)
class Survey:
    """All activations of a network.

    Attributes:
        counts: Kind to number, of those that a ReLU would replace, or that are ReLU; the most frequent first.
        left_alone: The same of those that stay. No activation is in both.
        activations: One by one, in the order of the graph, those inside subgraphs last.
        notes: What else a reader has to know.
        what_if: Where a network with ReLU was written too: which became ReLU, and which could not. None where none was.
    """

    counts: dict[str, int]
    left_alone: dict[str, int]
    activations: tuple[Site, ...]
    notes: tuple[str, ...] = ()
    what_if: PassReport | None = None


def survey(model: onnx.ModelProto) -> Survey:
    """List the activations of a network.

    Args:
        model: With its external data loaded. Not changed.

    Returns:
        Every activation, counted or left alone.

    Raises:
        ModelError: the network cannot be worked with.
    """
    graph = surveyed_graph(model)
    sites = [*_Surveyor(graph).sites(), *_inner_sites(graph)]
    quantised = first_quantized(model) is not None
    return Survey(
        counts=_count(site for site in sites if site.left_alone is None),
        left_alone=_count(site for site in sites if site.left_alone is not None),
        activations=tuple(sites),
        notes=(_QUANTISED,) if quantised else (),
    )


def typed_graph(model: onnx.ModelProto) -> tuple[gs.Graph, onnx.ModelProto]:
    """A graph to work on, with functions unfolded and types known, and the model that it is of; a copy of ``model``."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    if not all(map(ops.is_definition, source.functions)):
        source = inline_functions(source)
    graph = import_graph(source)
    annotate(graph, source)
    return graph, source


def surveyed_graph(model: onnx.ModelProto) -> gs.Graph:
    """The graph that is looked at: constants computed, quantisers looked through."""
    graph, _ = typed_graph(model)
    fold_constants(graph)
    see_through_quantisers(graph)
    tidy(graph)
    return graph


class _Surveyor:
    """One graph."""

    def __init__(self, graph: gs.Graph) -> None:
        self.graph = graph
        self.fates = Fates(graph)
        self.functions = self.fates.functions
        self.around = Surroundings(graph)
        self.dynamic = find_dyrelu(graph)

    def sites(self) -> list[Site]:
        """The activations of the graph itself, in its order."""
        places = {node.name: index for index, node in enumerate(self.graph.nodes)}
        found = [*self._dynamic(), *self._spans(), *self._fused()]
        return sorted(found, key=lambda site: places[site.name])

    def _dynamic(self) -> Iterator[Site]:
        for unit in self.dynamic:
            detail = f"DY-ReLU {unit.variant} with {unit.pieces} pieces: its slopes are computed at run time"
            label = Activation("dy_relu", detail, exact=False)
            site = self._site(label, unit.input, unit.output, (*unit.hyper, *unit.body), None)
            yield dataclasses.replace(site, name=unit.name)

    def _spans(self) -> Iterator[Site]:
        inside = frozenset[str]().union(*(unit.nodes for unit in self.dynamic))
        spans = find_spans(self.functions)
        parts = {node.name: span for span in spans for node in span.nodes[:-1]}
        for span in spans:
            label = dataclasses.replace(span.label, kind=_kind(span))
            source, result = span.top.tensor, span.bottom.tensor
            if any(node.name in inside for node in span.nodes) or self._is_guard(span):
                continue
            native = any(node.op in _NATIVE for node in span.nodes)
            try:
                why = why_left_alone(self.around, label.kind, source, result, native=native)
                whole = parts.get(span.nodes[-1].name)
                if whole is not None and label.kind != "relu":
                    why = f"part of the {whole.label.kind} of {whole.nodes[-1].name}, and read elsewhere too"
            except NoActivationError:
                continue
            site = self._site(label, source, result, span.nodes, why)
            if why is None:
                fate = self.fates.of(span, label.kind)
                site = dataclasses.replace(
                    site, becomes=fate.becomes, bound=fate.bound, domain=fate.domain, channels=span.channels,
                    detail=fate.reason or site.detail,
                )  # fmt: skip
            yield site

    def _is_guard(self, span: Span) -> bool:
        """Whether it clips so far out that nothing but overflow is meant."""
        exact = self.functions.exact(span.program, 0) if span.program and span.label.kind == "clip" else None
        return exact is not None and all(abs(place) >= GUARD for place in exact.breaks)

    def _fused(self) -> Iterator[Site]:
        """Activations that no region holds."""
        covered = {id(cut.node) for cut in self.functions.forest.cuts.values() if cut.parent is not None}
        for node in self.graph.nodes:
            fused = None if id(node) in covered else fused_activation(node)
            if fused is None:
                continue
            source, result = node.inputs[0], node.outputs[0]
            try:
                why = fused.left_alone or why_left_alone(self.around, fused.label.kind, source, result, native=True)
            except NoActivationError:
                continue
            site = self._site(fused.label, source, result, (node,), why)
            yield dataclasses.replace(site, after=Layer(node.name, node.op)) if fused.in_layer else site

    def _site(
        self, label: Activation, source: gs.Tensor, result: gs.Tensor, nodes: Sequence[gs.Node], left_alone: str | None
    ) -> Site:
        """What is said of any activation."""
        layer = self.around.layer_before(source, direct=False)
        return Site(
            name=nodes[-1].name,
            kind=label.kind,
            detail=label.detail,
            spelling="-".join(node.op for node in nodes),
            nodes=tuple(node.name for node in nodes),
            input=source.name,
            output=result.name,
            after=None if layer is None else Layer(layer.name, layer.op),
            becomes="nothing" if left_alone else BECOMES.get(label.kind, TRAINING),
            bound=None,
            domain=None,
            left_alone=left_alone,
            channels=1,
        )


def _kind(span: Span) -> str:
    """The kind, where a node says more than its function: a PWLU may have any shape, a PReLU equal slopes."""
    kind = span.label.kind
    if any(node.domain == ops.DOMAIN and node.op == ops.PWLU for node in span.nodes):
        return "pwlu" if kind in ("piecewise_linear", "mixed") else kind
    return "prelu" if kind == "leaky_relu" and any(node.op == "PRelu" for node in span.nodes) else kind


def _inner_sites(graph: gs.Graph) -> Iterator[Site]:
    """The activations inside If, Loop and Scan: no pass enters those, so they stay."""
    for node in graph.nodes:
        for inner in _graphs_of(node):
            for site in (*_Surveyor(inner).sites(), *_inner_sites(inner)):
                why = f"inside the body of {node.op} {node.name}, which no pass enters"
                yield dataclasses.replace(site, left_alone=why, becomes="nothing", bound=None, domain=None)


def _graphs_of(node: gs.Node) -> Iterator[gs.Graph]:
    for value in node.attrs.values():
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, gs.Graph):
                yield item


def _count(sites: Iterable[Site]) -> dict[str, int]:
    """Kinds to numbers, the most frequent first."""
    return dict(sorted(Counter(site.kind for site in sites).items(), key=lambda item: (-item[1], item[0])))
