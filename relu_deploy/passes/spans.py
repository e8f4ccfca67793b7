"""Where one activation ends and the next begins: chains of functions, cut into the fewest and best-known ones.

Between two cuts of the forest nothing can be told apart, but one activation may span several: ``log(1 + exp(x))``
three, GELU with its 0.5 behind two; and several may follow each other: BatchNorm as Mul and Add, then SiLU. So every
span of a chain is named, and the cheapest cover of the chain wins.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from relu_deploy.ops import is_pwlu
from relu_deploy.passes.classify import Activation
from relu_deploy.passes.functions import AFFINE_OPS, Functions, Segment
from relu_deploy.passes.lower import UnsupportedError
from relu_deploy.passes.program import Program
from relu_deploy.passes.region import Cut, nodes_between, program_between

# Cuts that one activation may span: 1 / (1 + exp(-x)) spans four.
MAX_CUTS = 8
_STRAIGHT = ("identity", "affine", "constant")
# Price of a span: a known function is worth more than pieces, pieces more than what is not known. One that is not
# known by name costs a little more for each cut, so that scales and shifts around it stay outside.
_PRICES = {"blend": 1.5, "piecewise_linear": 3.0, "pwlu": 3.0, "aptx": 2.0, "mixed": 4.0, "unknown": 6.0}
_SCALED = 2.0
_CUT = 0.01
_LINE = Activation("affine", "affine", exact=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Span:
    """A function of one tensor.

    Attributes:
        top: Its input.
        bottom: Its output.
        label: What it is.
        program: What is computed; None where an operator has no lowering.
        nodes: The nodes that compute it, producers first.
    """

    top: Cut
    bottom: Cut
    label: Activation
    program: Program | None
    nodes: tuple[gs.Node, ...] = ()

    @property
    def channels(self) -> int:
        """Channels with constants of their own; 1 where all share them."""
        return 1 if self.program is None else max(1, self.program.constants.shape[1])


def find_spans(functions: Functions) -> list[Span]:
    """Every function of a graph that is no straight line, in the order of the graph.

    Args:
        functions: Of a sorted graph.

    Returns:
        Spans that do not overlap: known and unknown functions, and the arithmetic of normalisations too.
    """
    visited: list[Cut] = []
    ends = {id(cut) for cut in functions.forest.exits}

    def visit(cut: Cut, followers: list[Cut]) -> Cut:
        assert cut.parent is not None  # noqa: S101 - roots are not visited
        visited.append(cut)
        if len(followers) != 1 or not functions.of_floats(cut) or not functions.of_floats(followers[0]):
            ends.add(id(cut))
        return cut.parent

    functions.walk(visit)
    chains = (_chain(cut, ends) for cut in reversed(visited) if id(cut) in ends and functions.of_floats(cut))
    return [span for chain in chains for span in _cover(functions, chain)]


def _chain(bottom: Cut, ends: set[int]) -> list[Cut]:
    """Cuts down to ``bottom`` from the next end above it, which comes first."""
    chain = [bottom]
    while chain[-1].parent is not None and (len(chain) == 1 or id(chain[-1]) not in ends):
        chain.append(chain[-1].parent)
    return chain[::-1]


def _cover(functions: Functions, chain: list[Cut]) -> list[Span]:
    """The cheapest cover of a chain by spans; of two equally cheap the one with fewer."""
    best: list[tuple[float, int, tuple[Span, ...]]] = [(0.0, 0, ())]
    for end in range(1, len(chain)):
        choices = []
        for start in range(max(0, end - MAX_CUTS), end):
            span = _span(functions, chain[start : end + 1])
            if span is not None:
                cost, count, spans = best[start]
                more = spans if span.label.kind in _STRAIGHT else (*spans, span)
                choices.append((cost + _price(span.label.kind, end - start), count + 1, more))
        best.append(min(choices, key=lambda choice: (round(choice[0], 6), choice[1])))
    trimmed = (_trimmed(functions, chain, span) for span in best[-1][2])
    return [dataclasses.replace(span, nodes=_nodes(span.top, span.bottom)) for span in trimmed]


def _trimmed(functions: Functions, chain: list[Cut], span: Span) -> Span:
    """The same without straight lines at its ends that the function is known without: a bias, an Identity."""
    start, end = chain.index(span.top), chain.index(span.bottom)
    for shorter, straight in ((chain[start + 1 : end + 1], chain[start + 1]), (chain[start:end], chain[end])):
        if len(shorter) > 1 and functions.is_affine(straight):
            found = _span(functions, shorter)
            if found is not None and found.label.kind == span.label.kind:
                return _trimmed(functions, chain, found)
    return span


def _span(functions: Functions, cuts: list[Cut]) -> Span | None:
    """The span over a part of a chain; None where it is none: straight lines are taken one by one."""
    segments = [functions.segment(cut) for cut in cuts[1:]]
    top, bottom, program = cuts[0], cuts[-1], segments[0].program
    if len(segments) == 1:
        if program is None:
            moves = all(node.op in AFFINE_OPS for node in _nodes(top, bottom))
            why = Activation("unknown", segments[0].refusal, exact=False)
            return Span(top, bottom, _LINE if moves else why, None)
        straight = _is_straight(program)
        return Span(top, bottom, _LINE if straight else functions.label(program, top.tensor), program)
    if all(segment.is_affine for segment in segments) or any(segment.program is None for segment in segments):
        return None
    if _is_of_channels(segments[0]) or _is_of_channels(segments[-1]):
        return None
    if any(cut.node is not None and is_pwlu(cut.node) for cut in cuts[1:]):
        return None  # it says itself what it is; two in a row would bend at some N^2 points
    try:
        program = program_between(top, bottom, same_shape=False)
    except UnsupportedError:
        return None
    label = functions.label(dataclasses.replace(program, constants=program.constants[:, :1]), top.tensor)
    if label.kind != "unknown" and program.constants.shape[1] > 1:  # all channels are worth a look if one is known
        label = functions.label(program, top.tensor)
    return Span(top, bottom, label, program)


def _is_straight(program: Program) -> bool:
    """Whether a program is a straight line by its steps alone, in every channel."""
    live = [False] * len(program.steps)
    for number, step in enumerate(program.steps):
        live[number] = step.op == "x" or any(live[arg] for arg in step.args)
        allowed = step.op in ("x", "const", "add") or (
            (step.op == "mul" and not all(live[arg] for arg in step.args))
            or (step.op == "div" and not live[step.args[1]])
        )
        if not allowed:
            return False
    return True


def _is_of_channels(segment: Segment) -> bool:
    """Whether a segment is a bias or a scale for each channel: BatchNorm, and no part of an activation."""
    program = segment.program
    return program is not None and program.constants.shape[1] > 1 and _is_straight(program)


def _price(kind: str, cuts: int) -> float:
    if kind in _STRAIGHT:
        return 0.0
    price = _SCALED if kind.startswith("scaled_") else _PRICES.get(kind)
    return 1.0 if price is None else price + _CUT * cuts


def _nodes(top: Cut, bottom: Cut) -> tuple[gs.Node, ...]:
    """Nodes of a span; the one that makes its result where there are too many to list."""
    try:
        return tuple(nodes_between(top, bottom))
    except UnsupportedError:
        return (bottom.node,) if bottom.node is not None else ()
