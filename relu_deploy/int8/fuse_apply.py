"""Scaling the constants of a network by the factors of its channels, exactly or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_graphsurgeon as gs

from relu_deploy.int8.fuse_groups import Labels, compress
from relu_deploy.int8.fuse_noise import Array, Numbers
from relu_deploy.int8.fuse_ranges import Extents
from relu_deploy.int8.fuse_rules import Edit
from relu_deploy.passes.edit import Names, float_values, set_input

# An activation of a 16-bit network may grow to this part of what the type holds: in use it may be larger than measured.
_HEADROOM = 1 / 16


def settle(
    edits: Sequence[Edit],
    known: Mapping[str, Extents],
    types: Mapping[str, np.dtype[np.floating]],
    numbers: Numbers,
    factors: Array,
) -> Array:
    """Move factors towards 1 until every constant is scaled without rounding and no activation leaves its type.

    A factor of 2^k changes nothing but exponents, as long as nothing overflows, or falls below the smallest normal
    number and loses bits. Each round halves the exponents of the channels that fail, so it ends.

    Args:
        edits: What will be scaled.
        known: Extents by channel of activations.
        types: Of these activations.
        numbers: Number of the group of each label.
        factors: Powers of two, by group.

    Returns:
        Factors, powers of two.
    """
    factors = factors.copy()
    while True:
        failing = np.zeros(factors.size, dtype=bool)
        for edit in edits:
            _mark_inexact(edit, numbers, factors, failing)
        for name, extents in known.items():
            ids = numbers[extents.labels]
            limit = float(np.finfo(types[name]).max) * _HEADROOM
            failing[ids[(factors[ids] > 1) & (factors[ids] * extents.top > limit)]] = True
        failing &= factors != 1
        if not failing.any():
            return factors
        factors[failing] = 2.0 ** np.trunc(np.log2(factors[failing]) / 2)


def apply_edits(graph: gs.Graph, edits: Sequence[Edit], numbers: Numbers, factors: Array) -> list[Edit]:
    """Give the nodes scaled constants of their own; those that share one get copies. Returns what was changed."""
    names, made = Names(graph), dict[tuple[int, bytes], gs.Constant]()
    changed = []
    for edit in edits:
        ratio = _ratio(edit, numbers, factors)
        if (ratio == 1).all():
            continue
        old = edit.node.inputs[edit.position]
        values = float_values(old)
        assert values is not None  # noqa: S101 - the rules note only float constants
        key = id(old), ratio.tobytes() + repr(ratio.shape).encode()
        if key not in made:
            made[key] = names.constant(f"{old.name}/fused", (values * ratio).astype(values.dtype))
        set_input(edit.node, edit.position, made[key])
        changed.append(edit)
    return changed


def _ratio(edit: Edit, numbers: Numbers, factors: Array) -> Array:
    """What a constant is multiplied by, of as few axes and elements as it takes."""
    ratio = np.ones(())
    if edit.up is not None:
        ratio = ratio * factors[numbers[edit.up]]
    if edit.down is not None:
        ratio = ratio / factors[numbers[edit.down]]
    return np.asarray(compress(np.asarray(ratio)), dtype=np.float64)


def _mark_inexact(edit: Edit, numbers: Numbers, factors: Array, failing: np.ndarray) -> None:
    ratio = _ratio(edit, numbers, factors)
    if (ratio == 1).all():
        return
    values = float_values(edit.node.inputs[edit.position])
    assert values is not None  # noqa: S101 - the rules note only float constants
    exact = values.astype(np.float64) * ratio
    with np.errstate(over="ignore", under="ignore"):
        lost = (exact.astype(values.dtype) != exact) & np.isfinite(values)
    if lost.any():
        for labels in (edit.up, edit.down):
            if labels is not None:
                failing[_at(numbers[labels], lost)] = True


def _at(ids: Labels, where: np.ndarray) -> Numbers:
    return np.unique(np.broadcast_to(ids, np.broadcast_shapes(ids.shape, where.shape))[
        np.broadcast_to(where, np.broadcast_shapes(ids.shape, where.shape))
    ])  # fmt: skip
