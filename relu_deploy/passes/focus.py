"""Fold a rearrangement of pixels into channels, and the convolution over it, into one strided convolution.

The Focus of YOLOv5 and YOLOX reads every second pixel in four ways, concatenates, and convolves with a k x k kernel:
the same as one convolution with a 2k x 2k kernel and stride 2 over the picture. For blocks of ``b`` pixels,
``W'[o, c, b i + p] = W[o, channel of pixel p and c, i]`` along each axis; strides and padding become ``b`` times as
large. The weights are moved, not computed.

Recognised: strided Slices and a Concat, in any order and for any block; SpaceToDepth; Reshape, Transpose and Reshape
(PixelUnshuffle). The extents of the picture must be multiples of the block: where they are not known, a Concat of all
pixels of a block proves it, since its parts would otherwise differ in length.

What it gains depends on the target: TensorRT-RTX makes the same kernels of both forms, ONNX Runtime computes the one
convolution faster in float and slower in INT8. ``benchmarks/clean_up.py`` prints all of that.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.passes.dead import drop_detached
from relu_deploy.passes.edit import (
    Names,
    RefusedError,
    dims,
    float_values,
    int_values,
    is_standard,
    pinned_names,
    producer_of,
    set_input,
)
from relu_deploy.passes.windows import explicit_pads, window
from relu_deploy.report import PassReport, Skip

# An end at or past this is "up to the end" whatever the size: exporters write the largest int32 or int64.
_TO_THE_END = (1 << 31) - 1


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How the channels of a rearranged picture come about.

    Attributes:
        picture: The tensor that is rearranged, ``(N, C, ...)``.
        block: Pixels of a block along each spatial axis.
        taps: For each channel of the rearranged one, which pixel of the block and which channel of the picture.
    """

    picture: gs.Tensor
    block: tuple[int, ...]
    taps: tuple[tuple[tuple[int, ...], int], ...]


def fold_focus(graph: gs.Graph) -> PassReport:
    """Replace slices or a reshuffle of pixels in front of a Conv by a Conv of larger kernel and stride.

    Args:
        graph: Sorted topologically, sizes known where they can be; edited in place. Slices that others read stay.

    Returns:
        Changed: the Conv nodes. Skipped: rearrangements in front of a Conv that stay, with reasons.
    """
    changed: list[str] = []
    skipped: list[Skip] = []
    pinned, names = pinned_names(graph), Names(graph)
    for node in graph.nodes:
        if not is_standard(node, "Concat", "SpaceToDepth", "Reshape") or not _feeds_conv(node):
            continue
        convs = list(node.outputs[0].outputs)
        try:
            new = _folded(node, convs, pinned)
        except _NotBlocksError:
            continue
        except RefusedError as error:
            skipped.append(Skip(node.name, str(error)))
            continue
        for conv, (blocks, weight) in zip(convs, new, strict=True):
            _write(conv, blocks, weight, names)
            changed.append(conv.name)
    drop_detached(graph)
    return PassReport("fold_focus", tuple(changed), tuple(skipped))


class _NotBlocksError(Exception):
    """A Concat or Reshape of another kind."""


def _feeds_conv(node: gs.Node) -> bool:
    return bool(node.outputs) and any(is_standard(reader, "Conv") for reader in node.outputs[0].outputs)


def _folded(node: gs.Node, convs: Sequence[gs.Node], pinned: set[str]) -> list[tuple[_Blocks, np.ndarray]]:
    """New weights for every reader of a rearranged picture, or for none."""
    data = node.outputs[0]
    found = _blocks(node, _channels_of(convs, data))
    if data.name in pinned or not all(is_standard(conv, "Conv") and conv.inputs[0] is data for conv in convs):
        raise RefusedError("the rearranged picture is used elsewhere too")
    return [(found, _weight(conv, found)) for conv in convs]


