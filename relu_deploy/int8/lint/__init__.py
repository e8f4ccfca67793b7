"""What is wrong with a Q/DQ file of any tool, as one target takes it: ``lint`` names it, ``fix`` mends what can be.

docs/lint.md lists the rules. Each says what the target was seen to do, not what is believed of it.
"""

from __future__ import annotations

import onnx

from relu_deploy.graph import name_nodes
from relu_deploy.int8.lint import attention, codes, operators, pairs, places, shapes
from relu_deploy.int8.lint.finding import FAULTS, SEVERITIES, Finding, LintReport, Severity
from relu_deploy.int8.lint.network import INTEGER_LAYERS, LinearLayer, Network, carried
from relu_deploy.targets import Target

__all__ = ["FAULTS", "RULES", "SEVERITIES", "Finding", "LintReport", "Severity", "lint"]

# In the order in which they are applied and, within one severity, told.
RULES = (
    operators.versions,
    operators.validity,
    operators.integer_operators,
    operators.foreign_operators,
    codes.code_type,
    codes.int32_bias,
    codes.zero_point,
    codes.unsigned,
    codes.scalar_constant,
    codes.scale,
    codes.tiny_scale,
    codes.saturating,
    shapes.axis_range,
    shapes.scale_length,
    shapes.weight_axis,
    shapes.channel_activation,
    shapes.blocked,
    pairs.computed_scale,
    pairs.scale_types,
    pairs.scales_differ,
    pairs.twice,
    pairs.two_scales,
    pairs.small_bias,
    pairs.stored_float,
    places.half_quantized,
    attention.cut_for_attention,
    places.transposed,
    places.unfused,
    places.float_bias,
    places.half_on_cpu,
    places.activation_between,
    places.residual,
    places.pad,
    places.inside_softmax,
    places.inside_norm,
    places.float_layer,
)


def lint(model: onnx.ModelProto, target: Target) -> LintReport:
    """Apply every rule.

    Args:
        model: As parsed; it need not be valid. Unnamed nodes are named in a copy.
        target: The runtime that is to take it.
    """
    named = onnx.ModelProto()
    named.CopyFrom(model)
    name_nodes(named.graph)
    net = Network(named)
    found = [finding for rule in RULES for finding in rule(net, target)]
    integers = sum(node.op_type in INTEGER_LAYERS for node in net.nodes)
    quantized = sum(_in_codes(net, layer, target) for layer in net.layers)
    return LintReport(
        target=target,
        quantizers=len(net.quantizers) + len(net.dequantizers),
        quantized_layers=quantized + integers,
        layers=len(net.layers) + integers,
        opset=net.opset,
        ir_version=named.ir_version,
        findings=tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity))),
    )


def _in_codes(net: Network, layer: LinearLayer, target: Target) -> bool:
    """Whether both operands of a layer are dequantised; for TensorRT the weights may have been moved since."""
    data, weight = layer.node.input[:2]
    moved = target != "ort" and net.codes_reach(weight, carried(target), rtx=True)
    return (layer.weight is not None or moved) and net.codes_reach(data, carried(target), rtx=target != "ort")
