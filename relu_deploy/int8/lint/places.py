"""Rules about where Q/DQ stand: what makes a layer run in float, or costs kernels, bytes or accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto

from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import LinearLayer, Network, Quantizer, attribute, carried
from relu_deploy.int8.lint.pairs import lowest
from relu_deploy.targets import Target

# What they make is no larger than what they are given, or has a known bound: --fix can quantise behind them.
BOUNDED = (
    "Relu", "Clip", "AveragePool", "GlobalAveragePool", "Resize", "Concat", "Sigmoid", "Softmax", "HardSigmoid",
    "MaxPool",
)  # fmt: skip
_CLIPPING = ("Relu", "Clip")


def half_quantized(net: Network, target: Target) -> Iterator[Finding]:
    """``half-quantized``: a layer with Q/DQ in front of one operand only, or with an operator behind its Q/DQ.

    Codes pass through what moves values; through what computes with them they do not, and the layer is float.
    """
    for layer in net.layers:
        if _is_int8(layer) or (layer.data is None and layer.weight is None) or layer.node.op_type == "ConvTranspose":
            continue
        if layer.weight is None:
            # ONNX Runtime quantises stored weights by itself; a product of two computed tensors has none.
            if target == "ort" or not net.is_constant(layer.node.input[1]):
                continue
            missing = "its weights have no Q/DQ"
        elif net.codes_reach(layer.node.input[0], carried(target), rtx=target != "ort"):
            continue
        elif target == "ort" and layer.node.op_type == "MatMul":
            continue  # weights only: packed, as users of this form want them
        else:
            missing = "its input has no Q/DQ directly in front"
        behind = net.maker(layer.node.input[0]) if layer.data is None else None
        between = f" ({behind.op_type} {behind.name} stands between)" if behind is not None else ""
        yield Finding(
            "half-quantized", layer.node.name, "float",
            _told(target, f"{layer.node.op_type} runs in float: {missing}{between}"),
            "Q/DQ directly in front of both operands",
            automatic=behind is not None and behind.op_type in BOUNDED and net.dequantizer(behind.input[0]) is not None,
        )  # fmt: skip


def transposed(net: Network, target: Target) -> Iterator[Finding]:
    """``conv-transpose``: Q/DQ in front of a ConvTranspose, which TensorRT-RTX computes in float all the same."""
    if target != "tensorrt-rtx":
        return
    for layer in net.layers:
        if layer.node.op_type == "ConvTranspose" and (layer.data is not None or layer.weight is not None):
            yield Finding(
                "conv-transpose", layer.node.name, "float",
                "computed in float all the same, on rounded values, and with a kernel more",
                "no Q/DQ on a ConvTranspose", automatic=True,
            )  # fmt: skip


def float_layer(net: Network, target: Target) -> Iterator[Finding]:
    """``float-layer``: a layer without Q/DQ in a network that has some (a head, a first or last layer).

    Not one that no target multiplies in integers: products of two computed tensors, ConvTranspose; nor a convolution in
    float16 that would move more bytes in INT8.
    """
    if not any(layer.data is not None and layer.weight is not None for layer in net.layers):
        return
    for layer in net.layers:
        if layer.data is not None or layer.weight is not None or not net.is_constant(layer.node.input[1]):
            continue
        if layer.node.op_type == "ConvTranspose" or (target == "ort" and attribute(layer.node, "transA", 0)):
            continue
        half = net.code_type(layer.node.input[1]) in (TensorProto.FLOAT16, TensorProto.BFLOAT16)
        if half and (target == "ort" or not _saves_bytes(net, layer)):
            continue
        yield Finding(
            "float-layer", layer.node.name, "slower",
            f"{layer.node.op_type} runs in {'float16' if half else 'float32'}, as the file says",
            "quantise it" if half or target == "ort" else "quantise it, or give the float part of the network float16",
        )  # fmt: skip


def _saves_bytes(net: Network, layer: LinearLayer) -> bool:
    """Whether INT8 is known to move fewer bytes than float16: see :mod:`relu_deploy.int8.cheaper`."""
    weight, data = net.dims(layer.node.input[1]), net.dims(layer.node.input[0])
    if layer.node.op_type != "Conv":
        return True
    if weight is None or data is None or any(extent < 0 for extent in data[1:]):
        return False
    return math.prod(weight) > 2 * math.prod(data[1:])


def activation_between(net: Network, target: Target) -> Iterator[Finding]:
    """``before-relu``: Q/DQ between a layer and its ReLU."""
    for q, relu, automatic in drops_before_relu(net):
        layer = next(found for found in net.layers if found.node.output[0] == q.source)
        one_scale = layer.weight is not None and not layer.weight.per_channel
        costs = "half of the codes are spent on values that the ReLU drops"
        if target == "ort":
            costs += "; the ReLU is computed in float"
        elif one_scale:
            costs += "; " + like_rtx(target, "and the ReLU is not fused into the layer")
        yield Finding(
            "before-relu", q.node.name, "slower" if target == "ort" or one_scale else "less accurate", costs,
            f"Q/DQ behind {relu.op_type} {relu.name} only", automatic=automatic,
        )  # fmt: skip


def drops_before_relu(net: Network) -> Iterator[tuple[Quantizer, onnx.NodeProto, bool]]:
    """Quantisers between a layer and its ReLU; the ReLU; and whether they may go, because there is one behind it."""
    layers = {layer.node.output[0] for layer in net.layers}
    for q in net.quantizers:
        if q.source not in layers:
            continue
        readers = [reader for name in _dequantized(net, q) for reader in net.readers(name)]
        relus = [reader for reader in readers if reader.op_type in _CLIPPING]
        if not relus or len(relus) < len(readers):
            continue
        behind = [reader.op_type for relu in relus for reader in net.readers(relu.output[0])]
        alone = not net.outputs & {*_dequantized(net, q), q.output}
        yield q, relus[0], alone and bool(behind) and set(behind) == {"QuantizeLinear"}


def residual(net: Network, target: Target) -> Iterator[Finding]:
    """``residual``: a sum with a shortcut whose operands are not read as codes."""
    for node in net.nodes:
        if node.op_type != "Add" or len(node.input) != 2 or any(map(net.is_constant, node.input)):
            continue
        found = _half_sum(net, node) if target == "ort" else _float_operand(net, node, target)
        if found is not None:
            yield found


def _half_sum(net: Network, node: onnx.NodeProto) -> Finding | None:
    """For ``ort``: a sum whose result is quantised, and of whose operands only one is."""
    given = [net.dequantizer(name) for name in node.input]
    if given.count(None) != 1 or [reader.op_type for reader in net.readers(node.output[0])] != ["QuantizeLinear"]:
        return None
    return Finding(
        "residual", node.name, "slower", "the sum is computed in float: only one of its operands has Q/DQ",
        "Q/DQ on both operands",
    )  # fmt: skip


def _float_operand(net: Network, node: onnx.NodeProto, target: Target) -> Finding | None:
    """For TensorRT: beside an int8 convolution, the shortcut; with one weight scale a layer, both operands."""
    if (found := net.fused_layer(node)) is None:
        return None
    main, layer = found
    shortcut = node.input[1 - main]
    if net.dequantizer(shortcut) is None:
        codes = any(reader.op_type == "QuantizeLinear" for reader in net.readers(shortcut))
        return Finding(
            "residual", node.name, "slower", like_rtx(target, f"the shortcut {shortcut} is moved in float"),
            "Q/DQ on the shortcut", automatic=codes,
        )  # fmt: skip
    if layer.weight is None or layer.weight.per_channel:
        return None
    return Finding(
        "residual", node.name, "slower",
        like_rtx(target, "with one weight scale the sum is fused into the convolution, and the shortcut dequantised "
        "in a kernel of its own"), "Q/DQ on both operands",
    )  # fmt: skip


def pad(net: Network, target: Target) -> Iterator[Finding]:
    """``pad``: Q/DQ on both sides of a Pad. TensorRT-RTX carries codes through a Pad, wherever Q/DQ stand."""
    if target != "ort":
        return
    for node in net.nodes:
        if (
            node.op_type == "Pad"
            and net.dequantizer(node.input[0]) is not None
            and any(reader.op_type == "QuantizeLinear" for reader in net.readers(node.output[0]))
        ):
            yield Finding(
                "pad", node.name, "slower", "the Pad is computed in float between its quantisers",
                "Q/DQ on one side of it, or padding in the convolution",
            )  # fmt: skip


def inside_softmax(net: Network, target: Target) -> Iterator[Finding]:
    """``softmax``: Q/DQ in front of a Softmax."""
    if target == "ort":
        return
    for node in net.nodes:
        if node.op_type in ("Softmax", "LogSoftmax") and net.dequantizer(node.input[0]) is not None:
            yield Finding(
                "softmax", node.name, "less accurate",
                like_rtx(target, "computed in float, on values rounded to 8 bits for nothing"),
                "no Q/DQ in front of a Softmax", automatic=True,
            )  # fmt: skip


def inside_norm(net: Network, target: Target) -> Iterator[Finding]:
    """``layer-norm``: Q/DQ in front of a normalisation, or inside one that is spelled out."""
    if target == "ort":
        return
    for node in net.nodes:
        first = node.input[0] if node.input else ""
        if net.dequantizer(first) is None or not (node.op_type == "LayerNormalization" or squares_deviation(net, node)):
            continue
        yield Finding(
            "layer-norm", node.name, "less accurate",
            like_rtx(target, "computed in float, on values rounded to 8 bits for nothing"),
            "no Q/DQ in front of or inside a normalisation", automatic=True,
        )  # fmt: skip


def squares_deviation(net: Network, node: onnx.NodeProto) -> bool:
    """Whether a node is the square in mean((x - mean(x))^2)."""
    if node.op_type not in ("Pow", "Mul") or not any(r.op_type == "ReduceMean" for r in net.readers(node.output[0])):
        return False
    deviation = net.real_maker(node.input[0])
    if deviation is None or deviation.op_type != "Sub":
        return False
    mean = net.real_maker(deviation.input[1])
    return mean is not None and mean.op_type == "ReduceMean"


def unfused(net: Network, target: Target) -> Iterator[Finding]:
    """``unfused``: for ``ort``, an integer convolution wants one quantiser behind it, and nothing else.

    Behind a ReLU or Clip the quantiser has to clip as they do: its lowest code is 0.0. A product may give floats, but
    not to a ReLU or Clip that anything but such a quantiser alone reads.
    """
    if target != "ort":
        return
    for layer in net.layers:
        convolution = layer.node.op_type == "Conv"
        if not _is_int8(layer) or layer.node.op_type == "ConvTranspose":
            continue
        reason = _why_unfused(net, layer) if convolution else _why_hidden(net, layer)
        if reason:
            what = "convolution" if convolution else "product"
            yield Finding(
                "unfused", layer.node.name, "float", f"the {what} runs in float: {reason}",
                "one quantiser behind it, or behind its ReLU with a lowest code of 0.0"
                + ("" if convolution else "; or Max(x, 0) for the ReLU"),
            )  # fmt: skip


def float_bias(net: Network, target: Target) -> Iterator[Finding]:
    """``float-bias``: for ``ort``, a Gemm with quantised operands and a bias in float (a Conv may have one)."""
    if target != "ort":
        return
    for layer in net.layers:
        bias = layer.node.input[2] if len(layer.node.input) > 2 else ""
        if layer.node.op_type == "Gemm" and _is_int8(layer) and bias and layer.bias is None:
            yield Finding(
                "float-bias", layer.node.name, "float", "the Gemm runs in float, because its bias is",
                "the bias in int32, with scale s_x s_w", automatic=net.is_constant(bias),
            )  # fmt: skip


def half_on_cpu(net: Network, target: Target) -> Iterator[Finding]:
    """``float16``: for ``ort``, Q/DQ in float16: the integer kernels give float32."""
    if target != "ort":
        return
    for layer in net.layers:
        scale = layer.data.scale if layer.data is not None and layer.weight is not None else None
        if scale is not None and scale.dtype == np.float16:
            yield Finding(
                "float16", layer.node.name, "float", "runs in float: the integer kernels give float32, not float16",
                "quantise the float32 network",
            )  # fmt: skip


def _why_unfused(net: Network, layer: LinearLayer) -> str:
    """What stands between a convolution and the one quantiser behind it; empty where nothing does."""
    output, readers = layer.node.output[0], net.readers(layer.node.output[0])
    if output in net.outputs:
        return "its output leaves the network in float"
    clipping = None
    if len(readers) == 1 and readers[0].op_type in _CLIPPING:
        clipping = readers[0]
        output, readers = clipping.output[0], net.readers(clipping.output[0])
        if output in net.outputs:
            return f"the output of its {clipping.op_type} leaves the network in float"
    kinds = sorted({reader.op_type for reader in readers})
    if kinds != ["QuantizeLinear"] or len(readers) > 1:
        return f"its output is read by {', '.join(kinds) or 'nothing'}, not by one quantiser alone"
    quantizer = net.quantizer(readers[0].output[0])
    return "" if clipping is None or quantizer is None else _why_kept(net, clipping, quantizer)


def _why_hidden(net: Network, layer: LinearLayer) -> str:
    """What keeps ONNX Runtime from seeing that a product may give floats; empty where nothing does."""
    readers = net.readers(layer.node.output[0])
    if len(readers) != 1 or readers[0].op_type not in _CLIPPING or layer.node.output[0] in net.outputs:
        return ""
    clipping, behind = readers[0], net.readers(readers[0].output[0])
    times = sum(list(reader.input).count(clipping.output[0]) for reader in behind)  # Add(r, r) reads it twice
    if clipping.output[0] in net.outputs or times != 1:
        return ""
    if behind[0].op_type != "QuantizeLinear":
        return f"its {clipping.op_type} is read by {behind[0].op_type}, not by a quantiser"
    quantizer = net.quantizer(behind[0].output[0])
    return "" if quantizer is None else _why_kept(net, clipping, quantizer)


def _why_kept(net: Network, clipping: onnx.NodeProto, quantizer: Quantizer) -> str:
    """Why a quantiser does not clip all that a ReLU or Clip in front of it does; empty where it does."""
    low, high = (0.0, math.inf) if clipping.op_type == "Relu" else _clip_bounds(net, clipping)
    if math.isnan(low) or math.isnan(high):
        return f"the bounds of its {clipping.op_type} are computed at run time"
    # ONNX Runtime compares codes: a bound that rounds to the last of them clips nothing.
    half = 0.0 if quantizer.scale is None or not quantizer.scale.size else float(quantizer.scale.reshape(-1)[0]) / 2
    if lowest(quantizer) < low - half:
        return f"the quantiser behind its {clipping.op_type} has codes below {low:g}"
    if lowest(quantizer, top=True) > high + half:
        return f"the quantiser behind its {clipping.op_type} has codes above {high:g}"
    return ""


def _clip_bounds(net: Network, clip: onnx.NodeProto) -> tuple[float, float]:
    """The bounds of a Clip; NaN where one is computed."""
    found = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        operand = clip.input[index] if len(clip.input) > index else ""
        value = net.constant(operand) if operand else np.asarray(attribute(clip, name, default))
        found.append(math.nan if value is None or value.size != 1 else float(value.reshape(-1)[0]))
    return found[0], found[1]


def _dequantized(net: Network, q: Quantizer) -> list[str]:
    """The tensors that the codes of a quantiser are read back to."""
    return [dq.output for dq in net.dequantizers if dq.source == q.output]


def _is_int8(layer: LinearLayer) -> bool:
    return layer.data is not None and layer.weight is not None


def _told(target: Target, text: str) -> str:
    return text if target == "ort" else like_rtx(target, text)
