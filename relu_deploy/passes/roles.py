"""Whether a function is an activation of the body of a network, or a gate, a head or mere arithmetic, which stay."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from relu_deploy.passes.classify import is_arithmetic
from relu_deploy.passes.surroundings import Surroundings, path_between, pools_near

# Their results stay between two bounds: they open gates and give scores.
BOUNDED = frozenset({"sigmoid", "hard_sigmoid", "tanh", "softsign", "erf", "atan"})
# Of these, what multiplies anything is a gate; the others may be activations that a mask multiplies.
_GATES = frozenset({"sigmoid", "hard_sigmoid"})
# Functions that end a network to bring results into range, besides the bounded ones.
_HEADS = BOUNDED | {"softplus", "log_sigmoid", "clip", "clipped_relu", "unknown", "mixed"}
# Names that arithmetic between layers may have too: only right after a linear layer they are activations.
_DOUBTFUL = frozenset({"unknown", "abs", "mixed", "clip", "clipped_relu", "piecewise_linear", "relu", "erf", "atan"})
HEAD = "head: no linear layer follows"
SQUEEZE_EXCITE = "squeeze-excite gate"
SELF_GATE = "gate of a tensor that it was computed from"
GLU = "GLU gate: multiplies another branch"
ATTENTION = "attention weights"
SOFTMAX = "softmax: no function of one number"
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
    if is_arithmetic(kind) or around.is_fixed(result) or around.is_unread(result):
        raise NoActivationError
    if kind in _DOUBTFUL and not native and around.has_layers and around.layer_before(source, direct=True) is None:
        raise NoActivationError
    if kind == "relu":
        return None  # wherever it is, it is what the others should become
    if kind == "softmax":
        return _of_softmax(around, result)
    gate = _gate(around, kind, source, result)
    if gate == GLU and kind in _HEADS and around.has_layers and not around.layer_follows(result):
        return HEAD  # the product of two scores is a score
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
    reasons = []
    for _, factor in around.products(result):
        if path_between(factor, result) is not None:
            return None  # the other factor was computed from it: that one is the gate
        if kind in _GATES or not around.is_mask(factor, source):
            reasons.append(_gate_on(around, kind, source, factor))
    return reasons[0] if reasons and all(reasons) else None


def _gate_on(around: Surroundings, kind: str, source: gs.Tensor, factor: gs.Tensor) -> str | None:
    """The same for one product; None where the other factor is the gate."""
    path = path_between(source, factor)
    if path == "pooled" or (kind in BOUNDED and path is None and pools_near(source)):
        return SQUEEZE_EXCITE
    if path == "direct":
        return SELF_GATE
    return GLU if kind in BOUNDED or not around.opens_gates(factor) else None
