"""Padding of convolutions and pools, with ``auto_pad`` worked out."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_graphsurgeon as gs

from relu_deploy.passes.edit import RefusedError, dims


def spatial_rank(node: gs.Node) -> int:
    """How many axes a window of Conv or a pool has.

    Raises:
        RefusedError: neither its kernel nor its weight tells.
    """
    if "kernel_shape" in node.attrs:
        return len(node.attrs["kernel_shape"])
    shape = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None:
        raise RefusedError("the rank of the layer behind it is not known")
    return len(shape) - 2


def window(node: gs.Node, name: str) -> list[int]:
    """Strides or dilations of a Conv or a pool: ones where they are left out."""
    return [int(size) for size in node.attrs.get(name, [1] * spatial_rank(node))]


def kernel(node: gs.Node) -> list[int]:
    """Extents of the window of a Conv or a pool, dilation not counted.

    Raises:
        RefusedError: neither its attribute nor the shape of its weight tells.
    """
    if "kernel_shape" in node.attrs:
        return [int(size) for size in node.attrs["kernel_shape"]]
    shape = dims(node.inputs[1]) if len(node.inputs) > 1 else None
    if shape is None or any(size is None for size in shape[2:]):
        raise RefusedError("the kernel of the layer behind it is not known")
    return [int(size) for size in shape[2:] if size is not None]


def explicit_pads(node: gs.Node) -> tuple[list[int], list[int]]:
    """Entries that a Conv or a pool adds before and after each spatial axis.

    Raises:
        RefusedError: ``auto_pad`` makes them depend on a size that is not known.

    Source: the operators' specification: SAME gives ``ceil(size / stride)`` positions, the odd entry at the end for
    SAME_UPPER and at the start for SAME_LOWER.
    """
    rank, auto = spatial_rank(node), str(node.attrs.get("auto_pad", "NOTSET"))
    if auto == "VALID":
        return [0] * rank, [0] * rank
    if not auto.startswith("SAME"):
        pads = [int(size) for size in node.attrs.get("pads", [0] * 2 * rank)]
        return pads[:rank], pads[rank:]
    total = _same_totals(node, dims(node.inputs[0]))
    less, more = [size // 2 for size in total], [size - size // 2 for size in total]
    return (less, more) if auto == "SAME_UPPER" else (more, less)


def _same_totals(node: gs.Node, shape: Sequence[int | None] | None) -> list[int]:
    """Entries that SAME adds along each axis, both sides together."""
    steps, spread, extents = window(node, "strides"), window(node, "dilations"), kernel(node)
    totals = []
    for axis, (stride, dilation, size) in enumerate(zip(steps, spread, extents, strict=True)):
        covered = dilation * (size - 1) + 1
        length = shape[axis + 2] if shape is not None and len(shape) == len(extents) + 2 else None
        if stride == 1:
            totals.append(covered - 1)
        elif length is None:
            raise RefusedError(
                "the padding that auto_pad gives the layer behind it depends on a size not known beforehand"
            )
        else:
            totals.append(max((-(-length // stride) - 1) * stride + covered - length, 0))
    return totals