def _channels_of(convs: Sequence[gs.Node], data: gs.Tensor) -> tuple[int, int]:
    """Channels that a Conv reads, and its spatial axes."""
    conv = next(conv for conv in convs if is_standard(conv, "Conv"))
    weight = float_values(conv.inputs[1])
    if conv.inputs[0] is not data or weight is None or weight.ndim < 3:
        raise _NotBlocksError
    return weight.shape[1] * int(conv.attrs.get("group", 1)), weight.ndim - 2


def _blocks(node: gs.Node, size: tuple[int, int]) -> _Blocks:
    """Recognise a rearrangement into ``size``: channels, spatial axes."""
    channels, rank = size
    if node.op == "SpaceToDepth":
        block = (int(node.attrs["blocksize"]),) * rank
        return _in_groups(node.inputs[0], block, list(itertools.product(*map(range, block))), channels)
    return _sliced(node, channels, rank) if node.op == "Concat" else _reshuffled(node, rank)


def _in_groups(picture: gs.Tensor, block: tuple[int, ...], pixels: Sequence[tuple[int, ...]], channels: int) -> _Blocks:
    """All channels of the picture for one pixel of the block, then all for the next."""
    if channels % len(pixels):
        raise _NotBlocksError
    return _Blocks(picture, block, tuple((pixel, c) for pixel in pixels for c in range(channels // len(pixels))))


def _sliced(concat: gs.Node, channels: int, rank: int) -> _Blocks:
    """Strided slices of one picture, side by side along the channels."""
    if int(concat.attrs.get("axis", 1)) % (rank + 2) != 1:
        raise _NotBlocksError
    parts = [_slices(tensor, rank) for tensor in concat.inputs]
    picture, first = parts[0]
    block = tuple(first[axis].step if axis in first else 1 for axis in range(2, rank + 2))
    if len(parts) != math.prod(block) or len(parts) < 2 or any(other is not picture for other, _ in parts):
        raise _NotBlocksError
    lengths = dims(picture) or (None,) * (rank + 2)
    pixels = [
        tuple(_offset(along.get(axis), block[axis - 2], lengths[axis]) for axis in range(2, rank + 2))
        for _, along in parts
    ]
    if sorted(pixels) != list(itertools.product(*map(range, block))):
        raise RefusedError("its slices do not take each pixel of a block once")
    return _in_groups(picture, block, pixels, channels)


def _slices(tensor: gs.Tensor, rank: int) -> tuple[gs.Tensor, dict[int, slice]]:
    """The tensor that strided Slices start from, and what they take along each axis."""
    found: dict[int, slice] = {}
    while (node := producer_of(tensor)) is not None and is_standard(node, "Slice"):
        bounds = [int_values(node, name, position) for name, position in (("starts", 1), ("ends", 2), ("steps", 4))]
        starts, ends, steps = bounds
        if starts is None or ends is None or steps is None or min(steps) < 2:
            break
        axes = [axis % (rank + 2) for axis in int_values(node, "axes", 3) or range(len(starts))]
        if any(axis in found or axis < 2 for axis in axes):
            break
        found |= {axis: slice(*bound) for axis, *bound in zip(axes, starts, ends, steps, strict=True)}
        tensor = node.inputs[0]
    return tensor, found


def _offset(along: slice | None, block: int, length: int | None) -> int:
    """First pixel that a slice takes; it must take every ``block``-th from there to the end of the picture."""
    if (along.step if along is not None else 1) != block:
        raise _NotBlocksError
    if along is None:
        return 0
    if length is None:
        if not 0 <= along.start < block or along.stop < _TO_THE_END:
            raise RefusedError("its slices count from the end, or end early, and the size of the picture is not known")
        return int(along.start)
    taken = range(length)[along]
    if length % block or taken.start >= block or len(taken) != length // block:
        raise RefusedError(f"its slices do not divide {length} pixels into blocks of {block}")
    return taken.start


def _reshuffled(last: gs.Node, rank: int) -> _Blocks:
    """Reshape to ``(N, C, H / b, b, W / b, b)``, Transpose with the fine axes to the channels, Reshape."""
    transpose = producer_of(last.inputs[0])
    first = producer_of(transpose.inputs[0]) if transpose is not None and is_standard(transpose, "Transpose") else None
    if transpose is None or first is None or not is_standard(first, "Reshape"):
        raise _NotBlocksError
    order = [int(axis) for axis in transpose.attrs.get("perm", ())]
    coarse, fine = list(range(2, 2 * rank + 2, 2)), list(range(3, 2 * rank + 2, 2))
    moved = order[1 : rank + 2]
    if len(order) != 2 * rank + 2 or order[0] != 0 or order[rank + 2 :] != coarse or sorted(moved) != [1, *fine]:
        raise _NotBlocksError
    picture, split, joined = (_inner(t) for t in (first.inputs[0], first.outputs[0], last.outputs[0]))
    block = tuple(split[axis - 1] for axis in fine)
    if len(split) != 2 * rank + 1 or picture != (
        split[0],
        *(split[c - 1] * b for c, b in zip(coarse, block, strict=True)),
    ):
        raise _NotBlocksError
    if joined != (split[0] * math.prod(block), *(split[axis - 1] for axis in coarse)):
        raise _NotBlocksError
    taps = []
    for index in itertools.product(*(range(split[axis - 1]) for axis in moved)):
        at = dict(zip(moved, index, strict=True))
        taps.append((tuple(at[axis] for axis in fine), at[1]))
    return _Blocks(first.inputs[0], block, tuple(taps))


def _inner(tensor: gs.Tensor) -> tuple[int, ...]:
    """Extents behind the batch, all known."""
    shape = dims(tensor)
    if shape is None or any(size is None for size in shape[1:]):
        raise _NotBlocksError
    return tuple(size for size in shape[1:] if size is not None)


def _weight(conv: gs.Node, blocks: _Blocks) -> np.ndarray:
    """Kernel over the picture, in the type of the old one."""
    weight = float_values(conv.inputs[1])
    if weight is None:
        raise RefusedError("the weight of the Conv behind it is not a constant of a float type")
    if int(conv.attrs.get("group", 1)) != 1 or weight.shape[1] != len(blocks.taps):
        raise RefusedError("the Conv behind it has groups")
    if any(d != 1 and k != 1 for d, k in zip(window(conv, "dilations"), weight.shape[2:], strict=True)):
        raise RefusedError("the Conv behind it is dilated")
    explicit_pads(conv)  # refuses what it cannot work out
    extents = [size * b for size, b in zip(weight.shape[2:], blocks.block, strict=True)]
    new = np.zeros((weight.shape[0], 1 + max(c for _, c in blocks.taps), *extents), weight.dtype)
    for channel, (pixel, source) in enumerate(blocks.taps):
        at = tuple(slice(p, None, b) for p, b in zip(pixel, blocks.block, strict=True))
        new[(slice(None), source) + at] = weight[:, channel]  # noqa: RUF005 - unpacked in an index, it needs Python 3.11
    return new


def _write(conv: gs.Node, blocks: _Blocks, weight: np.ndarray, names: Names) -> None:
    begin, end = explicit_pads(conv)
    strides = window(conv, "strides")
    conv.attrs.pop("auto_pad", None)
    conv.attrs |= {
        "kernel_shape": list(weight.shape[2:]),
        "strides": [size * b for size, b in zip(strides, blocks.block, strict=True)],
        "pads": [size * b for size, b in zip([*begin, *end], [*blocks.block] * 2, strict=True)],
        "dilations": [1] * len(blocks.block),
    }
    set_input(conv, 0, blocks.picture)
    set_input(conv, 1, names.constant(f"{conv.inputs[1].name}/focus", weight))
