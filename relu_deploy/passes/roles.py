"""Whether a function is an activation of the body of a network, or a gate, a head or mere arithmetic, which stay."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from relu_deploy.passes.classify import is_arithmetic
from relu_deploy.passes.surroundings import Surroundings, path_between, pools_near

# Their results stay between two bounds: they open gates and give scores.
BOUNDED = frozenset({"sigmoid", "hard_sigmoid", "tanh", "softsign", "erf", "atan"})
# Functions that end a network to bring results into range, besides the bounded ones.
_HEADS = BOUNDED | {"softplus", "log_sigmoid", "clip", "clipped_relu", "unknown", "mixed"}
# Names that arithmetic between layers may have too: only right after a linear layer they are activations.
_DOUBTFUL = frozenset({"unknown", "mixed", "clip", "clipped_relu", "piecewise_linear", "relu", "erf", "atan"})
HEAD = "head: no linear layer follows, so it gives the outputs their range"
SQUEEZE_EXCITE = "squeeze-excite gate: it scales the channels that it was pooled from"
SELF_GATE = "gate: it multiplies a tensor that it was computed from"
GLU = "GLU gate: it multiplies another branch"
ATTENTION = "attention: its result weighs another tensor in a matrix product"
SOFTMAX = "softmax: it sets numbers against each other, so it is no function of one"
NO_LAYER = "no linear layer before it"


class NoActivationError(Exception):
    """A function is arithmetic of normalisations, positions or boxes, and not worth a line."""


def why_left_alone(
    around: Surroundings, kind: str, source: gs.Tensor, result: gs.Tensor, *, native: bool = False
) -> str | None:
    """Why an activation is none of those that a ReLU would replace; None where it is one.

    Args:
        around: The graph.
        kind: Name of the function, such as ``silu``.
        source: Its input.
        result: Its output.
        native: Whether it is an operator of its own, so that nobody means arithmetic by it.

    Raises:
        NoActivationError: it is no activation at all.
    """
    if is_arithmetic(kind):
        raise NoActivationError
    if kind in _DOUBTFUL and not native and around.has_layers and around.layer_before(source, direct=True) is None:
        raise NoActivationError
    if kind == "relu":
        return None  # wherever it is, it is what the others should become
    if kind == "softmax":
        return _of_softmax(around, result)
    gate = _gate(around, kind, source, result)
    if gate:
        return gate
    if kind in BOUNDED and around.attends(result):
        return ATTENTION
    if kind in _HEADS and around.has_layers:
        if around.layer_before(source, direct=False) is None:
            return NO_LAYER
        if not around.layer_follows(result):
            return HEAD
    return None


def _of_softmax(around: Surroundings, result: gs.Tensor) -> str:
    if around.attends(result):
        return ATTENTION
    return SOFTMAX if around.layer_follows(result) else HEAD


def _gate(around: Surroundings, kind: str, source: gs.Tensor, result: gs.Tensor) -> str | None:
    """What kind of gate a function opens; None for one that is multiplied by a gate or a mask, or not at all."""
    reasons = [_gate_on(around, kind, source, result, factor) for _, factor in around.products(result)]
    return reasons[0] if reasons and all(reasons) else None


def _gate_on(around: Surroundings, kind: str, source: gs.Tensor, result: gs.Tensor, factor: gs.Tensor) -> str | None:
    bounded = kind in BOUNDED
    if path_between(factor, result) is not None or around.is_mask(factor, source):
        return None
    path = path_between(source, factor)
    if path == "pooled" or (bounded and path is None and pools_near(source)):
        return SQUEEZE_EXCITE
    if path == "direct":
        return SELF_GATE
    if not bounded and around.opens_gates(factor):
        return None
    return GLU
