"""Activations that cannot be read off elementwise standard operators: fused into a layer, or operators of their own.

They are named by the definition of the operator: those that ONNX Runtime's optimiser writes, recurrent layers, Softmax,
a PRelu whose slopes differ in more than the channel, and a PWLU whose parameters are computed.
"""

from __future__ import annotations

import dataclasses

import onnx_graphsurgeon as gs

from relu_deploy.ops import is_pwlu
from relu_deploy.passes.classify import Activation
from relu_deploy.passes.region import constant_values

_MICROSOFT = "com.microsoft"
_NAMES = {
    "Relu": "relu",
    "LeakyRelu": "leaky_relu",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
    "HardSigmoid": "hard_sigmoid",
}
_OPERATORS = {
    "Gelu": Activation("gelu_erf", "GELU (erf)", exact=False),
    "BiasGelu": Activation("gelu_erf", "GELU (erf) after a bias", exact=False),
    "FastGelu": Activation("gelu_tanh", "GELU (tanh)", exact=False),
}
RECURRENT = "recurrent: its sigmoids and tanhs are inside the operator"
_RECURRENT = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn", "DynamicQuantizeLSTM": "lstm"}


@dataclasses.dataclass(frozen=True)
class Fused:
    """An activation that one node hides.

    Attributes:
        label: What it is.
        left_alone: Why it stays, where its place need not be looked at; None where it has to be.
        in_layer: Whether the node is the linear layer too.
    """

    label: Activation
    left_alone: str | None = None
    in_layer: bool = False


def fused_activation(node: gs.Node) -> Fused | None:
    """The activation in a node that no region holds; None for most nodes."""
    standard = node.domain in (None, "", "ai.onnx")
    if node.op in _RECURRENT:
        return Fused(Activation(_RECURRENT[node.op], node.op, exact=False), RECURRENT)
    if node.op in ("Softmax", "LogSoftmax", "Hardmax", "QLinearSoftmax"):
        return Fused(Activation("softmax", node.op, exact=False))
    if standard and node.op == "PRelu":
        live = len(node.inputs) > 1 and constant_values(node.inputs[1]) is None
        why = "its slopes are computed at run time" if live else None
        return Fused(Activation("prelu", "PReLU with slopes of more than one axis", exact=True), why)
    if is_pwlu(node):  # with constants a region holds it
        return Fused(Activation("pwlu", "a PWLU", exact=True), "its parameters are computed at run time")
    return _of_microsoft(node) if node.domain == _MICROSOFT else None


def _of_microsoft(node: gs.Node) -> Fused | None:
    """What ONNX Runtime's optimiser writes."""
    if node.op == "QuickGelu":
        beta = float(node.attrs.get("alpha", 1.702))
        kinds = {1.0: ("silu", "SiLU"), 1.702: ("gelu_sigmoid", "GELU (sigmoid, 1.702)")}
        return Fused(Activation(*kinds.get(round(beta, 6), ("swish", f"Swish with beta {beta:.4g}")), exact=False))
    name = node.attrs.get("activation")
    if isinstance(name, str) and node.op in ("FusedConv", "NhwcFusedConv", "FusedGemm") and name:
        return Fused(Activation(*_attribute(name, node), exact=True), in_layer=True)
    return Fused(_OPERATORS[node.op]) if node.op in _OPERATORS else None


def _attribute(name: str, node: gs.Node) -> tuple[str, str]:
    """Kind and detail of an activation in an attribute."""
    if name == "Clip":
        low, high = (*node.attrs.get("activation_params", ()), 0.0, 0.0)[:2]
        kind = "relu6" if (low, high) == (0.0, 6.0) else "clipped_relu" if low == 0 else "clip"
        return kind, f"Clip [{low:.6g}, {high:.6g}] fused into the layer"
    return _NAMES.get(name, "unknown"), f"{name} fused into the layer"
