"""Rules about which axis scales lie along, and how many there are."""

from __future__ import annotations

from collections.abc import Iterator

from relu_deploy.int8.lint.finding import Finding, like_rtx
from relu_deploy.int8.lint.network import LinearLayer, Network, Quantizer, channel_axis
from relu_deploy.targets import Target


def channel_activation(net: Network, target: Target) -> Iterator[Finding]:
    """``channel-activation``: an activation with a scale for each channel, or with one scale in a list.

    A list of one is a scale for each channel to TensorRT-RTX, too; ONNX Runtime takes it for what it is.
    """
    for q in net.quantizers:
        if q.scale is None or q.scale.ndim == 0 or q.block or net.is_constant(q.source):
            continue
        if target == "ort" and q.scale.size == 1:
            continue
        what = "a list of one scale" if q.scale.size == 1 else f"{q.scale.size} scales"
        done = "what reads it runs in float"
        yield Finding(
            "channel-activation", q.node.name, "float",
            f"{what} for an activation: {done if target == 'ort' else like_rtx(target, done)}",
            "one scale without axes, the largest of them", automatic=True,
        )  # fmt: skip


def weight_axis(net: Network, target: Target) -> Iterator[Finding]:
    """``weight-axis``: weight scales that do not lie along the output channels.

    ``axis`` has a default of 1, which is right for a Gemm without ``transB`` and a ConvTranspose, and for no Conv.
    """
    for layer, weight, dims in _weights(net):
        if not weight.per_channel or not -len(dims) <= weight.axis < len(dims):
            continue
        wanted, found = channel_axis(layer, len(dims)), weight.axis % len(dims)
        op = layer.node.op_type
        if found == wanted or (op == "ConvTranspose" and target != "tensorrt"):
            continue  # computed in float in any case
        mendable = op != "ConvTranspose"
        if target == "ort":
            yield Finding(
                "weight-axis", weight.node.name, "wrong",
                f"the integer {op} takes the scales for those of axis {wanted}, or refuses them when it runs",
                f"scales along axis {wanted}", automatic=mendable,
            )  # fmt: skip
        else:
            yield Finding(
                "weight-axis", weight.node.name, "float",
                like_rtx(target, f"{op} {layer.node.name} runs in float: its scales lie along axis {found}"),
                f"scales along axis {wanted}", automatic=mendable,
            )  # fmt: skip


def axis_range(net: Network, target: Target) -> Iterator[Finding]:
    """``axis-range``: an axis that the tensor does not have."""
    for q in (*net.quantizers, *net.dequantizers):
        dims = net.dims(q.source)
        if dims is not None and (q.per_channel or q.block) and not -len(dims) <= q.axis < len(dims):
            yield Finding(
                "axis-range", q.node.name, "rejected",
                f"axis {q.axis} of a tensor of {len(dims)} axes: " + _refused(target), "an axis that is there",
                automatic=_could_be_channels(net, q, dims),
            )  # fmt: skip


def scale_length(net: Network, target: Target) -> Iterator[Finding]:
    """``scale-length``: as many scales as there are channels, and as many zero points as scales."""
    for q in (*net.quantizers, *net.dequantizers):
        dims = net.dims(q.source)
        if q.scale is not None and not q.block and (q.scale.ndim > 1 or not q.scale.size):
            yield Finding(
                "scale-length", q.node.name, "rejected", f"scales of shape {list(q.scale.shape)}: " + _refused(target),
                "one scale for each channel, in a list",
            )  # fmt: skip
        if not q.per_channel or q.block or q.scale is None:
            continue
        size = q.scale.size
        if dims is not None and -len(dims) <= q.axis < len(dims) and dims[q.axis] not in (size, -1):
            yield Finding(
                "scale-length", q.node.name, "rejected",
                f"{size} scales for {dims[q.axis]} channels on axis {q.axis}: " + _refused(target),
                "one scale for each channel", automatic=_could_be_channels(net, q, dims),
            )  # fmt: skip
        elif q.zero_point is not None and q.zero_point.size != size:
            yield Finding(
                "scale-length", q.node.name, "rejected",
                f"{q.zero_point.size} zero points for {size} scales: " + _refused(target), "as many of both",
                automatic=q.zero_point.size == 1,
            )  # fmt: skip


def blocked(net: Network, target: Target) -> Iterator[Finding]:
    """``blocked``: scales for blocks within a channel."""
    for layer, weight, _ in _weights(net):
        if not weight.block:
            continue
        op, name = layer.node.op_type, layer.node.name
        if target == "ort" and layer.data is not None:
            yield Finding(
                "blocked", weight.node.name, "rejected", f"the integer kernel of {op} {name} fails when it runs",
                "a scale for each output channel",
            )  # fmt: skip
        elif target != "ort" and op != "MatMul":
            yield Finding(
                "blocked", weight.node.name, "rejected",
                like_rtx(target, f"the parser takes blocks along the last two axes only, and {op} has none there"),
                "a scale for each output channel",
            )  # fmt: skip


def _refused(target: Target) -> str:
    if target == "ort":
        return "ONNX Runtime loads the file and fails when it runs"
    return like_rtx(target, "the parser refuses it")


def _weights(net: Network) -> Iterator[tuple[LinearLayer, Quantizer, tuple[int, ...]]]:
    """Each layer with stored, quantised weights, and their extents."""
    for layer in net.layers:
        dims = None if layer.weight is None else net.dims(layer.weight.source)
        if layer.weight is not None and dims is not None and layer.weight.scale is not None:
            yield layer, layer.weight, dims


def _could_be_channels(net: Network, q: Quantizer, dims: tuple[int, ...]) -> bool:
    """Whether the scales of a layer's stored weights are as many as its output channels."""
    layers = [layer for layer in net.layers if layer.weight is q]
    return bool(layers) and q.scale is not None and all(
        len(dims) > channel_axis(layer, len(dims)) and dims[channel_axis(layer, len(dims))] == q.scale.size
        for layer in layers
    )  # fmt: skip
