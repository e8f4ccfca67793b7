"""List every activation of a network: what it is, where it is, what it would become, and what stays and why.

Nothing is changed. What counts as an activation is decided by the function and by the place, never by the spelling.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator

import onnx
import onnx_graphsurgeon as gs

from calib.model import first_quantized
from relu_deploy import ops
from relu_deploy.graph import import_graph
from relu_deploy.passes.collapse import collapse_relu
from relu_deploy.passes.constants import fold_constants
from relu_deploy.passes.functions import Functions
from relu_deploy.passes.fused import Fused, fused_activation
from relu_deploy.passes.quantisers import see_through_quantisers
from relu_deploy.passes.roles import NoActivationError, why_left_alone
from relu_deploy.passes.run import inline_functions
from relu_deploy.passes.shapes import annotate
from relu_deploy.passes.spans import Span, find_spans
from relu_deploy.passes.surroundings import Surroundings

_QUANTISED = "the network is quantised; quantisers are looked through, and their rounding is no part of what is listed"
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
        becomes: ``Relu``, ``PRelu``, ``Clip``, ``table``, ``needs training`` or ``nothing``.
        bound: Largest distance from ReLU over ``domain``, in units of the tensor; None where none is known.
        domain: Inputs that ``bound`` holds for; None without a bound.
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
    """

    counts: dict[str, int]
    left_alone: dict[str, int]
    activations: tuple[Site, ...]
    notes: tuple[str, ...] = ()


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
    sites = [*_sites(graph), *_inner_sites(graph)]
    quantised = first_quantized(model) is not None
    return Survey(
        counts=_count(site for site in sites if site.left_alone is None),
        left_alone=_count(site for site in sites if site.left_alone is not None),
        activations=tuple(sites),
        notes=(_QUANTISED,) if quantised else (),
    )


def surveyed_graph(model: onnx.ModelProto) -> gs.Graph:
    """The graph that is looked at: functions unfolded, constants computed, quantisers looked through, types known."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    if any(function.domain != ops.DOMAIN for function in source.functions):
        source = inline_functions(source)
    graph = import_graph(source)
    annotate(graph, source)
    fold_constants(graph)
    see_through_quantisers(graph)
    graph.cleanup(remove_unused_graph_inputs=False).toposort()
    return graph


def _sites(graph: gs.Graph) -> Iterator[Site]:
    """The activations of the main graph, in its order."""
    functions, around = Functions(graph), Surroundings(graph)
    certified = collapse_relu(graph.copy()).notes
    places = {id(node): index for index, node in enumerate(graph.nodes)}
    found = [(places[id(span.nodes[-1])], _site(span, around, certified)) for span in find_spans(functions)]
    covered = {id(cut.node) for cut in functions.forest.cuts.values() if cut.parent is not None}
    for node in graph.nodes:
        fused = None if id(node) in covered else fused_activation(node)
        if fused:
            found.append((places[id(node)], _fused_site(node, fused, around)))
    return (site for _, site in sorted(found, key=lambda item: item[0]) if site is not None)


def _site(span: Span, around: Surroundings, certified: dict[str, str]) -> Site | None:
    """What is said of one function; None where it is no activation."""
    source, result, kind = span.top.tensor, span.bottom.tensor, _kind(span)
    try:
        native = any(node.op in _NATIVE for node in span.nodes)
        left_alone = why_left_alone(around, kind, source, result, native=native)
    except NoActivationError:
        return None
    name = span.nodes[-1].name
    becomes = _becomes(kind, span, name in certified)
    layer = around.layer_before(source, direct=False)
    return Site(
        name=name,
        kind=kind,
        detail=span.label.detail,
        spelling="-".join(node.op for node in span.nodes),
        nodes=tuple(node.name for node in span.nodes),
        input=source.name,
        output=result.name,
        after=None if layer is None else Layer(layer.name, layer.op),
        becomes=becomes if left_alone is None else "nothing",
        bound=0.0 if name in certified or becomes == "Relu" else None,
        domain=certified.get(name),
        left_alone=left_alone,
        channels=span.channels,
    )


def _kind(span: Span) -> str:
    """The kind, where a node says more than its function: a PWLU may have any shape."""
    learned = any(node.domain == ops.DOMAIN and node.op == ops.PWLU for node in span.nodes)
    return "pwlu" if learned and span.label.kind in ("piecewise_linear", "mixed") else span.label.kind


def _becomes(kind: str, span: Span, certified: bool) -> str:
    if certified or (kind == "relu" and len(span.nodes) == 1 and span.nodes[0].op == "Relu"):
        return "Relu"
    if kind in ("leaky_relu", "prelu"):
        return "PRelu"
    if kind in ("relu6", "clipped_relu", "clip", "hard_sigmoid"):
        return "Clip"
    if kind in ("pwlu", "piecewise_linear"):
        return "table"
    return "nothing" if span.program is None or kind in ("relu", "mixed") else "needs training"


def _fused_site(node: gs.Node, fused: Fused, around: Surroundings) -> Site | None:
    """What is said of an activation inside another node."""
    source, result = node.inputs[0], node.outputs[0]
    kind = fused.label.kind
    try:
        left_alone = fused.left_alone or why_left_alone(around, kind, source, result)
    except NoActivationError:
        return None
    layer = node if fused.in_layer else around.layer_before(source, direct=False)
    smooth = not fused.label.exact
    return Site(
        name=node.name, kind=kind, detail=fused.label.detail, spelling=node.op, nodes=(node.name,), input=source.name,
        output=result.name, after=None if layer is None else Layer(layer.name, layer.op),
        becomes="nothing" if left_alone or not smooth else "needs training", bound=None, domain=None,
        left_alone=left_alone, channels=1,
    )  # fmt: skip


def _inner_sites(graph: gs.Graph) -> Iterator[Site]:
    """The activations inside If, Loop and Scan: no pass enters those, so they stay."""
    for node in graph.nodes:
        for inner in _graphs_of(node):
            for site in (*_sites(inner), *_inner_sites(inner)):
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
